"""Comparisons between arms: cost ratios, final differences, planned horizons, the A/A control, performance profiles.

Arms are compared seed by seed: runs of one seed share initial weights, data order and augmentation. Each result lists
the seeds that it is based on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np

from yolo_sophia.compare.score import Curve, Mean, cost_to_target, default_target, mean, runs_by_seed, t_975

RESAMPLES = 10_000
TAUS = tuple(np.linspace(1, 4, 100).tolist())  # the grid of AlgoPerf's own scoring


@dataclass(frozen=True)
class Ratio:
    """Cost of an arm over that of the reference, paired by seed.

    Attributes:
        target: mAP50-95 to reach; None without a target, and then there is no ratio.
        default: Whether the target is `default_target` rather than one set by the user.
        seeds: Seeds that both arms have run.
        unpaired: Seeds that only one arm has run; excluded.
        ratios: Per paired seed: infinity where only the arm missed, 0 where only the reference did, NaN where both did.
        failed: Number of paired runs that crashed, of the arm and of the reference; each counts as a miss.
        missed: Number of paired seeds missed, by the arm and by the reference.
        value: Median of the ratios except NaN; None without ratios, or if it lies between 0 and infinity.
        low, high: Interval from `median_ratio`; None for fewer than two ratios.
        share: Of a default target, the share of the reference's median that it is.
    """

    arm: str
    reference: str
    data: str
    axis: str
    target: float | None
    default: bool
    seeds: tuple[int, ...]
    unpaired: tuple[int, ...]
    ratios: tuple[float, ...]
    failed: tuple[int, int]
    missed: tuple[int, int]
    value: float | None
    low: float | None
    high: float | None
    share: float = 1.0

    @property
    def informative(self) -> int:
        """Number of pairs in which at least one arm reached the target."""
        return sum(not math.isnan(ratio) for ratio in self.ratios)

    @property
    def direction(self) -> int:
        """-1 if cheaper than the reference, 1 if costlier, 0 if the interval contains 1 at the two decimals shown."""
        return 0 if self.low is None else (round(self.low, 2) > 1) - (round(self.high, 2) < 1)


def cost_quotient(cost: float, base: float) -> float:
    """Return cost / base for costs from 0 to infinity; NaN where both are infinite, 1 where both are 0."""
    if cost == base:
        return math.nan if math.isinf(cost) else 1.0
    return cost / base if base else math.inf


def _median_log(logs: np.ndarray) -> np.ndarray:
    """Return the median over the last axis; NaN between -infinity and infinity."""
    ordered, count = np.sort(logs, axis=-1), logs.shape[-1]
    with np.errstate(invalid="ignore"):
        return (ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2


def median_ratio(ratios: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the median of ratios from 0 to infinity and its 95 % percentile bootstrap interval over seeds.

    The median of an even number of ratios is the geometric mean of the middle two, so that swapping the arms inverts
    it; between 0 and infinity it is undefined. A resample with an undefined median counts as 0 for the lower end and as
    infinity for the upper end. The ends are medians of resamples, without interpolation. With two to five seeds the
    interval is the range of the ratios and covers the true median with probability 1 - 2**(1 - n): .94 for 5.
    """
    if not ratios:
        return None, None, None
    with np.errstate(divide="ignore"):
        logs = np.log(np.asarray(ratios, dtype=float))
    value = None if np.isnan(middle := _median_log(logs)) else float(np.exp(middle))
    if len(ratios) == 1:
        return value, None, None
    draws = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    medians = _median_log(logs[draws])
    tail = RESAMPLES // 40
    low, high = (np.sort(np.where(np.isnan(medians), unknown, medians)) for unknown in (-np.inf, np.inf))
    return value, float(np.exp(low[tail - 1])), float(np.exp(high[-tail]))


def cost_ratio(
    curves: Sequence[Curve],
    arm: str,
    reference: str,
    data: str,
    axis: str = "steps",
    target: float | None = None,
    share: float = 1.0,
) -> Ratio:
    """Compare the cost of full runs to a target with the reference arm's, seed by seed.

    The target defaults to `share` of `default_target`. A seed in which both arms missed carries no information about
    the ratio and is excluded.
    """
    aim = target or share * (default_target(curves, reference, data) or 0) or None
    pair = runs, base = runs_by_seed(curves, arm, data), runs_by_seed(curves, reference, data)
    seeds, unpaired = tuple(seed for seed in runs if seed in base), tuple(sorted(runs.keys() ^ base.keys()))
    costs = [[cost_to_target(arm_runs[seed], aim, axis) for seed in seeds] for arm_runs in pair] if aim else [[], []]
    ratios = tuple(cost_quotient(*pair) for pair in zip(*costs))
    failed = tuple(sum(arm_runs[seed].failed for seed in seeds) for arm_runs in pair)
    missed = tuple(sum(map(math.isinf, values)) for values in costs)
    interval = median_ratio([ratio for ratio in ratios if not math.isnan(ratio)])
    return Ratio(
        arm, reference, data, axis, aim, target is None, seeds, unpaired, ratios, failed, missed, *interval, share
    )


@dataclass(frozen=True)
class Difference:
    """Final mAP50-95 of an arm minus that of the reference, paired by seed.

    The arm wins or loses on the data set if `direction` is not 0. A tie is a mean difference within the scatter of the
    seeds: its 95 % interval (Student's t) contains 0. Fewer than three seeds leave it open.

    Attributes:
        seeds: Seeds that both arms have finished.
        left_out: Seeds that one of the arms has not finished.
        mean: Mean difference.
    """

    arm: str
    reference: str
    data: str
    seeds: tuple[int, ...]
    left_out: tuple[int, ...]
    mean: Mean

    @property
    def direction(self) -> int:
        """1 if higher than the reference, -1 if lower, 0 if the interval contains 0 at the three decimals shown."""
        return 0 if self.mean.low is None else (round(self.mean.low, 3) > 0) - (round(self.mean.high, 3) < 0)

    @property
    def outcome(self) -> str:
        """One of "win", "tie", "loss" and "open"."""
        return "open" if self.mean.count < 3 else ("tie", "win", "loss")[self.direction]

    @property
    def scatter(self) -> float | None:
        """Standard deviation of the differences over seeds; None for fewer than two."""
        mean = self.mean
        return None if mean.half is None else mean.half / t_975(mean.count - 1) * math.sqrt(mean.count)


def final_difference(curves: Sequence[Curve], arm: str, reference: str, data: str) -> Difference:
    """Compare the final mAP50-95 of full runs with the reference arm's, seed by seed."""
    runs, base = runs_by_seed(curves, arm, data), runs_by_seed(curves, reference, data)
    seeds = tuple(seed for seed in runs if seed in base and not runs[seed].failed and not base[seed].failed)
    left_out = tuple(sorted((runs.keys() | base.keys()) - set(seeds)))
    gaps = mean(runs[seed].final() - base[seed].final() for seed in seeds)
    return Difference(arm, reference, data, seeds, left_out, gaps)


@dataclass(frozen=True)
class HorizonScore:
    """The shortest planned schedule with which an arm reaches the target.

    Attributes:
        target: Final mAP50-95 to reach; None without a target.
        default: Whether the target is `default_target`.
        medians: Per horizon, shortest first: horizon, median final mAP50-95, number of seeds. For an even number of
            seeds it is the lower of the middle two; a failed run ranks below all others.
        ranges: Per horizon: lowest and highest final mAP50-95, 0 for a failed run.
        shortest: The shortest horizon whose median reaches the target; None if none does.
    """

    arm: str
    reference: str
    data: str
    target: float | None
    default: bool
    medians: tuple[tuple[float, float, int], ...]
    ranges: tuple[tuple[float, float], ...]
    shortest: float | None

    @property
    def missed_longer(self) -> tuple[float, ...]:
        """Horizons that miss the target although a shorter one reaches it."""
        if self.shortest is None:
            return ()
        return tuple(horizon for horizon, value, _ in self.medians if horizon > self.shortest and value < self.target)


def horizon_score(
    curves: Sequence[Curve], arm: str, reference: str, data: str, target: float | None = None
) -> HorizonScore:
    """Find the shortest horizon of `arm` whose median final mAP50-95 reaches the reference arm's over all of T."""
    aim = target or default_target(curves, reference, data)
    medians, ranges = [], []
    for horizon in sorted({curve.horizon for curve in curves if (curve.arm, curve.data) == (arm, data)}):
        finals = [-math.inf if run.failed else run.final() for run in runs_by_seed(curves, arm, data, horizon).values()]
        medians.append((horizon, median_low(finals), len(finals)))
        ranges.append((max(min(finals), 0.0), max(*finals, 0.0)))
    reached = (horizon for horizon, value, _ in medians if aim and value >= aim)
    return HorizonScore(arm, reference, data, aim, target is None, tuple(medians), tuple(ranges), next(reached, None))


@dataclass(frozen=True)
class Control:
    """Two arms with the same settings, compared value by value (A/A control).

    Attributes:
        pairs: Number of runs compared.
        largest: Largest difference in mAP50-95 or mAP50; infinity if runs differ in steps, images or failure.
        where: Data set, seed and horizon of the largest difference; None if all runs are equal.
        unpaired: Data set, seed and horizon of runs that only one of the arms has.
    """

    first: str
    second: str
    pairs: int
    largest: float
    where: tuple[str, int, float] | None
    unpaired: tuple[tuple[str, int, float], ...]


def control(curves: Sequence[Curve], first: str, second: str) -> Control:
    """Compare the common runs of two arms with the same settings; on one machine they should be equal."""
    one, two = ({(c.data, c.seed, c.horizon): c for c in curves if c.arm == arm} for arm in (first, second))
    common, unpaired = sorted(one.keys() & two.keys()), tuple(sorted(one.keys() ^ two.keys()))
    where = max(common, key=lambda key: _largest_gap(one[key], two[key]))
    largest = _largest_gap(one[where], two[where])
    return Control(first, second, len(common), largest, where if largest else None, unpaired)


def _largest_gap(one: Curve, two: Curve) -> float:
    """Return the largest difference in mAP between two runs; NaN equals NaN."""
    if (one.steps, one.images, one.failed) != (two.steps, two.images, two.failed):
        return math.inf
    pairs = zip(one.map50_95 + one.map50, two.map50_95 + two.map50)
    gaps = [abs(a - b) for a, b in pairs if str(float(a)) != str(float(b))]
    return max((gap if math.isfinite(gap) else math.inf for gap in gaps), default=0.0)


@dataclass(frozen=True)
class Profile:
    """Performance profile of an arm (Dolan and Moré, arXiv cs/0102001).

    Attributes:
        taus: Factors over the best arm's cost, rising from 1.
        fractions: Fraction of the data sets on which the arm's cost is at most that factor.
        area: Mean of the fraction between the first and the last factor, from 0 to 1.
    """

    arm: str
    taus: tuple[float, ...]
    fractions: tuple[float, ...]
    area: float


def profiles(costs: Mapping[str, Mapping[str, float]], taus: Sequence[float] = TAUS) -> tuple[Profile, ...]:
    """Compute performance profiles from `costs[arm][data]`, infinity for a miss; all arms have the same data sets.

    A data set that no arm solved counts against every arm. Profiles depend on the set of arms compared.
    """
    names = list(next(iter(costs.values())))
    best = {data: min(by_data[data] for by_data in costs.values()) for data in names}
    made = []
    for arm, by_data in costs.items():
        factors = np.array([cost_quotient(by_data[data], best[data]) for data in names])
        factors[np.isnan(factors)] = np.inf  # no arm reached the target
        fractions = tuple(float(np.mean(factors <= tau * (1 + 1e-12))) for tau in taus)
        area = float(np.mean(np.clip(taus[-1] - factors, 0, None))) / (taus[-1] - 1)
        made.append(Profile(arm, taus, fractions, area))
    return tuple(made)

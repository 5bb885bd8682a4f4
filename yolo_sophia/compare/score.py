"""Scores of finished runs, after AlgoPerf (arXiv 2306.07179): cost to a target, and its ratio to the reference's.

The one rule of this file: nothing is dropped in silence. A run that did not get there costs infinity, and every result
says which seeds it rests on. Differences, horizons, profiles, the A/A control and all words are in `verdict.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, median_low, stdev

import numpy as np

from yolo_sophia.runs.results import MAP50, MAP50_95, RunResult
from yolo_sophia.runs.run import data_name

AXES = ("steps", "images", "seconds")
METRICS = ("map50_95", "map50")
FULL = 1.0  # the horizon of a run over all of T
RESAMPLES = 10_000
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)  # Student's t, 1-10 df


@dataclass(frozen=True)
class Curve:
    """One run that has ended, well or not; a run still going has no place here.

    Attributes:
        arm: Name of the arm.
        data: Name of the data set.
        seed: Seed; runs of one seed share initial weights, data order and augmentation across arms.
        horizon: Length of the planned schedule as a fraction of T; 1 = full.
        steps, images, seconds: Optimizer steps, training images, training seconds, each up to the end of each epoch.
        map50_95, map50: Validation mAP after each epoch, a fraction. A value that is not finite shows divergence; None
            becomes NaN.
        failed: The run crashed. Its costs are infinite and it has no final or best mAP.
    """

    arm: str
    data: str
    seed: int
    horizon: float
    steps: tuple[int, ...]
    images: tuple[int, ...]
    seconds: tuple[float, ...]
    map50_95: tuple[float, ...]
    map50: tuple[float, ...]
    failed: bool = False

    def __post_init__(self) -> None:
        """Check lengths, order and ranges.

        Raises:
            ValueError: Something is inconsistent; the message names the run, the column and the epoch.
        """
        name = f"run {self.arm!r} on {self.data!r}, seed {self.seed}, horizon {self.horizon}"
        if not 0 < self.horizon < math.inf:
            raise ValueError(f"{name}: the horizon must be a finite fraction of T above 0; 1 is the full schedule.")
        # JSON has lists for tuples, and null where a number was not finite.
        columns = {c: tuple(math.nan if v is None else v for v in getattr(self, c)) for c in AXES + METRICS}
        lengths = {column: len(values) for column, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{name}: one value per epoch was expected in every column, found {lengths}.")
        if not (self.steps or self.failed):
            raise ValueError(f"{name}: no epoch. A run without one has failed: say failed=True.")
        for column, values in columns.items():
            object.__setattr__(self, column, values)
            for epoch, value in enumerate(values, 1):
                if column in AXES:
                    before = values[epoch - 2] if epoch > 1 else 0
                    if not before <= value < math.inf:
                        raise ValueError(f"{name}: {column} must not fall; epoch {epoch} has {value} after {before}.")
                elif math.isfinite(value) and not 0 <= value <= 1:
                    raise ValueError(f"{name}: {column} is a fraction from 0 to 1; epoch {epoch} has {value}.")

    @classmethod
    def of(cls, result: RunResult) -> Curve:
        """The curve of a run that has ended."""

        def column(name: str) -> tuple[float, ...]:
            return tuple(math.nan if row.get(name) is None else row[name] for row in result.rows)

        return cls(
            arm=result.run.arm,
            data=data_name(result.run.data),
            seed=result.run.seed,
            horizon=result.run.horizon,
            **{axis: column(axis) for axis in AXES},
            map50_95=column(MAP50_95),
            map50=column(MAP50),
            failed=result.receipt is None,
        )

    @property
    def diverged(self) -> bool:
        """Whether an mAP was not finite, or the last mAP50-95 is under a tenth of a best above .05.

        A run that never learned anything has not diverged: it misses the target.
        """
        if not all(map(math.isfinite, self.map50_95 + self.map50)):
            return True
        best = max(self.map50_95, default=0.0)
        return best > 0.05 and self.map50_95[-1] < 0.1 * best

    def final(self, metric: str = "map50_95") -> float | None:
        """Return the last mAP, 0 where it is not finite (such a model detects nothing), None for a failed run."""
        return None if self.failed else _or_zero(getattr(self, metric)[-1])

    def best(self, metric: str = "map50_95") -> float | None:
        """Return the largest mAP of any epoch, chosen on the validation images themselves; None for a failed run."""
        return None if self.failed else max(map(_or_zero, getattr(self, metric)))


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def runs(curves: Iterable[Curve], arm: str, data: str, horizon: float = FULL) -> dict[int, Curve]:
    """Return the runs of one arm, data set and horizon by seed, in order of seed; perhaps none.

    Raises:
        ValueError: No run has this arm or data set, or two runs are the same in arm, data set, seed and horizon.
    """
    curves = tuple(curves)
    for kind, wanted in (("arm", arm), ("data", data)):
        if wanted not in (known := {getattr(curve, kind) for curve in curves}):
            raise ValueError(f"no run has {kind} {wanted!r}; there are {sorted(known)}.")
    found = [curve for curve in curves if (curve.arm, curve.data, curve.horizon) == (arm, data, horizon)]
    seeds = [curve.seed for curve in found]
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ValueError(f"{arm!r} on {data!r} at horizon {horizon}: seeds {twice} occur more than once.")
    return {curve.seed: curve for curve in sorted(found, key=lambda curve: curve.seed)}


def default_target(curves: Iterable[Curve], reference: str, data: str) -> float | None:
    """Return the reference arm's median final mAP50-95 over full schedules.

    Of an even number of seeds it is the lower of the middle two: so the reference reaches its own target in most seeds,
    where the mean of the two would leave half of them short and its own median cost infinite. Failed runs have no final
    mAP and do not count: a crash of the reference must not lower the bar.

    Returns:
        The target, or None where there is nothing to reach: no run finished, or the median is 0.
    """
    finals = [curve.final() for curve in runs(curves, reference, data).values() if not curve.failed]
    return (median_low(finals) or None) if finals else None


def goal(curves: Iterable[Curve], reference: str, data: str, target: float | None) -> float | None:
    """Return `target`, checked, or `default_target` if it is None.

    Raises:
        ValueError: The target is not an mAP50-95 above 0 and at most 1.
    """
    if target is None:
        return default_target(curves, reference, data)
    if not 0 < target <= 1:
        raise ValueError(f"target {target}: expected an mAP50-95 above 0 and at most 1, as a fraction.")
    return target


def cost_to_target(curve: Curve, target: float, axis: str) -> float:
    """Return the cost (`axis`) of the first epoch with a finite mAP50-95 >= `target`; infinity if missed or failed."""
    if axis not in AXES:
        raise ValueError(f"axis {axis!r}: expected one of {AXES}.")
    reached = (cost for cost, value in zip(getattr(curve, axis), curve.map50_95) if target <= value < math.inf)
    return math.inf if curve.failed else float(next(reached, math.inf))


@dataclass(frozen=True)
class Mean:
    """Mean with Student's t 95 % interval; None where there are no values, no interval from one value."""

    value: float | None
    low: float | None
    high: float | None
    count: int


def mean(values: Iterable[float]) -> Mean:
    """Average `values`. The interval assumes that they are about normal; it is not cut at 0 or 1."""
    values = tuple(values)
    count = len(values)
    if count < 2:
        return Mean(values[0] if values else None, None, None, count)
    half = t_975(count - 1) * stdev(values) / math.sqrt(count)
    return Mean(fmean(values), fmean(values) - half, fmean(values) + half, count)


def t_975(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5 beyond the table; error < 1e-4)."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = 1.959964
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


@dataclass(frozen=True)
class Summary:
    """One row of the table: the full runs of an arm on a data set.

    Attributes:
        seeds: Seeds that were run, the failed ones too.
        failed: Runs that crashed. They are in no mean, so the means flatter an arm that has any.
        diverged: Runs that diverged; a run may be both.
        final, best, final50, best50: Final and best mAP50-95, then mAP50.
        target: mAP50-95 to reach; None = there is none.
        missed: Runs that missed it, the failed ones too.
        cost: Per axis the median over seeds, a miss being infinity; None without target or runs.
    """

    arm: str
    data: str
    seeds: tuple[int, ...]
    failed: int
    diverged: int
    final: Mean
    best: Mean
    final50: Mean
    best50: Mean
    target: float | None
    missed: int | None
    cost: Mapping[str, float | None]


def summarize(curves: Iterable[Curve], arm: str, data: str, target: float | None) -> Summary:
    """Summarize the full runs of an arm on a data set; `target` as from `goal`."""
    own = tuple(runs(curves, arm, data).values())
    done = [run for run in own if not run.failed]
    metrics = [mean(value(run, metric) for run in done) for metric in METRICS for value in (Curve.final, Curve.best)]
    costs = {axis: [cost_to_target(run, target, axis) for run in own] if target else [] for axis in AXES}
    missed = sum(map(math.isinf, costs["steps"])) if target else None
    medians = {axis: median(values) if values else None for axis, values in costs.items()}
    seeds, diverged = tuple(run.seed for run in own), sum(run.diverged for run in own)
    return Summary(arm, data, seeds, len(own) - len(done), diverged, *metrics, target, missed, medians)


@dataclass(frozen=True)
class Ratio:
    """Cost of an arm over that of the reference, paired by seed.

    Attributes:
        target: mAP50-95 to reach; None = there is none, and no ratio.
        default: Whether the target is `default_target` (else it was set).
        seeds: Seeds that both arms have run.
        unpaired: Seeds that only one of them has; left out.
        ratios: Per paired seed: infinity where only the arm missed, 0 where only the reference did, NaN where both did.
        failed: Paired runs of the arm, then of the reference, that crashed; each is a miss.
        missed: Paired seeds that the arm, then the reference, missed.
        value: Median of the ratios without the NaN; None where there are none, or where it lies between 0 and infinity.
        low, high: Interval of `median_ratio`; None for fewer than two ratios.
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

    @property
    def informative(self) -> int:
        """Number of pairs that value and interval rest on: at least one arm reached the target."""
        return sum(not math.isnan(ratio) for ratio in self.ratios)

    @property
    def direction(self) -> int:
        """-1 for cheaper than the reference, 1 for dearer, 0 where the interval, to two decimals as shown, holds 1."""
        return 0 if self.low is None else (round(self.low, 2) > 1) - (round(self.high, 2) < 1)


def over(cost: float, base: float) -> float:
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

    The median of an even number is the geometric mean of the middle two, so that swapping the arms inverts it; between
    0 and infinity it is unknown. A resample whose median is unknown counts as 0 for the lower end and as infinity for
    the upper one. Ends are medians of resamples, never interpolated. With two to five seeds the interval is the range
    of the ratios and holds the true median with a probability of only 1 - 2**(1 - n): .94 for 5, .75 for 3.
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
    curves: Iterable[Curve], arm: str, reference: str, data: str, axis: str = "steps", target: float | None = None
) -> Ratio:
    """Compare the cost of full runs to `target` (default: `default_target`) with the reference arm's, seed by seed.

    A seed in which both arms missed says nothing about the ratio and is left out of it: if the arms are alike, the rest
    are as likely above 1 as below.
    """
    curves = tuple(curves)
    aim = goal(curves, reference, data, target)
    both = own, base = runs(curves, arm, data), runs(curves, reference, data)
    seeds, unpaired = tuple(seed for seed in own if seed in base), tuple(sorted(own.keys() ^ base.keys()))
    costs = [[cost_to_target(arm_runs[seed], aim, axis) for seed in seeds] for arm_runs in both] if aim else [[], []]
    ratios = tuple(over(*pair) for pair in zip(*costs))
    failed = tuple(sum(arm_runs[seed].failed for seed in seeds) for arm_runs in both)
    missed = tuple(sum(map(math.isinf, values)) for values in costs)
    interval = median_ratio([ratio for ratio in ratios if not math.isnan(ratio)])
    return Ratio(arm, reference, data, axis, aim, target is None, seeds, unpaired, ratios, failed, missed, *interval)

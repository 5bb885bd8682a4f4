"""Scores of the runs of one arm, after AlgoPerf (arXiv 2306.07179): final and best mAP, cost to a target.

A run that misses the target, and one that crashed, has infinite cost. `pairwise.py` compares arms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, median, median_low, stdev

from yolo_sophia.runs.results import MAP50, MAP50_95, RunResult
from yolo_sophia.runs.run import data_name

AXES = ("steps", "images", "seconds")
METRICS = ("map50_95", "map50")
FULL = 1.0  # the horizon of a run over all of T
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)  # Student's t, 1-10 df


@dataclass(frozen=True)
class Curve:
    """A run that has finished or failed.

    Attributes:
        arm: Name of the arm.
        data: Name of the data set.
        seed: Seed; runs of one seed share initial weights, data order and augmentation across arms.
        horizon: Length of the planned schedule as a fraction of T; 1 = full.
        steps, images, seconds: Optimizer steps, training images, training seconds, each up to the end of each epoch.
        map50_95, map50: Validation mAP after each epoch, a fraction. A value that is not finite means divergence; None
            becomes NaN.
        failed: Whether the run crashed: its costs are infinite and it has no final or best mAP.
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
        """Check lengths, order and ranges; an error names the run, the column and the epoch."""
        name = f"run {self.arm!r} on {self.data!r}, seed {self.seed}, horizon {self.horizon}"
        if not 0 < self.horizon < math.inf:
            raise ValueError(f"{name}: the horizon must be a finite fraction of T above 0; 1 is the full schedule.")
        # JSON has lists for tuples, and null where a number was not finite.
        columns = {c: tuple(math.nan if v is None else v for v in getattr(self, c)) for c in AXES + METRICS}
        lengths = {column: len(values) for column, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{name}: one value per epoch was expected in every column, found {lengths}.")
        if not (self.steps or self.failed):
            raise ValueError(f"{name}: no epoch. A run without one has failed: pass failed=True.")
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
        """Convert a run that has ended.

        Raises:
            ValueError: Its record is inconsistent.
        """
        names = {"map50_95": MAP50_95, "map50": MAP50}
        columns = {name: tuple(row.get(names.get(name, name)) for row in result.rows) for name in AXES + METRICS}
        run = result.run
        return cls(run.arm, data_name(run.data), run.seed, run.horizon, **columns, failed=result.receipt is None)

    @property
    def diverged(self) -> bool:
        """Whether an mAP was not finite, or the last mAP50-95 is under a tenth of a best above .05.

        A run that never learned anything has not diverged; it misses the target.
        """
        if not all(map(math.isfinite, self.map50_95 + self.map50)):
            return True
        best = max(self.map50_95, default=0.0)
        return best > 0.05 and self.map50_95[-1] < 0.1 * best

    def final(self, metric: str = "map50_95") -> float | None:
        """Return the last mAP, 0 where it is not finite (such a model detects nothing), None for a failed run."""
        return None if self.failed else _or_zero(getattr(self, metric)[-1])

    def best(self) -> float | None:
        """The largest mAP50-95 of any epoch, chosen on the validation images themselves; None for a failed run."""
        return None if self.failed else max(map(_or_zero, self.map50_95))


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def runs_by_seed(curves: Iterable[Curve], arm: str, data: str, horizon: float = FULL) -> dict[int, Curve]:
    """Return the runs of one arm, data set and horizon by seed, in order of seed."""
    found = [curve for curve in curves if (curve.arm, curve.data, curve.horizon) == (arm, data, horizon)]
    return {curve.seed: curve for curve in sorted(found, key=lambda curve: curve.seed)}


def default_target(curves: Iterable[Curve], reference: str, data: str) -> float | None:
    """The reference arm's median final mAP50-95 over full schedules; None if no run finished or it is 0.

    For an even number of seeds it is the lower of the middle two, so that the reference reaches its own target in most
    seeds. Failed runs are excluded: a crash of the reference must not lower the target.
    """
    finals = [curve.final() for curve in runs_by_seed(curves, reference, data).values() if not curve.failed]
    return (median_low(finals) or None) if finals else None


def cost_to_target(curve: Curve, target: float, axis: str) -> float:
    """Return the cost (`axis`) of the first epoch with a finite mAP50-95 >= `target`; infinity if missed or failed."""
    reached = (cost for cost, value in zip(getattr(curve, axis), curve.map50_95) if target <= value < math.inf)
    return math.inf if curve.failed else float(next(reached, math.inf))


@dataclass(frozen=True)
class Mean:
    """Mean with Student's t 95 % interval; None where there are no values, no interval from one value."""

    value: float | None
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.high is None else self.high - self.value


def mean(values: Iterable[float]) -> Mean:
    """Average `values`. The interval assumes a normal distribution and is not clipped to [0, 1]."""
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
    """The full runs of an arm on a data set.

    Attributes:
        seeds: Seeds that were run, failed runs included.
        failed: Number of crashed runs. The means exclude them, so they are too high for an arm with crashes.
        diverged: Number of diverged runs; a run may be both.
        final, best, final50: Final and best mAP50-95, final mAP50.
        missed: Number of runs that missed it, failed runs included.
        costs: Cost of each seed per axis, infinity for a miss; empty without a target.
        cost: Median of `costs` per axis; None without a target.
    """

    seeds: tuple[int, ...]
    failed: int
    diverged: int
    final: Mean
    best: Mean
    final50: Mean
    missed: int | None
    costs: Mapping[str, tuple[float, ...]]
    cost: Mapping[str, float | None]


def summarize(curves: Iterable[Curve], arm: str, data: str, target: float | None) -> Summary:
    """Summarize the full runs of an arm on a data set."""
    runs = tuple(runs_by_seed(curves, arm, data).values())
    done = [run for run in runs if not run.failed]
    metrics = [mean(run.final() for run in done), mean(run.best() for run in done)]
    metrics.append(mean(run.final("map50") for run in done))
    costs = {axis: tuple(cost_to_target(run, target, axis) for run in runs) if target else () for axis in AXES}
    missed = sum(map(math.isinf, costs["steps"])) if target else None
    medians = {axis: median(values) if values else None for axis, values in costs.items()}
    seeds, diverged = tuple(run.seed for run in runs), sum(run.diverged for run in runs)
    return Summary(seeds, len(runs) - len(done), diverged, *metrics, missed, costs, medians)

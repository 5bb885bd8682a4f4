"""All numbers of a report, computed once from a plan and its runs; the sections render them.

Every run of the plan is counted once, as finished, failed or not ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from statistics import median
from typing import Any

from yolo_sophia.compare.aggregate import Aggregate, aggregate
from yolo_sophia.compare.pairwise import (
    Control,
    Difference,
    HorizonScore,
    Profile,
    Ratio,
    control,
    cost_ratio,
    final_difference,
    horizon_score,
    profiles,
)
from yolo_sophia.compare.plan import Plan
from yolo_sophia.compare.preflight import Preflight
from yolo_sophia.compare.score import AXES, FULL, Curve, Summary, cost_to_target, default_target, summarize
from yolo_sophia.compare.tuning import Search
from yolo_sophia.runs.results import RunResult
from yolo_sophia.runs.run import data_name

NEAR = 0.97
"""Share of the reference's median that is the second default target: the first is missed by half of its own seeds."""

RunName = tuple[str, str, int, float]
"""Arm, data set, seed and horizon of a run."""


@dataclass(frozen=True)
class Record:
    """A run that has a record.

    Attributes:
        result: The record; an inconsistent one is turned into a failed run.
        data: Name of the data set.
        curve: The run as scored; None while it has not ended.
        state: "finished", "failed" or "not ended".
        final: Last mAP50-95; None for a run that has not finished.
        steps_to_target: Of a full run, infinity for a miss; None without a target or before the end.
    """

    result: RunResult
    data: str
    curve: Curve | None
    state: str
    final: float | None = None
    steps_to_target: float | None = None

    @property
    def name(self) -> RunName:
        """Arm, data set, seed and horizon."""
        run = self.result.run
        return run.arm, self.data, run.seed, run.horizon


@dataclass(frozen=True)
class ArmResult:
    """An arm on a data set.

    Attributes:
        name: Name of the arm.
        number: Its position among the arms; the reference is 0.
        data: Name of the data set.
        records: Full runs that have ended, by seed.
        not_ended: Number of planned full runs that have not ended.
        summary: Final and best mAP, costs to the target; None before a full run has ended.
        ratios: Cost over the reference's by axis; empty for the reference, and until both arms have full runs.
        near_steps: Median number of steps to the second target; None where there is none.
        near: Steps to the second target over the reference's; None as for `ratios`, and where there is none.
        difference: Final mAP minus the reference's; None as for `ratios`.
        horizons: The planned schedules; None until the arm and the reference have full runs.
        step_seconds: Median training time of an optimizer step over all epochs of finished runs.
        hessian_share: Median over finished runs of the share of training time spent in Hessian updates; None without.
        peak_memory: Largest peak memory of a finished run in bytes.
    """

    name: str
    number: int
    data: str
    records: tuple[Record, ...]
    not_ended: int
    summary: Summary | None
    ratios: Mapping[str, Ratio]
    near_steps: float | None
    near: Ratio | None
    difference: Difference | None
    horizons: HorizonScore | None
    step_seconds: float | None
    hessian_share: float | None
    peak_memory: int | None


@dataclass(frozen=True)
class DataResult:
    """A data set.

    Attributes:
        name: Its name.
        epochs: Epochs of a full run.
        median: The reference arm's median final mAP50-95 (`default_target`); None before a run, and where it is 0.
        target: mAP50-95 to reach: the plan's, else the median.
        near: A second, easier target where the plan has none: `NEAR` of the median.
        arms: The arms, the reference first.
    """

    name: str
    epochs: int
    median: float | None
    target: float | None
    near: float | None
    arms: tuple[ArmResult, ...]


@dataclass(frozen=True)
class ComparisonResult:
    """A comparison as it stands.

    Attributes:
        plan: The plan.
        arms: Names of the arms, the reference first.
        records: The runs that have a record.
        data: The data sets.
        planned: Number of runs in the plan.
        not_ended: Planned runs that have neither finished nor failed.
        controls: A/A controls: pairs of arms that had the same settings in all their common runs.
        profiles: Performance profiles of the costs by axis; empty for fewer than two comparable data sets.
        aggregates: The arms over all comparable data sets, the reference first; empty for fewer than two.
        not_comparable: Data sets on which an arm has no runs, or the reference's median is not known or 0.
        columns: Names of all values that any epoch recorded, in order of appearance.
        searches: What tuning tried.
        coco: COCO metrics (fractions) by the key of their run.
        preflight: What was known of each arm and data set before its trainings.
    """

    plan: Plan
    arms: tuple[str, ...]
    records: tuple[Record, ...]
    data: tuple[DataResult, ...]
    planned: int
    not_ended: tuple[RunName, ...]
    controls: tuple[Control, ...]
    profiles: Mapping[str, tuple[Profile, ...]]
    aggregates: tuple[Aggregate, ...]
    not_comparable: tuple[str, ...]
    columns: tuple[str, ...]
    searches: tuple[Search, ...]
    coco: Mapping[str, Mapping[str, float]]
    preflight: tuple[Preflight, ...] = ()

    @property
    def repeated(self) -> set[str]:
        """Arms that repeat another arm's settings."""
        return {found.second for found in self.controls}

    def ended(self, arm: str) -> list[RunResult]:
        """Runs of an arm that have ended, over all data sets and horizons, by seed."""
        found = [record.result for record in self.records if record.curve and record.curve.arm == arm]
        return sorted(found, key=lambda result: result.run.seed)


def compute(
    plan: Plan,
    results: Iterable[RunResult],
    searches: Sequence[Search] = (),
    coco: Mapping[str, Mapping[str, float]] | None = None,
    preflight: Sequence[Preflight] = (),
) -> ComparisonResult:
    """Compute all statistics of a comparison, whatever the state of its runs.

    `results` are the runs that have a record; the other arguments are fields of `ComparisonResult`.

    Raises:
        ValueError: A result belongs to an arm or a data set that the plan lacks.
    """
    records = [_record(plan, result) for result in results]
    arms = tuple(sorted((arm.name for arm in plan.arms), key=lambda name: name != plan.reference))
    curves = tuple(record.curve for record in records if record.curve)
    ended = {(curve.arm, curve.data, curve.seed, curve.horizon) for curve in curves}
    planned = [(a, d, s, h) for d in map(data_name, plan.data) for a in arms for s in plan.seeds for h in plan.horizons]
    not_ended = tuple(name for name in planned if name not in ended)
    data = tuple(_data_result(plan, arms, path, records, curves, not_ended) for path in plan.data)
    targets = {item.name: item.target for item in data}
    records = [_scored(record, targets[record.data]) for record in records]
    comparable = [item for item in data if item.median and all(arm.summary for arm in item.arms)]
    several = len(comparable) > 1
    costs = {
        axis: {arm: {item.name: item.arms[i].summary.cost[axis] for item in comparable} for i, arm in enumerate(arms)}
        for axis in AXES * several
    }
    scores = {
        arm: {item.name: [(r.curve.final() or 0.0) / item.median for r in item.arms[i].records] for item in comparable}
        for i, arm in enumerate(arms)
    }
    return ComparisonResult(
        plan=plan,
        arms=arms,
        records=tuple(records),
        data=data,
        planned=len(planned),
        not_ended=not_ended,
        controls=tuple(control(curves, *pair) for pair in _same_settings(arms, records)),
        profiles={axis: profiles(item) for axis, item in costs.items()},
        aggregates=aggregate(scores, plan.reference) if several else (),
        not_comparable=tuple(item.name for item in data if item not in comparable),
        columns=tuple(dict.fromkeys(key for record in records for row in record.result.rows for key in row)),
        searches=tuple(searches),
        coco=coco or {},
        preflight=tuple(preflight),
    )


def _record(plan: Plan, result: RunResult) -> Record:
    run, curve = result.run, None
    for kind, wanted, known in (("arm", run.arm, [arm.name for arm in plan.arms]), ("data", run.data, list(plan.data))):
        if wanted not in known:
            raise ValueError(f"a result has {kind} {wanted!r}, the plan has {known}: another plan's result?")
    if result.ended:
        try:
            curve = Curve.of(result)
        except (ValueError, TypeError) as error:
            result = replace(result, rows=(), receipt=None, failure=f"The record is unusable: {error}")
            curve = Curve.of(result)
    state = "not ended" if curve is None else "failed" if curve.failed else "finished"
    return Record(result, data_name(run.data), curve, state)


def _scored(record: Record, target: float | None) -> Record:
    curve = record.curve
    if curve is None:
        return record
    steps = cost_to_target(curve, target, "steps") if target and curve.horizon == FULL else None
    return replace(record, final=curve.final(), steps_to_target=steps)


def _data_result(
    plan: Plan,
    arms: Sequence[str],
    path: str,
    records: Sequence[Record],
    curves: Sequence[Curve],
    not_ended: Sequence[RunName],
) -> DataResult:
    data, reference, made = data_name(path), plan.reference, []
    full = {arm: _full_runs(records, arm, data) for arm in arms}
    middle = default_target(curves, reference, data)
    target = plan.target or middle
    near = NEAR * middle if middle and not plan.target else None
    for number, arm in enumerate(arms):
        paired = full[arm] and full[reference]
        against = (curves, arm, reference, data)
        made.append(
            ArmResult(
                arm,
                number,
                data,
                full[arm],
                sum((a, d, h) == (arm, data, FULL) for a, d, _, h in not_ended),
                summarize(curves, arm, data, target) if full[arm] else None,
                {axis: cost_ratio(*against, axis, plan.target) for axis in AXES} if paired and number else {},
                summarize(curves, arm, data, near).cost["steps"] if full[arm] else None,
                cost_ratio(*against, share=NEAR) if paired and number and near else None,
                final_difference(*against) if paired and number else None,
                horizon_score(*against, plan.target) if paired else None,
                *_resources([record.result for record in full[arm]]),
            )
        )
    return DataResult(data, plan.common_on(path)["epochs"], middle, target, near, tuple(made))


def _full_runs(records: Sequence[Record], arm: str, data: str) -> tuple[Record, ...]:
    """Full runs of an arm on a data set that have ended, by seed."""
    found = [r for r in records if r.curve and (r.curve.arm, r.curve.data, r.curve.horizon) == (arm, data, FULL)]
    return tuple(sorted(found, key=lambda record: record.curve.seed))


def _resources(results: Sequence[RunResult]) -> tuple[float | None, float | None, int | None]:
    """Seconds per optimizer step, share of the time in Hessian updates, largest peak memory of finished runs."""
    finished = [result for result in results if result.receipt is not None and result.rows]
    steps, shares = [], []
    for result in finished:
        for before, row in pairwise(({"steps": 0, "seconds": 0.0}, *result.rows)):
            if taken := row["steps"] - before["steps"]:
                steps.append((row["seconds"] - before["seconds"]) / taken)
        spent = [s for row in result.rows if (s := row.get("sophia/refresh_seconds")) is not None]
        if spent and result.rows[-1]["seconds"]:
            shares.append(sum(spent) / result.rows[-1]["seconds"])
    memory = max((int(result.receipt.get("peak_memory_bytes") or 0) for result in finished), default=0)
    return median(steps) if steps else None, median(shares) if shares else None, memory or None


def _same_settings(arms: Sequence[str], records: Sequence[Record]) -> list[tuple[str, str]]:
    """Pairs of arms with the same settings in all their common runs; an arm is the second of one pair at most."""
    settings: dict[str, dict[Any, Any]] = {name: {} for name in arms}
    for run in (record.result.run for record in records if record.curve):
        settings[run.arm][run.data, run.seed, run.horizon] = dict(run.arguments)
    pairs: dict[str, str] = {}
    for one, two in combinations(arms, 2):
        common = settings[one].keys() & settings[two].keys()
        if two not in pairs and common and all(settings[one][key] == settings[two][key] for key in common):
            pairs[two] = one
    return [(one, two) for two, one in pairs.items()]

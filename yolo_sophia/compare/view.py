"""A plan with what has become of it, for the report: nothing is computed here that `score.py` could.

The rule: every run of the plan is counted once, as finished, failed or missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

from yolo_sophia.compare.plan import Plan
from yolo_sophia.compare.score import FULL, Curve, Ratio, Summary, cost_ratio, goal, summarize
from yolo_sophia.runs.results import RunResult
from yolo_sophia.runs.run import data_name


@dataclass(frozen=True)
class View:
    """A plan with what has become of it.

    Attributes:
        plan: The plan.
        results: Its runs; one whose record makes no sense is a failed one.
    """

    plan: Plan
    results: tuple[RunResult, ...]

    @classmethod
    def of(cls, plan: Plan, results: Iterable[RunResult]) -> View:
        """Check results against their plan.

        Raises:
            ValueError: A result belongs to an arm or a data set that the plan lacks.
        """
        checked = []
        for result in results:
            for kind, wanted, known in (
                ("arm", result.run.arm, [arm.name for arm in plan.arms]),
                ("data", result.run.data, list(plan.data)),
            ):
                if wanted not in known:
                    raise ValueError(f"a result has {kind} {wanted!r}, the plan has {known}: another plan's result?")
            try:
                Curve.of(result) if result.ended else None
            except (ValueError, TypeError) as error:
                result = replace(result, rows=(), receipt=None, failure=f"The record is unusable: {error}")
            checked.append(result)
        return cls(plan, tuple(checked))

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """The runs that have ended, as the scores take them."""
        return tuple(Curve.of(result) for result in self.results if result.ended)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of all values that any row has, in order of appearance."""
        return tuple(dict.fromkeys(key for result in self.results for row in result.rows for key in row))

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, the reference first."""
        names = [arm.name for arm in self.plan.arms]
        return (self.plan.reference, *(name for name in names if name != self.plan.reference))

    @cached_property
    def data(self) -> tuple[str, ...]:
        """Names of the data sets."""
        return tuple(map(data_name, self.plan.data))

    @cached_property
    def missing(self) -> tuple[tuple[str, str, int, float], ...]:
        """Arm, data set, seed and horizon of the planned runs that have not ended."""
        ended = {(curve.arm, curve.data, curve.seed, curve.horizon) for curve in self.curves}
        plan = self.plan
        planned = [(a, d, s, h) for d in self.data for a in self.arms for s in plan.seeds for h in plan.horizons]
        return tuple(run for run in planned if run not in ended)

    @property
    def planned(self) -> int:
        """Number of runs in the plan."""
        plan = self.plan
        return len(plan.arms) * len(plan.data) * len(plan.seeds) * len(plan.horizons)

    def has(self, arm: str, data: str) -> bool:
        """Whether a full run of the arm on the data set has ended."""
        return any((curve.arm, curve.data, curve.horizon) == (arm, data, FULL) for curve in self.curves)

    def of_arm(self, arm: str, data: str | None = None, horizon: float | None = FULL) -> list[RunResult]:
        """Runs of an arm that have ended, by seed; None stands for all."""
        found = [
            result
            for result in self.results
            if result.ended
            and result.run.arm == arm
            and data in {None, data_name(result.run.data)}
            and horizon in {None, result.run.horizon}
        ]
        return sorted(found, key=lambda result: result.run.seed)

    def target(self, data: str) -> float | None:
        """The mAP50-95 to reach on a data set; None if there is none yet."""
        if self.plan.target is not None or not self.has(self.plan.reference, data):
            return self.plan.target
        return goal(self.curves, self.plan.reference, data, None)

    def ratio(self, arm: str, data: str, axis: str) -> Ratio | None:
        """Cost over the reference arm's; None before both have ended runs."""
        if arm == self.plan.reference or not (self.has(arm, data) and self.has(self.plan.reference, data)):
            return None
        return cost_ratio(self.curves, arm, self.plan.reference, data, axis, self.plan.target)

    def summary(self, arm: str, data: str) -> Summary | None:
        """The arm's summary; None before a run has ended."""
        return summarize(self.curves, arm, data, self.target(data)) if self.has(arm, data) else None

    @cached_property
    def controls(self) -> tuple[tuple[str, str], ...]:
        """Pairs of arms that were given the same settings in all their common runs (A/A)."""
        settings: dict[str, dict[Any, Any]] = {name: {} for name in self.arms}
        for result in self.results:
            run = result.run
            if result.ended:
                settings[run.arm][run.data, run.seed, run.horizon] = dict(run.arguments)
        pairs, taken = [], set()
        for one, two in combinations(self.arms, 2):
            common = settings[one].keys() & settings[two].keys()
            if two not in taken and common and all(settings[one][key] == settings[two][key] for key in common):
                pairs.append((one, two))
                taken.add(two)
        return tuple(pairs)

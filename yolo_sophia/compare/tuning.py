"""The tuning budget of a comparison: the same number of short runs for every arm, over its own documented space.

The rule: equal budgets. Trial 0 is the arm as the plan gives it, the others follow a Halton sequence over the space,
the same for every invocation; trials use a seed that takes no part in the comparison. The best final mAP50-95 wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from yolo_sophia.compare.plan import Arm, Plan
from yolo_sophia.runs.plan import TRIAL_SEED
from yolo_sophia.runs.results import MAP50_95, RunResult
from yolo_sophia.runs.run import Run, data_name, make_run
from yolo_sophia.search_space import space_of

BASES = (2, 3, 5)


def halton(index: int, base: int) -> float:
    """Element `index` >= 1 of the van der Corput sequence of a prime base, in (0, 1)."""
    value, fraction = 0.0, 1.0
    while index:
        fraction /= base
        index, digit = divmod(index, base)
        value += digit * fraction
    return value


def settings(arm: Arm, trials: int) -> list[dict[str, float]]:
    """What each trial changes in the arm; the first changes nothing. No space, no further trials."""
    space = space_of(arm.arguments)
    points = range(1, trials if space else 1)
    return [{}] + [{key: r.at(halton(i, b)) for (key, r), b in zip(space.items(), BASES)} for i in points]


def trial_runs(plan: Plan) -> dict[tuple[str, str], list[tuple[dict[str, float], Run]]]:
    """The trials of every arm on every data set, with what they change."""
    epochs = plan.tune_epochs or max(1, plan.epochs // 3)
    trials: dict[tuple[str, str], list[tuple[dict[str, float], Run]]] = {}
    for data in plan.data:
        for arm in plan.arms:
            for changed in settings(arm, plan.tune_trials):
                arguments = {**plan.common, **arm.arguments, **changed}
                arguments |= {"data": data, "seed": TRIAL_SEED, "epochs": epochs}
                run = make_run(f"tune-{arm.name}", data, TRIAL_SEED, 1.0, arguments, plan.bn_recalibrate)
                run = replace(run, restart=plan.cut_runs == "restart")
                trials.setdefault((arm.name, data), []).append((changed, run))
    return trials


@dataclass(frozen=True)
class Search:
    """The record of one arm's search.

    Attributes:
        arm: Name of the arm.
        data: Name of the data set.
        trials: Per trial: the settings that it changed, its final mAP50-95 (None where it failed) and its state.
        chosen: The settings of the best one.
    """

    arm: str
    data: str
    trials: tuple[Mapping[str, Any], ...]
    chosen: Mapping[str, float]


def choose(arm: str, data: str, trials: Sequence[tuple[Mapping[str, float], RunResult]]) -> Search:
    """Choose the settings with the best final mAP50-95; a failed trial loses, and of equals the earlier wins."""
    rows = []
    for changed, result in trials:
        score = result.rows[-1].get(MAP50_95) if result.receipt and result.rows else None
        rows.append({**changed, "mAP50-95": score, "state": "finished" if result.receipt else "failed"})
    scores = [-1.0 if row["mAP50-95"] is None else row["mAP50-95"] for row in rows]
    best = max(range(len(rows)), key=lambda i: (scores[i], -i))
    return Search(arm, data_name(data), tuple(rows), dict(trials[best][0]))

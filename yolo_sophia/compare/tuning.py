"""The tuning of a comparison: the same number of trials of `tune` for every arm, over its own search space.

The first trial is the arm as the plan gives it. Trials use a seed that takes no part in the comparison. The settings
with the best final mAP50-95 are used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from yolo_sophia.compare.plan import Arm, Plan
from yolo_sophia.runs.plan import TRIAL_SEED, BasePlan
from yolo_sophia.runs.run import as_name, data_name
from yolo_sophia.runs.worker import ORDER
from yolo_sophia.search_space import space_of
from yolo_sophia.tune.plan import TunePlan, start_of

if TYPE_CHECKING:
    from yolo_sophia.tune.view import View

STUDIES = "study.db"


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
    chosen: Mapping[str, Any]


def tune_plans(plan: Plan) -> dict[tuple[str, str], TunePlan]:
    """The study of every arm on every data set; none without `tune_trials`."""
    return {(arm.name, data): _study(plan, arm, data) for data in plan.data for arm in plan.arms if plan.tune_trials}


def _study(plan: Plan, arm: Arm, data: str) -> TunePlan:
    from yolo_sophia.integration.resolution import validate_arguments

    common = plan.common_on(data)
    common["epochs"] = plan.tune_epochs or max(1, common["epochs"] // 3)
    arguments = validate_arguments({**common, **arm.arguments})
    space = space_of(arguments)
    changed = {"arms": (arm,), "data": (data,), "seeds": (TRIAL_SEED,), "common": MappingProxyType(common)}
    return TunePlan(
        **{field.name: getattr(plan, field.name) for field in fields(BasePlan)} | changed,
        space=MappingProxyType(dict(space)),
        start=MappingProxyType(start_of(space, arguments)),
        trials=plan.tune_trials if space else 1,
        storage=f"sqlite:///{plan.out / STUDIES}",
        study=as_name(f"{arm.name}-{data_name(data)}"),
        first_as_given=True,
    )


def check_tuning(plan: Plan) -> None:
    """Refuse a comparison whose tuning cannot be done or continued.

    Raises:
        ValueError: Optuna is missing, or the folder has trials of version 0.1.0, whose search was another one.
    """
    from yolo_sophia.tune.command import check_packages

    if not plan.tune_trials:
        return
    check_packages("tpe", "compare tune_trials=...", "compare")
    if (plan.out / STUDIES).is_file():
        return
    for order in (plan.out / "runs").glob(f"*/{ORDER}"):
        if json.loads(order.read_text(encoding="utf-8"))["arm"].startswith("tune-"):
            raise ValueError(
                f"out={plan.out} has tuning trials of yolo-sophia 0.1.0, which searched in another way: finish this "
                "comparison with that version, or start it in another folder."
            )


def tune(plan: Plan) -> tuple[list[Search], dict[tuple[str, str], Mapping[str, Any]]]:
    """Run the trials that are missing; returns the record, and the settings chosen by arm and data set.

    Raises:
        ValueError: The storage cannot be opened, or it holds another study.
    """
    from yolo_sophia.tune.command import run_study

    searches, tuned = [], {}
    for (arm, data), study in tune_plans(plan).items():
        search = choose(arm, data, run_study(study, f"tune {study.study}"))
        searches.append(search)
        tuned[arm, data] = search.chosen
    return searches, tuned


def choose(arm: str, data: str, view: View) -> Search:
    """The settings of the best finished trial; of equals the earlier one, and none where all failed."""
    rows = [{**trial.settings, "mAP50-95": trial.value, "state": trial.state} for trial in view.trials]
    return Search(arm, data_name(data), tuple(rows), dict(view.best.settings) if view.best else {})

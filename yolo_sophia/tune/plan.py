"""A study as data: one optimizer, its search space, and how many trials of which length.

A plan is checked completely before a file is written, and the space with it: every end of every range and every choice
is an argument that a training would accept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from yolo_sophia.options import suggestion
from yolo_sophia.runs import plan as shared
from yolo_sophia.runs.checks import DECIDED, check_values
from yolo_sophia.runs.plan import Arm, BasePlan, Key
from yolo_sophia.runs.run import Run, as_name, check_name, data_name
from yolo_sophia.runs.words import read, read_mapping
from yolo_sophia.search_space import (
    FORMS,
    Choice,
    Dimension,
    Range,
    argument_of,
    merged,
    read_dimension,
    value_of,
    with_settings,
    written,
)

SAMPLERS, PRUNERS = ("tpe", "random", "cmaes", "grid"), ("median", "hyperband", "none")
MAX_GRID = 1000


KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "plan": Key("YAML file with these keys and any Ultralytics argument"),
        "data": Key("data YAML, or several separated by commas: a trial's score is the mean over them"),
        "optimizer": Key("optimizer to tune: a name or a dotted path such as torch.optim.Adagrad", "SophiaG"),
        "trials": shared.int_key("number of trials of the study, earlier calls included (default: 30)", 30),
        "space": Key(
            "arguments to search, in addition to the optimizer's default space: a mapping or a YAML file; an argument "
            "with a value is not searched"
        ),
        "seeds": Key(
            f"number of seeds, or a list of them; a trial's score is the mean over them (default: one, "
            f"{shared.TRIAL_SEED})",
            1,
        ),
        "sampler": shared.choice_key(SAMPLERS, "how settings are proposed: tpe (default), random, cmaes or grid"),
        "grid_points": shared.int_key("sampler=grid: values of each range (default: 3)", 3, 2),
        "pruner": shared.choice_key(
            PRUNERS,
            "how trials with a low mAP50-95 are stopped early: median (default), hyperband or none",
        ),
        "prune_after": shared.int_key("epochs before which no trial is stopped (default: a quarter of a trial)"),
        **shared.RUN_KEYS,
        "storage": shared.path_key(
            "Optuna storage: a URL, or the path of an SQLite file (default: study.db in the folder of results); "
            "processes and machines with the same storage and study share the trials"
        ),
        "study": Key("name of the study in the storage (default: <optimizer>-<data>)"),
        "dry_run": shared.bool_key("print the space and the cost of the study, run nothing"),
    }
)


@dataclass(frozen=True)
class TunePlan(BasePlan):
    """A study.

    Attributes:
        space: Dimensions that are searched, by argument.
        start: The optimizer's own values of what is searched, where the space contains them: the first trial's.
        trials: Trials in total.
        sampler: One of `SAMPLERS`.
        grid_points: Values of each range under sampler=grid.
        pruner: One of `PRUNERS`.
        prune_after: Epochs of a trial, over all of its trainings, before which it is not stopped.
        storage: URL of Optuna's storage.
        study: Name of the study.
        first_as_given: Whether the first trial changes no argument at all.
    """

    space: Mapping[str, Dimension]
    start: Mapping[str, Any]
    trials: int
    storage: str
    study: str
    sampler: str = "tpe"
    grid_points: int = 3
    pruner: str = "none"
    prune_after: int = 1
    first_as_given: bool = False

    @property
    def arm(self) -> Arm:
        """The optimizer with its own arguments."""
        return self.arms[0]

    @property
    def trial_epochs(self) -> int:
        """Epochs of a trial, over all of its trainings."""
        return self.epochs * len(self.seeds) * len(self.data)

    @property
    def fixed(self) -> dict[str, Any]:
        """Arguments of every trial that are not searched."""
        return {**self.common, **self.arm.arguments}

    def runs(self, settings: Mapping[str, Any]) -> list[Run]:
        """The trainings of a trial: every seed on every data set. The same settings give the same runs."""
        arguments = with_settings(self.fixed, as_arguments(settings))
        return [
            self.run(f"tune-{self.arm.name}", data, seed, 1.0, arguments)
            for seed, data in product(self.seeds, self.data)
        ]

    def grid(self) -> list[dict[str, Any]]:
        """Every point of the grid, the last key changing fastest."""
        columns = [
            dimension.values
            if isinstance(dimension, Choice)
            else dict.fromkeys(dimension.at(i / (self.grid_points - 1)) for i in range(self.grid_points))
            for dimension in self.space.values()
        ]
        return [dict(zip(self.space, point)) for point in product(*columns)]

    def identity(self) -> dict[str, Any]:
        """What makes two plans the same study on any machine: where data and model are stored does not count."""
        elsewhere = {"model": Path(str(self.fixed["model"])).name}
        content = {key: value for key, value in self.fixed.items() if key != "device"}
        return {
            **{key: str(value) for key, value in {**content, **elsewhere}.items()},
            "data": [data_name(data) for data in self.data],
            "seeds": list(self.seeds),
            "space": {key: str(dimension) for key, dimension in self.space.items()},
            "bn_recalibrate": self.bn_recalibrate,
        }


def as_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a space as arguments: a choice that is text is read as the same word of `yolo train` would be."""
    return read(settings, ())


def parse(given: Sequence[str] | Mapping[str, Any]) -> TunePlan:
    """Read a plan from `key=value` words, or from a mapping of `KEYS` and Ultralytics' arguments as in a plan file.

    Raises:
        ValueError: What is wrong with which key, and what was expected.
    """
    from yolo_sophia.integration.resolution import validate_arguments

    content = read(given, KEYS)
    if "pruner" in content and content["pruner"] is None:  # the word none was read as null
        content["pruner"] = "none"
    values, arguments = shared.read_keys(content, KEYS)
    if arguments.get("val") is False:
        raise ValueError("val=False: a study needs the mAP50-95 of every epoch; leave it out.")
    base = shared.read_base(values, arguments, shared.TRIAL_SEED)
    (arm,) = shared.read_arms([str(values["optimizer"])], None)
    fixed = {**base["common"], **arm.arguments}
    if isinstance(values["space"], str):
        values["space"] = read_mapping("space", values["space"])
    shared.check_arm(arm, base["common"])
    space = _space(values["space"], fixed)
    _check_samples(space, fixed)
    validated = validate_arguments(fixed)
    if "clip_fraction" in space and "rho" not in space and validated["rho"] != "auto":
        raise ValueError(f"space: clip_fraction requires rho=auto, found rho={validated['rho']}: add rho=auto.")
    study = str(values["study"] or as_name("-".join([arm.name, *map(data_name, base["data"])])))
    check_name("study=", study)
    out = shared.read_out(values, str(Path("runs", "tune")), study)
    storage = str(values["storage"] or out / "study.db")
    made = TunePlan(
        arms=(arm,),
        cut_runs="resume",
        out=out,
        space=MappingProxyType(space),
        start=MappingProxyType(start_of(space, validated)),
        storage=storage if "://" in storage else f"sqlite:///{storage}",
        study=study,
        **{key: values[key] for key in ("trials", "sampler", "grid_points", "pruner")},
        prune_after=values["prune_after"] or 1,
        **base,
    )
    if values["prune_after"] is None:
        made = replace(made, prune_after=max(1, made.trial_epochs // 4))
    return _consistent(made, {key for key, value in content.items() if value is not None})


def start_of(space: Mapping[str, Dimension], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The values of these arguments that lie in the space."""
    values = {key: value_of(key, arguments) for key in space}
    return {key: dimension.rounded(values[key]) for key, dimension in space.items() if dimension.contains(values[key])}


def _consistent(plan: TunePlan, explicit: set[str]) -> TunePlan:
    """Refuse keys that others make meaningless; a grid has no more trials than points."""
    for key, word, needed in (("grid_points", "sampler", "grid"), ("prune_after", "pruner", "median or hyperband")):
        if key in explicit and getattr(plan, word) not in needed:
            raise ValueError(f"{key} requires {word}={needed}, found {word}={getattr(plan, word)}.")
    if plan.pruner != "none" and plan.prune_after >= plan.trial_epochs and "prune_after" in explicit:
        raise ValueError(
            f"prune_after={plan.prune_after}: expected less than a trial's {plan.trial_epochs} epochs, or pruner=none."
        )
    if plan.sampler != "grid":
        return plan
    size = prod(plan.grid_points if isinstance(d, Range) else len(d.values) for d in plan.space.values())
    if size > MAX_GRID:
        raise ValueError(f"sampler=grid: the grid has {size} points, expected at most {MAX_GRID}.")
    size = len(plan.grid())
    if "trials" in explicit and plan.trials > size:
        raise ValueError(f"trials={plan.trials}: the grid has {size} points; use at most that, or leave it out.")
    return replace(plan, trials=min(plan.trials, size) if "trials" in explicit else size)


def _space(given: Any, fixed: Mapping[str, Any]) -> dict[str, Dimension]:
    """The optimizer's own space without what is fixed, and what is given on top."""
    from yolo_sophia.integration.arguments import known_arguments
    from yolo_sophia.integration.resolution import validate_arguments

    if given is not None and not isinstance(given, dict):
        raise ValueError(f"space: found {given!r}, expected a mapping of arguments to {FORMS}.")
    read: dict[str, Dimension | None] = {}
    for key, entry in (given or {}).items():
        if argument_of(key)[0] not in (known := known_arguments()):
            raise ValueError(f"space: {key!r} is not a known argument.{suggestion(key, known)}")
        if key in DECIDED:
            raise ValueError(f"space: {key} is decided by the plan and cannot be searched.")
        read[key] = read_dimension(key, entry)
        if read[key] is not None and (held := value_of(key, fixed)) is not None:
            raise ValueError(f"{key}={held} is fixed, and it is in the space: leave one of them out.")
    space = {
        key: dimension
        for key, dimension in merged(validate_arguments(fixed), read).items()
        if value_of(key, fixed) is None
    }
    if not space:
        example = "space=\"{'lr0': [1e-4, 1e-2, 'log']}\""
        raise ValueError(f"optimizer={fixed['optimizer']}: there is nothing to search; add {example}.")
    return space


def _check_samples(space: Mapping[str, Dimension], fixed: Mapping[str, Any]) -> None:
    """Refuse a dimension whose ends or choices a training would refuse."""
    for key, dimension in space.items():
        for value in dimension.samples:
            try:
                check_values(with_settings(fixed, as_arguments({key: value})), f"space: {key}")
            except ValueError as error:
                hint = " Add 'int' for whole numbers." if "invalid type float" in str(error) else ""
                raise ValueError(f"{error}{hint}") from None


def plan_yaml(plan: TunePlan) -> str:
    """The plan as a file that `plan=` reads back to the same plan."""
    space = {key: written(dimension) for key, dimension in plan.space.items()}
    left_out = _space(space, plan.fixed).keys() - plan.space.keys()
    content: dict[str, Any] = {
        "data": list(plan.data),
        "optimizer": plan.arm.name,
        "space": {**space, **dict.fromkeys(sorted(left_out))},
        "seeds": list(plan.seeds),
        **{key: getattr(plan, key) for key in ("trials", "sampler", "pruner")},
        "grid_points": plan.grid_points if plan.sampler == "grid" else None,
        "prune_after": plan.prune_after if plan.pruner != "none" and plan.prune_after < plan.trial_epochs else None,
        **{key: getattr(plan, key) for key in ("bn_recalibrate", "engine", "workers", "cpus", "gpus")},
        "devices": list(plan.devices) or None,
        **{"out": str(plan.out), "storage": plan.storage, "study": plan.study},
    }
    return shared.to_yaml(content, plan.common)

"""A study as data: one optimizer, its search space, and how many trials of which length.

The rule: as `compare.plan`: a plan is judged whole before a file is written, and the space with it: every end of every
range and every choice is an argument that a training would accept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from yolo_sophia.compare import plan as comparison
from yolo_sophia.compare.plan import DECIDED, Arm, Key, Plan, whole
from yolo_sophia.compare.tuning import TRIAL_SEED
from yolo_sophia.presets import suggestion
from yolo_sophia.runs.run import Run, as_name, check_name, data_name, make_run
from yolo_sophia.search_space import FORMS, Choice, Dimension, Range, merged, read_dimension, written

SAMPLERS, PRUNERS = ("tpe", "random", "cmaes", "grid"), ("median", "hyperband", "none")
LARGEST_GRID = 1000


def _one_of(names: Sequence[str], meaning: str) -> Key:
    listed = f"{', '.join(names[:-1])} or {names[-1]}"
    return Key(f"{meaning}: {listed} (default: {names[0]})", names[0], lambda v: v in names, listed)


KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "plan": Key("YAML file with these keys and any Ultralytics argument"),
        "data": Key("data YAML, or several separated by commas: then the mean counts"),
        "optimizer": Key("optimizer to tune: a name, a dotted path, or a ready-made arm (default: SophiaG)", "SophiaG"),
        "trials": Key("trials of the study in all, those of earlier calls included (default: 30)", 30, whole(1),
                      "a whole number >= 1"),
        "space": Key("what is searched beside or instead of the optimizer's own space: a mapping or a YAML file; an "
                     "argument that is given a value is not searched"),
        "seeds": Key(f"number of seeds that a trial's score is the mean over, or a list of them (default: 1, which is "
                     f"{TRIAL_SEED})", 1),
        "sampler": _one_of(SAMPLERS, "what proposes settings"),
        "grid_points": Key("sampler=grid: values of each range (default: 3)", 3, whole(2), "a whole number >= 2"),
        "pruner": _one_of(PRUNERS, "what stops trials that fall behind, by mAP50-95 after each epoch"),
        "prune_after": Key("epochs before which no trial is stopped (default: a quarter of a trial's)", None, whole(1),
                           "a whole number >= 1"),
        "bn_recalibrate": comparison.KEYS["bn_recalibrate"],
        "workers": replace(comparison.KEYS["workers"], meaning="trials side by side (default: one per device, else 1)"),
        "devices": comparison.KEYS["devices"],
        "out": Key("folder of the study (default: runs/tune/<study>)", **comparison.PATH),
        "storage": Key("Optuna storage: a URL, or the path of an SQLite file (default: study.db in `out`); processes "
                       "and machines with the same storage and study share the trials", **comparison.PATH),
        "study": Key("name of the study in the storage (default: <optimizer>-<data>)"),
        "dry_run": Key("print the space and what the study would cost, run nothing", False,
                       lambda v: isinstance(v, bool), "True or False"),
    }
)  # fmt: skip


@dataclass(frozen=True)
class TunePlan:
    """A whole study.

    Attributes:
        base: What the trials have in common, as a comparison of one arm.
        space: What is searched, by argument.
        start: The optimizer's own values of what is searched, where the space holds them: the first trial's.
        trials: Trials in all.
        sampler: One of `SAMPLERS`.
        grid_points: Values of each range under sampler=grid.
        pruner: One of `PRUNERS`.
        prune_after: Epochs of a trial, over all of its trainings, before which it is not stopped.
        storage: URL of Optuna's storage.
        study: Name of the study.
    """

    base: Plan
    space: Mapping[str, Dimension]
    start: Mapping[str, Any]
    trials: int
    sampler: str
    grid_points: int
    pruner: str
    prune_after: int
    storage: str
    study: str

    @property
    def arm(self) -> Arm:
        """The optimizer with its own arguments."""
        return self.base.arms[0]

    @property
    def workers(self) -> int:
        """Trials side by side."""
        return self.base.workers or max(1, len(self.base.devices))

    @property
    def epochs(self) -> int:
        """Epochs of a trial, over all of its trainings."""
        return self.base.epochs * len(self.base.seeds) * len(self.base.data)

    @property
    def fixed(self) -> dict[str, Any]:
        """Arguments of every trial that are not searched."""
        return {**self.base.common, **self.arm.arguments}

    def runs(self, settings: Mapping[str, Any]) -> list[Run]:
        """The trainings of a trial: every seed on every data set. The same settings give the same runs."""
        made = []
        for seed, data in product(self.base.seeds, self.base.data):
            arguments = {**self.fixed, **settings, "data": data, "seed": seed, "epochs": self.base.epochs}
            made.append(make_run(f"tune-{self.arm.name}", data, seed, 1.0, arguments, self.base.bn_recalibrate))
        return made

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
        """What makes two plans the same study on whatever machine: where data and model lie does not count."""
        elsewhere = {"model": Path(str(self.fixed["model"])).name}
        content = {key: value for key, value in self.fixed.items() if key != "device"}
        return {
            **{key: str(value) for key, value in {**content, **elsewhere}.items()},
            "data": [data_name(data) for data in self.base.data],
            "seeds": list(self.base.seeds),
            "space": {key: str(dimension) for key, dimension in self.space.items()},
            "bn_recalibrate": self.base.bn_recalibrate,
        }


def parse(words: Sequence[str]) -> TunePlan:
    """Read a plan from `key=value` words; a `plan=` file is read first, words win.

    Raises:
        ValueError: What is wrong with which key, and what was expected.
    """
    return build(comparison.read_words(words))


def build(content: Mapping[str, Any]) -> TunePlan:
    """Make a plan from a mapping of `KEYS` and Ultralytics' arguments.

    Raises:
        ValueError: What is wrong with which key, and what was expected.
    """
    from yolo_sophia.integration.arguments import judge, known_arguments

    known = known_arguments()
    if "pruner" in content and content["pruner"] is None:  # the word none was read as null
        content = {**content, "pruner": "none"}
    own, content = {}, {key: value for key, value in content.items() if value is not None}
    for key in content:
        if key not in KEYS and key not in known:
            raise ValueError(f"{key!r} is not a known argument.{suggestion(key, [*KEYS, *known])}")
    typed = set(content)
    for key, spec in KEYS.items():
        own[key] = content.pop(key, spec.default)
        if key in typed and not spec.valid(own[key]):
            raise ValueError(f"{key}={own[key]!r}: expected {spec.expected}.")
    if content.get("val") is False:
        raise ValueError("val=False: a study needs the mAP50-95 of every epoch; leave it out.")
    if whole(1, comparison.MOST_SEEDS)(own["seeds"]):  # none that a comparison or a confirmation would take
        own["seeds"] = [TRIAL_SEED + i for i in range(own["seeds"])]
    shared = ("data", "seeds", "bn_recalibrate", "workers", "devices", "dry_run")
    base = comparison.build({**content, **{key: own[key] for key in shared}, "optimizers": [str(own["optimizer"])]})
    fixed = {**base.common, **base.arms[0].arguments}
    space = _space(own["space"], fixed)
    _check_samples(space, fixed)
    settled = judge(fixed)
    if "clip_fraction" in space and "rho" not in space and settled["rho"] != "auto":
        raise ValueError(f"space: clip_fraction is the knob of rho=auto, found rho={settled['rho']}: add rho=auto.")
    start = {key: own.settle(settled[key]) for key, own in space.items() if own.holds(settled.get(key))}
    study = as_name("-".join([base.arms[0].name, *map(data_name, base.data)]))
    if own["study"] is not None:
        study = str(own["study"])
        check_name("study=", study)
    base = replace(base, out=Path(str(own["out"] or Path("runs", "tune", study))))
    storage = str(own["storage"] or base.out / "study.db")
    made = TunePlan(
        base=base,
        space=MappingProxyType(space),
        start=MappingProxyType(start),
        storage=storage if "://" in storage else f"sqlite:///{storage}",
        study=study,
        **{key: own[key] for key in ("trials", "sampler", "grid_points", "pruner")},
        prune_after=own["prune_after"] or max(1, base.epochs * len(base.seeds) * len(base.data) // 4),
    )
    return _fitting(made, typed)


def _fitting(plan: TunePlan, typed: set[str]) -> TunePlan:
    """Refuse words that other words make meaningless; a grid has no more trials than points."""
    for key, word, needed in (("grid_points", "sampler", "grid"), ("prune_after", "pruner", "median or hyperband")):
        if key in typed and getattr(plan, word) not in needed:
            raise ValueError(f"{key} goes with {word}={needed}, found {word}={getattr(plan, word)}.")
    if plan.pruner != "none" and plan.prune_after >= plan.epochs and "prune_after" in typed:
        raise ValueError(
            f"prune_after={plan.prune_after}: expected less than a trial's {plan.epochs} epochs, or pruner=none."
        )
    if plan.sampler != "grid":
        return plan
    size = prod(plan.grid_points if isinstance(d, Range) else len(d.values) for d in plan.space.values())
    if size > LARGEST_GRID:
        raise ValueError(f"sampler=grid: the grid has {size} points, expected at most {LARGEST_GRID}.")
    size = len(plan.grid())
    if "trials" in typed and plan.trials > size:
        raise ValueError(f"trials={plan.trials}: the grid has {size} points; say at most that, or nothing.")
    return replace(plan, trials=min(plan.trials, size) if "trials" in typed else size)


def _space(given: Any, fixed: Mapping[str, Any]) -> dict[str, Dimension]:
    """The optimizer's own space, without what is fixed, and what is given on top."""
    from yolo_sophia.integration.arguments import judge, known_arguments

    if isinstance(given, str):
        given = comparison.plain_numbers(comparison.read_mapping("space", given))
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"space: found {given!r}, expected a mapping of arguments to {FORMS}.")
    read: dict[str, Dimension | None] = {}
    for key, entry in (given or {}).items():
        if key not in (known := known_arguments()):
            raise ValueError(f"space: {key!r} is not a known argument.{suggestion(key, known)}")
        if key in DECIDED:
            raise ValueError(f"space: {key} is decided by the plan and cannot be searched.")
        read[key] = read_dimension(key, entry)
        if read[key] is not None and key in fixed:
            raise ValueError(f"{key}={fixed[key]} is fixed, and it is in the space: leave one of them out.")
    space = {key: own for key, own in merged(judge(fixed), read).items() if key not in fixed}
    if not space:
        example = "space=\"{'lr0': [1e-4, 1e-2, 'log']}\""
        raise ValueError(f"optimizer={fixed['optimizer']}: there is nothing to search; say {example}.")
    return space


def _check_samples(space: Mapping[str, Dimension], fixed: Mapping[str, Any]) -> None:
    """Refuse a dimension whose ends or choices a training would refuse."""
    from yolo_sophia.integration.arguments import judge

    for key, dimension in space.items():
        for value in dimension.samples:
            try:
                judge({**fixed, key: value})
            except (TypeError, ValueError, NotImplementedError) as error:
                whole_missing = isinstance(error, TypeError) and isinstance(dimension, Range) and not dimension.whole
                hint = " Add 'int' for whole numbers." if whole_missing else ""
                raise ValueError(f"space: {key}: {error}{hint}") from None


def plan_yaml(plan: TunePlan) -> str:
    """The plan as a file that `plan=` reads back to the same plan."""
    space = {key: written(dimension) for key, dimension in plan.space.items()}
    left_out = _space(space, plan.fixed).keys() - plan.space.keys()
    content: dict[str, Any] = {
        "data": list(plan.base.data),
        "optimizer": plan.arm.name,
        "space": {**space, **dict.fromkeys(sorted(left_out))},
        "seeds": list(plan.base.seeds),
        **{key: getattr(plan, key) for key in ("trials", "sampler", "pruner")},
        **({"grid_points": plan.grid_points} if plan.sampler == "grid" else {}),
        **({"prune_after": plan.prune_after} if plan.pruner != "none" and plan.prune_after < plan.epochs else {}),
        "bn_recalibrate": plan.base.bn_recalibrate,
        **{key: list(own) if isinstance(own, tuple) else own for key in ("workers", "devices")
           if (own := getattr(plan.base, key))},
        **{"out": str(plan.base.out), "storage": plan.storage, "study": plan.study},
    }  # fmt: skip
    return yaml.safe_dump({**content, **plan.base.common}, sort_keys=False, allow_unicode=True)

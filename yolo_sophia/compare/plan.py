"""A comparison as data: arms, seeds, data sets and horizons, and the list of runs that follows from them.

A plan is checked completely before a run starts or a file is written. The same plan always gives the same runs under
the same names, so that finished ones are found again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType
from typing import Any

from yolo_sophia.options import suggestion
from yolo_sophia.runs import plan as shared
from yolo_sophia.runs.checks import as_int, as_list, is_int, is_number
from yolo_sophia.runs.plan import Arm, BasePlan, Key
from yolo_sophia.runs.run import Run
from yolo_sophia.runs.words import read

__all__ = ["KEYS", "Arm", "Plan", "parse", "plan_yaml", "runs"]

PER_DATA = ("epochs", "imgsz")
"""Arguments that a data set may have of its own: the length of its trainings and their image size."""


@dataclass(frozen=True)
class Plan(BasePlan):
    """A comparison; its keys are described in `KEYS`, and `per_data` has the arguments of `PER_DATA` by data YAML."""

    reference: str
    target: float | None
    horizons: tuple[float, ...]
    tune_trials: int
    tune_epochs: int | None
    per_data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def common_on(self, data: str) -> dict[str, Any]:
        """The Ultralytics arguments of every arm on a data set, those of its own included."""
        return {**self.common, **self.per_data.get(data, {})}


KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "plan": Key("YAML file with these keys, `arms`, and any Ultralytics argument"),
        "data": Key("data YAML, or several separated by commas; a plan file can give each its epochs and imgsz"),
        "optimizers": Key(
            "optimizers to compare: names, dotted paths such as torch.optim.Adagrad, or ready-made arms: "
            + ", ".join(shared.READY_MADE)
        ),
        "arms": Key("in a plan file: names of arms (optimizers with their settings), each with arguments of its own"),
        "seeds": Key("number of seeds, or a list of them (default: 3)", 3),
        "reference": Key("arm that the others are compared with (default: AdamW, else the second arm)"),
        "target": Key(
            "mAP50-95 to reach (default: the reference arm's median final value)",
            None,
            lambda v: is_number(v) and 0 < v < 1,
            "a number between 0 and 1",
        ),
        "horizons": Key(
            "fractions of the epochs; every arm is trained with a full schedule of each length (default: 1.0)", (1.0,)
        ),
        "tune_trials": shared.int_key(
            "trials of `yolo-sophia tune` for every arm before the comparison (default: 0)", 0, 0, 10_000
        ),
        "tune_epochs": shared.int_key("epochs of a trial (default: a third of the run's)"),
        "cut_runs": shared.choice_key(
            ("resume", "restart"),
            "what happens to an interrupted run: resume from its last checkpoint, or restart, which gives the results "
            "of an uninterrupted comparison",
        ),
        **shared.RUN_KEYS,
        "dry_run": shared.bool_key("print the plan and its cost, estimated from one measured step; run nothing"),
    }
)


def parse(given: Sequence[str] | Mapping[str, Any]) -> Plan:
    """Read a plan from `key=value` words, or from a mapping of `KEYS` and Ultralytics' arguments as in a plan file.

    Raises:
        ValueError: What is wrong with which key, and what was expected.
    """
    values, arguments = shared.read_keys(read(given, KEYS), KEYS)
    values["data"], per_data = _split_data(values["data"])
    base = shared.read_base(values, arguments)
    arms = shared.read_arms(values["optimizers"], values["arms"])
    for arm in arms:
        for data, settings in {"": {}, **per_data}.items():
            if both := settings.keys() & arm.arguments.keys():
                raise ValueError(f"{min(both)} is set for arm {arm.name} and for data={data}: leave out one of them.")
            shared.check_arm(arm, {**base["common"], **settings})
    names = [arm.name for arm in arms]
    reference = str(values["reference"] or ("AdamW" if "AdamW" in names else names[min(1, len(names) - 1)]))
    if reference not in names:
        raise ValueError(f"reference={reference!r} is not an arm.{suggestion(reference, names)} Arms: {names}.")
    horizons = tuple(as_list(values["horizons"]))
    if not all(isinstance(h, (int, float)) and 0 < h <= 1 for h in horizons) or 1.0 not in horizons:
        raise ValueError(f"horizons={list(horizons)}: expected fractions in (0, 1], 1.0 among them.")
    return Plan(
        arms=arms,
        reference=reference,
        horizons=tuple(sorted({float(h) for h in horizons}, reverse=True)),
        out=shared.read_out(values, "runs", "compare"),
        per_data=MappingProxyType(per_data),
        **{key: values[key] for key in ("target", "tune_trials", "tune_epochs", "cut_runs")},
        **base,
    )


def _split_data(given: Any) -> tuple[Any, dict[str, Mapping[str, Any]]]:
    """The data sets, and the arguments that a mapping gives to some of them.

    Raises:
        ValueError: A data set has other arguments than `PER_DATA`, or no whole number of epochs.
    """
    if not isinstance(given, Mapping):
        return given, {}
    found = {str(data): settings or {} for data, settings in given.items()}
    for data, settings in found.items():
        if not isinstance(settings, Mapping) or settings.keys() - set(PER_DATA):
            raise ValueError(
                f"data: {data}: found {settings!r}, expected a mapping with {' and '.join(PER_DATA)}: all else is the "
                "same for every data set, so that an arm is one method."
            )
        if "epochs" in settings and not is_int(1)(as_int(settings["epochs"])):
            raise ValueError(f"data: {data}: epochs={settings['epochs']!r}: expected a whole number >= 1.")
    return list(given), {data: MappingProxyType({k: as_int(v) for k, v in s.items()}) for data, s in found.items() if s}


def runs(plan: Plan, tuned: Mapping[tuple[str, str], Mapping[str, Any]] | None = None) -> list[Run]:
    """All trainings of a plan: every arm on every data set, seed and horizon, seeds outermost.

    Args:
        plan: The plan.
        tuned: Settings found by tuning, by arm and data set; they override the arm's own arguments.
    """
    made = []
    for seed, data, horizon, arm in product(plan.seeds, plan.data, plan.horizons, plan.arms):
        found = (tuned or {}).get((arm.name, data), {})
        common = plan.common_on(data)
        arguments = {**common, **arm.arguments, **found, "epochs": max(1, round(common["epochs"] * horizon))}
        made.append(plan.run(arm.name, data, seed, horizon, arguments))
    return made


def plan_yaml(plan: Plan) -> str:
    """The plan as a file that `plan=` reads back to the same plan."""
    content: dict[str, Any] = {
        "data": {data: plan.per_data.get(data, {}) for data in plan.data} if plan.per_data else list(plan.data),
        "arms": {arm.name: arm.arguments for arm in plan.arms},
        "reference": plan.reference,
        **{key: list(getattr(plan, key)) for key in ("seeds", "horizons", "devices")},
        "out": str(plan.out),
        **{key: getattr(plan, key) for key in ("target", "tune_trials", "tune_epochs", "bn_recalibrate", "cut_runs")},
        **{key: getattr(plan, key) for key in ("engine", "workers", "cpus", "gpus")},
    }
    return shared.to_yaml(content, plan.common)

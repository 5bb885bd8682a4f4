"""What `yolo-sophia doctor` finds for each arm and data set of a comparison; kept in doctor.json, beside the plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_sophia.atomic import atomic_write
from yolo_sophia.compare.plan import Plan
from yolo_sophia.runs.plan import plain

FILE = "doctor.json"


@dataclass(frozen=True)
class Preflight:
    """The facts about the trainings of an arm on a data set, as planned.

    Attributes:
        data: Data YAML.
        arm: Name of the arm.
        arguments: The arguments that were examined.
        facts: In the form of `integration.doctor.as_dicts`.
        error: Why there are none.
    """

    data: str
    arm: str
    arguments: Mapping[str, Any]
    facts: tuple[Mapping[str, Any], ...]
    error: str = ""


def examine_plan(plan: Plan) -> tuple[Preflight, ...]:
    """Examine every arm on every data set, and save what was found; what is saved for the same arguments is kept."""
    saved = {(entry.data, entry.arm, json.dumps(entry.arguments)): entry for entry in load_preflight(plan.out)}
    made = []
    for data in plan.data:
        for arm in plan.arms:
            arguments = plain({**plan.common_on(data), **arm.arguments, "data": data}, words=False)
            key = data, arm.name, json.dumps(arguments)
            made.append(saved.get(key) or _examined(data, arm.name, arguments))
    atomic_write(plan.out / FILE, json.dumps([vars(entry) for entry in made], indent=1))
    return tuple(made)


def _examined(data: str, arm: str, arguments: Mapping[str, Any]) -> Preflight:
    from yolo_sophia.integration.doctor import as_dicts, examine

    try:
        return Preflight(data, arm, arguments, tuple(as_dicts(examine(arguments))))
    except Exception as error:  # of a data set or a model that another machine has: no reason not to train
        return Preflight(data, arm, arguments, (), f"{type(error).__name__}: {error}")


def load_preflight(out: Path) -> tuple[Preflight, ...]:
    """What `examine_plan` saved in a folder; nothing where the file is absent or damaged."""
    try:
        content = json.loads((Path(out) / FILE).read_text(encoding="utf-8"))
        return tuple(Preflight(**{**own, "facts": tuple(own["facts"])}) for own in content)
    except (OSError, ValueError, TypeError, LookupError):
        return ()

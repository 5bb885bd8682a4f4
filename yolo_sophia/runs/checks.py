"""Checks of the Ultralytics arguments of a plan, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from yolo_sophia.options import suggestion

DECIDED: Mapping[str, str] = MappingProxyType(
    {
        "seed": "use seeds=...",
        "optimizer": "use optimizers=..., or name it in an arm",
        "data": "it is the same for every arm",
        "epochs": "they are the same for every arm",
        "resume": "rerun the same command to resume",
        "exist_ok": "rerun the same command to resume, or use another project= or name=",
        "project": "it is the plan's own folder",
        "name": "it is the plan's own folder",
        "save_dir": "use project= and name=",
    }
)
"""Ultralytics' arguments that a plan decides, and what to use instead."""

MINIMUMS: Mapping[str, float] = MappingProxyType(
    {"nbs": 1, "patience": 0, "mask_ratio": 1, "max_det": 1, "close_mosaic": 0, "warmup_epochs": 0, "time": 0}
)
"""Smallest values of Ultralytics' arguments that not every version checks before it uses them."""


def check_known(arguments: Iterable[str], where: str, keys: Collection[str] = ()) -> None:
    """Refuse arguments that a training does not have.

    Raises:
        ValueError: One is not known; the message has the most similar one.
    """
    from yolo_sophia.integration.arguments import known_arguments

    known = known_arguments()
    for key in arguments:
        if key not in known:
            raise ValueError(f"{where}: {key!r} is not a known argument.{suggestion(key, [*known, *keys])}")


def check_free(arguments: Mapping[str, Any], where: str, free: set[str]) -> None:
    """Refuse what the plan would override, except what is `free` here.

    Raises:
        ValueError: One of `DECIDED`, or several devices, is among the arguments.
    """
    for key, hint in DECIDED.items():
        if key in arguments and key not in free:
            raise ValueError(f"{where}: {key} is decided by the plan: {hint}.")
    device = ",".join(map(str, as_list(arguments.get("device", ""))))
    if "," in device:
        raise ValueError(f"{where}: device={device}: a training has one; use devices=... to spread the trainings.")


def check_values(arguments: Mapping[str, Any], where: str) -> None:
    """Check arguments as a trainer will, and those that Ultralytics uses before it checks them.

    Raises:
        ValueError: A value is of the wrong kind or out of range; the message names its key.
    """
    from yolo_sophia.integration.resolution import validate_arguments

    for key, value in arguments.items():
        if (problem := _problem(key, value)) is not None:
            raise ValueError(f"{where}: {key}={value!r}: expected {problem}.")
    try:
        validate_arguments(arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{where}: {error}") from None


def _problem(key: str, value: Any) -> str | None:
    """What was expected of a value that is out of range; wrong kinds are found by Ultralytics."""
    number = is_number(value)
    if key in MINIMUMS and number and not value >= MINIMUMS[key]:
        return f"a number >= {MINIMUMS[key]:g}"
    if key == "batch" and number and not (value == -1 or 0 < value < 1 or (value >= 1 and value == int(value))):
        return "a whole number >= 1, or -1 or a fraction of the GPU's memory for AutoBatch"
    if key == "imgsz" and not (1 <= len(as_list(value)) <= 2 and all(map(is_int(1), map(as_int, as_list(value))))):
        return "a whole number >= 1"
    if key == "fraction" and number and value <= 0:
        return "a number above 0"
    return None


def is_number(value: Any) -> bool:
    """Whether a value is a number; a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_int(minimum: int, maximum: int = 10**6) -> Callable[[Any], bool]:
    """A check for whole numbers from a minimum to a maximum."""
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and minimum <= v <= maximum


def as_int(value: Any) -> Any:
    """A float such as 1e2 as a whole number; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_list(value: Any) -> list[Any]:
    """A list or tuple as a list, anything else as a list of one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]

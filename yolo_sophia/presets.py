"""Presets: YAML files with tuned settings, each number with its origin, read into a frozen dataclass.

The rule: a preset is judged whole before anything is done with it; a number without an origin is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from yolo_sophia.yaml_io import is_file, read_yaml

CHOSEN = "auto"
"""What `sophia=` takes, and is without a word, for the preset that fits the run (integration/auto_preset.py)."""


@dataclass(frozen=True)
class Knob:
    """One Ultralytics argument that belongs to Sophia.

    Attributes:
        default: The package default, used where neither the user nor the preset says anything.
        kind: int, float, str or bool.
        valid: Whether a value of that kind is in range.
        expected: The range in words, for messages.
        words: What is accepted beside values of that kind, in any case.
    """

    default: Any
    kind: type
    valid: Callable[[Any], bool]
    expected: str
    words: tuple[str, ...] = ()


HUTCHINSON = "hutchinson"
"""The estimator of optimizer=SophiaH, and of no other: its estimates can be negative."""


def _estimator_names() -> tuple[str, ...]:
    from yolo_sophia.curvature import ESTIMATORS  # imports torch: only when a value is judged

    return (*ESTIMATORS, HUTCHINSON)


AVERAGES = ("element", "kernel", "row")
"""What `hessian_average=` takes: h of each element, of each kernel, or of each output row."""

KNOBS: Mapping[str, Knob] = MappingProxyType(
    {
        "rho": Knob(0.04, float, lambda v: 0 < v < math.inf, "a number > 0, or auto", words=("auto",)),
        "clip_fraction": Knob(0.6, float, lambda v: 0 < v < 1, "a number between 0 and 1"),
        "hessian_interval": Knob(10, int, lambda v: v >= 1, "a whole number >= 1"),
        "hessian_warmup": Knob(0, int, lambda v: v >= 0, "a whole number >= 0"),
        "hessian_fraction": Knob(1.0, float, lambda v: 0 < v <= 1, "a number in (0, 1]"),
        "hessian_estimator": Knob(
            "gnb", str, lambda v: v in _estimator_names(), "gnb, empirical_fisher, sign or hutchinson"
        ),
        "hessian_average": Knob("element", str, lambda v: v in AVERAGES, f"one of {', '.join(AVERAGES)}"),
        "cautious": Knob(False, bool, lambda v: True, "True or False"),
        "hessian_root": Knob(False, bool, lambda v: True, "True or False"),
        "head_lr_factor": Knob(1.0, float, lambda v: 0 < v < math.inf, "a number > 0, or auto", words=("auto",)),
        "bn_momentum": Knob(0.03, float, lambda v: 0 < v <= 1, "a number in (0, 1]"),
        "beta2": Knob(0.99, float, lambda v: 0 <= v < 1, "a number in [0, 1)"),
    }
)
"""Sophia's own arguments. Defaults are those of arXiv 2305.14342 and its code."""

BORROWED: Mapping[str, Knob] = MappingProxyType(
    {
        "lr0": Knob(None, float, lambda v: 0 <= v <= 1, "a number in [0, 1]", words=("auto",)),  # the word in a preset
        "lrf": Knob(None, float, lambda v: 0 <= v <= 1, "a number in [0, 1]"),
        "momentum": Knob(None, float, lambda v: 0 <= v < 1, "a number in [0, 1)"),
        "weight_decay": Knob(None, float, lambda v: 0 <= v <= 1, "a number in [0, 1]"),
        "warmup_bias_lr": Knob(None, float, lambda v: 0 <= v <= 1, "a number in [0, 1]"),
        "cos_lr": Knob(None, bool, lambda v: True, "True or False"),
        "warmup_epochs": Knob(None, float, lambda v: 0 <= v < math.inf, "a number >= 0"),
    }
)
"""Ultralytics' arguments that a preset may set: their own defaults are meant for SGD. The ranges are its own."""


@dataclass(frozen=True)
class Preset:
    """Settings under one name.

    Attributes:
        name: The name, or the absolute path that it was read from: a run may be resumed elsewhere.
        status: "provisional", "published" or "studied": what the numbers rest on.
        description: One sentence.
        settings: Values by argument name.
        origins: Where each value comes from, by argument name.
    """

    name: str
    status: str
    description: str
    settings: Mapping[str, Any]
    origins: Mapping[str, str]


def preset_directory() -> Path:
    """Folder of the presets that ship with the package: inside it in a wheel, beside it in a source tree."""
    package = Path(__file__).parent
    for folder in (package / "configs" / "presets", package.parent / "configs" / "presets"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"yolo-sophia's presets are missing from {package}; install the package again.")


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.stem for path in preset_directory().glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """Read and check a preset.

    Args:
        name: Name of a shipped preset, or the path of a YAML file.

    Raises:
        ValueError: There is no such preset, or the file is malformed; the message says what to do.
    """
    name = str(name)
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not is_file(path):
            raise ValueError(
                f"sophia={name}: no such file. Pass the path of a preset YAML, or one of {preset_names()}."
            )
    elif name.lower() in (names := preset_names()):
        path = preset_directory() / f"{name.lower()}.yaml"
    else:
        raise ValueError(
            f"sophia={name!r} is not a preset.{suggestion(name, names)} Valid presets: {names}, or a .yaml path."
        )
    return _parse(read_yaml(path, f"Preset {path}"), path)


def _parse(content: Any, path: Path) -> Preset:
    def refuse(problem: str) -> ValueError:
        return ValueError(f"Preset {path}: {problem}")

    expected = {"description", "status", "settings"}
    if not isinstance(content, dict) or set(content) != expected:
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise refuse(f"found {found} at the top level, expected the keys {sorted(expected)}.")
    if content["status"] not in ("provisional", "published", "studied"):  # a tuple: YAML may give a list
        raise refuse(f"status: found {content['status']!r}, expected provisional, published or studied.")
    if not isinstance(content["settings"], dict):
        raise refuse(f"settings: found {type(content['settings']).__name__}, expected a mapping of argument names.")
    known = {**KNOBS, **BORROWED}
    settings, origins = {}, {}
    for key, entry in content["settings"].items():
        if key not in known:
            raise refuse(f"{key!r} is not a setting.{suggestion(key, known)} Valid settings: {sorted(known)}.")
        if not isinstance(entry, dict) or set(entry) != {"value", "origin"} or not _is_text(entry["origin"]):
            raise refuse(f"{key}: found {entry!r}, expected {{value: ..., origin: 'where the value comes from'}}.")
        try:
            settings[key] = check_value(key, _number(key, entry["value"]))
        except (TypeError, ValueError) as error:
            raise refuse(str(error)) from None
        origins[key] = entry["origin"]
    return Preset(
        name=path.stem if path.resolve().parent == preset_directory().resolve() else str(path.resolve()),
        status=content["status"],
        description=str(content["description"]),
        settings=MappingProxyType(settings),
        origins=MappingProxyType(origins),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _number(key: str, value: Any) -> Any:
    """A float written without a dot, or an exponent without a sign (1e-3, 1.0e3), is text to YAML 1.1: read it."""
    if isinstance(value, str) and {**KNOBS, **BORROWED}[key].kind is float:
        with suppress(ValueError):
            return float(value)
    return value


def check_value(key: str, value: Any) -> Any:
    """Check a value of a knob or a borrowed argument, and return it in its kind.

    Raises:
        TypeError: It is not of the argument's kind.
        ValueError: It is out of range.
    """
    knob = KNOBS.get(key) or BORROWED[key]
    if isinstance(value, str) and value.lower() in knob.words:
        return value.lower()
    accepted = {int: int, float: (int, float), str: str, bool: bool}[knob.kind]
    if isinstance(value, bool) != (knob.kind is bool) or not isinstance(value, accepted):
        raise TypeError(f"'{key}={value}' is of invalid type {type(value).__name__}; '{key}' must be {knob.expected}.")
    try:
        value = knob.kind(value)
    except OverflowError:  # a whole number beyond any float
        value = math.inf
    if not knob.valid(value):
        choices = {"hessian_estimator": _estimator_names, "hessian_average": lambda: AVERAGES}
        hint = suggestion(value, choices[key]()) if key in choices else ""
        raise ValueError(f"'{key}={value}' is an invalid value; '{key}' must be {knob.expected}.{hint}")
    return value


def suggestion(name: object, known: Any) -> str:
    """` Did you mean 'x'?` for the closest known name, or nothing."""
    by_lower = {str(k).lower(): str(k) for k in known}
    close = get_close_matches(str(name).lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""

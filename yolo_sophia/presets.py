"""Presets: YAML files with tuned settings, each number with its origin, read into a frozen dataclass.

A preset is validated completely before any of it is used. A number without an origin is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from yolo_sophia.options import ALL, RENAMED, renamed, suggestion
from yolo_sophia.yaml_io import is_file, read_yaml


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
    settings, origins = {}, {}
    for key, entry in content["settings"].items():
        if key not in ALL and key not in RENAMED:
            raise refuse(f"{key!r} is not a setting.{suggestion(key, ALL)} Valid settings: {sorted(ALL)}.")
        origin = entry.get("origin") if isinstance(entry, dict) and set(entry) == {"value", "origin"} else None
        if not isinstance(origin, str) or not origin.strip():
            raise refuse(f"{key}: found {entry!r}, expected {{value: ..., origin: 'where the value comes from'}}.")
        try:
            name, value = renamed(key, entry["value"])
            if name != key:
                warnings.warn(f"Preset {path}: {key} is now {name}={value}; rename it.", FutureWarning, stacklevel=3)
            if name in settings:
                raise ValueError(f"found {key!r} and {name!r}, which are the same setting; remove one.")
            settings[name] = ALL[name].check(_number(name, value))
        except (TypeError, ValueError) as error:
            raise refuse(str(error)) from None
        origins[name] = origin
    return Preset(
        name=path.stem if path.resolve().parent == preset_directory().resolve() else str(path.resolve()),
        status=content["status"],
        description=str(content["description"]),
        settings=MappingProxyType(settings),
        origins=MappingProxyType(origins),
    )


def _number(key: str, value: Any) -> Any:
    """Read a number in quotes."""
    if isinstance(value, str) and ALL[key].kind is float:
        with suppress(ValueError):
            return float(value)
    return value

"""One training as data, and the names of its folder, of data sets and of arms."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        key: Name of its folder; follows from the other fields.
        arm: Name of the arm.
        data: Data YAML.
        seed: Ultralytics' seed: initial weights, data order and augmentation follow from it.
        horizon: Fraction of the plan's epochs that its schedule is planned for.
        arguments: All Ultralytics arguments, the arm's and the seed included.
        bn_recalibrate: Whether BatchNorm statistics are recalibrated before each validation.
        restart: Whether an interrupted training starts again instead of from its last checkpoint; not part of the key.
    """

    key: str
    arm: str
    data: str
    seed: int
    horizon: float
    arguments: Mapping[str, Any]
    bn_recalibrate: bool = False
    restart: bool = False


def make_run(arm: str, data: str, seed: int, horizon: float, arguments: Mapping[str, Any], bn_recalibrate: bool) -> Run:
    """A run with its key: readable, and another one whenever an argument differs."""
    content = json.dumps([dict(arguments), bn_recalibrate], sort_keys=True, default=str)
    digest = hashlib.blake2b(content.encode(), digest_size=4).hexdigest()
    key = f"{data_name(data)}-{arm}-s{seed}-h{horizon:g}-{digest}"
    return Run(key, arm, data, seed, horizon, MappingProxyType(dict(arguments)), bn_recalibrate)


def check_name(what: str, name: str) -> None:
    """Refuse what does not name one folder inside another, on Windows too.

    Raises:
        ValueError: It does not.
    """
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._+-]{0,62}[A-Za-z0-9_+-])?", name) or _is_reserved(name):
        raise ValueError(
            f"{what}{name!r}: expected letters, digits and . _ + - (at most 64, a letter or digit first, no dot last, "
            "no name that Windows reserves, such as CON): it names a folder."
        )


def _is_reserved(name: str) -> bool:
    return bool(re.fullmatch(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)(\..*)?", name, re.IGNORECASE))


def data_name(data: str) -> str:
    """A short name of a data YAML that can name a folder."""
    path = Path(data)
    name = path.parent.name if path.stem == "data" and path.parent.name else path.stem
    return as_name(name.replace("+", "_"))


def as_name(text: str, longest: int = 64) -> str:
    """A text as a name of a folder: other characters become _, and a long one ends in its digest."""
    name = re.sub(r"[^A-Za-z0-9._+-]|\.$", "_", text)
    if len(name) > longest:
        name = f"{name[: longest - 9]}-{hashlib.blake2b(text.encode(errors='replace'), digest_size=4).hexdigest()}"
    return f"_{name}" if not name or _is_reserved(name) else name

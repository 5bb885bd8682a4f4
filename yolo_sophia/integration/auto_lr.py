"""Learning rates that follow from the run: `lr0: auto` in a preset, and head_lr_factor=auto.

The body: little where the weights know the classes, else by the number of classes, as Ultralytics' `optimizer=auto` has
it (there .002 * 5 / (4 + classes)). A new head: always HEAD. Whether it is new is read from the model, not from where
it came: a file of weights may have a new head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from yolo_sophia.integration.measure import read_data

AUTO = "auto"

HEAD = 0.0025
"""Learning rate of a new head (docs/studies/2026-11-28-head)."""

KNOWN = 0.00012
"""Learning rate of weights that know the classes, their head excepted if it is new (the same study)."""

CLASSES = 10
"""Taken where the number of classes is not known, as by Ultralytics."""


def rate_for(arguments: Mapping[str, Any]) -> tuple[float, str]:
    """What `lr0: auto` stands for, and why, in words: KNOWN, or .01 / (4 + classes).

    Weights know the classes if half of their names or more are among their own.

    Args:
        arguments: Arguments of the run.
    """
    names, own = class_names(arguments), known_names(arguments)
    known = sum(name in own for name in names)
    if known and 2 * known >= len(names):
        return KNOWN, f"as the weights know {known} of {len(names)} classes"
    count = 1 if arguments.get("single_cls") else len(names)
    shown = f"{count or 'an unknown number of'} new class{'es' * (count != 1)}"
    return round(0.01 / (4 + (count or CLASSES)), 6), f"for {shown}"


def class_names(arguments: Mapping[str, Any]) -> list[str]:
    """Names of the classes in the run's data YAML, in lower case; none where it has none, or there is none."""
    try:
        _, content = read_data(str(arguments.get("data")))
        names = content["names"] if "names" in content else [f"class_{i}" for i in range(content["nc"])]
        return [str(name).lower() for name in (names.values() if isinstance(names, dict) else list(names))]
    except (ValueError, LookupError, TypeError):
        return []  # Ultralytics itself will say what is wrong with it


def known_names(arguments: Mapping[str, Any]) -> frozenset[str]:
    """Names of the classes of the weights that the run starts from, in lower case."""
    files = (arguments.get("pretrained"), arguments.get("model"))
    for name in files:
        path = Path(str(name))
        if isinstance(name, (str, Path)) and path.suffix.lower() in {".pt", ".pth"} and path.is_file():
            return _names_in(str(path.resolve()), path.stat().st_mtime_ns)
    return frozenset()


@lru_cache(maxsize=16)
def _names_in(path: str, changed: int) -> frozenset[str]:
    from ultralytics import YOLO

    try:
        return frozenset(str(name).lower() for name in YOLO(path).names.values())
    except Exception:  # of the many kinds that a damaged file leads to: Ultralytics itself will say what is wrong
        return frozenset()


def factor_for(lr: float, new: bool) -> float:
    """What head_lr_factor=auto stands for: a new head gets HEAD, or lr if that is more; a trained one gets lr.

    Args:
        lr: Learning rate of the rest.
        new: Whether the head is new.
    """
    return round(max(1.0, HEAD / lr), 4) if new and lr > 0 else 1.0


def is_new(head: Any) -> bool:
    """Whether a head of Ultralytics has initial biases somewhere: its class scores, where the classes have changed.

    To the precision of float16, in which weights are saved. Heads without a `bias_init` (classification, RT-DETR) count
    as trained.
    """
    import torch

    if not callable(getattr(head, "bias_init", None)):
        return False
    initial = deepcopy(head)
    with torch.no_grad():
        for p in initial.parameters():
            p.fill_(math.nan)
        initial.bias_init()  # writes the biases of the last layers, by the stride and the number of classes
        for p, own in zip(initial.parameters(), head.parameters()):
            written = ~p.isnan()
            if written.any() and torch.allclose(p[written].float(), own[written].float(), rtol=1e-3):
                return True
    return False

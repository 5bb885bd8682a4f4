"""Which shipped preset a run gets when its user names none: by its start and its number of optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yolo_sophia.integration.measure import count_images

SCRATCH, SHORT, LONG = "detect-scratch", "detect-short", "detect-finetune"
CANDIDATES = (SCRATCH, SHORT, LONG)

FEWER_STEPS = 1000
"""Optimizer steps below which a fine-tuning gets the preset for short ones."""


def choose_preset(from_weights: bool, steps: int | None) -> tuple[str, str]:
    """Name of a shipped preset, and the reason in words.

    Args:
        from_weights: Whether the run starts from trained weights.
        steps: Its optimizer steps; None where they are unknown, as under `time=`.
    """
    length = "of unknown length" if steps is None else f"of {steps} steps"
    if not from_weights:
        return SCRATCH, f"chosen for a training from scratch {length}"
    is_short = steps is not None and steps < FEWER_STEPS
    return SHORT if is_short else LONG, f"chosen for a fine-tuning {length}"


def optimizer_steps(arguments: Mapping[str, Any]) -> int | None:
    """Optimizer steps of a run that has not begun, as Ultralytics counts its `iterations`; None where unknown.

    They are unknown where the images are absent, or the length is given in hours.
    """
    from ultralytics.utils import DEFAULT_CFG_DICT

    arguments = {**DEFAULT_CFG_DICT, **arguments}
    if arguments["time"] or not isinstance(arguments["data"], (str, Path)):
        return None
    try:
        images = count_images(arguments["data"])
    except ValueError:  # Ultralytics itself reports what is wrong with the file
        return None
    # AutoBatch (batch=-1 or a fraction) decides later; with nbs above it, as by default, it makes no difference.
    batch, fraction = arguments["batch"], arguments["fraction"]
    step = max(batch if isinstance(batch, int) else 0, arguments["nbs"], 1)  # Ultralytics 8.3 accepts nbs=0
    part = fraction[0] if isinstance(fraction, list) else fraction  # a list is for train, val and test
    images = min(images, part) if isinstance(part, int) else images * part
    return math.ceil(images / min(step, math.ceil(images))) * arguments["epochs"] if images else None

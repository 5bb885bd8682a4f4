"""Which preset a run gets when its user names none.

The rule: by what is known before the run starts, what it starts from and how many optimizer steps it has; the choice is
said, recorded, and never made twice for one run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from yolo_sophia.integration.measure import count_images

SHORT = 1000
"""Optimizer steps below which a fine-tuning gets the preset for short ones."""


def choose_preset(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Name of a shipped preset, and why it was chosen, in words.

    Args:
        arguments: Arguments of the run; Ultralytics' defaults stand for those that are not there.
    """
    steps = optimizer_steps(arguments)
    length = "of unknown length" if steps is None else f"of {steps} steps"
    start = "a fine-tuning" if has_weights(arguments) else "a training from scratch"
    if not has_weights(arguments):
        name = "detect-scratch"
    else:
        name = "detect-short" if steps is not None and steps < SHORT else "detect-finetune"
    return name, f"chosen for {start} {length}"


def has_weights(arguments: Mapping[str, Any]) -> bool:
    """Whether the run starts from trained weights: a checkpoint as its model, or as `pretrained`."""
    pretrained = arguments.get("pretrained")
    given = [str(arguments.get("model") or ""), pretrained if isinstance(pretrained, str) else ""]
    return any(name.lower().endswith((".pt", ".pth")) for name in given)


def optimizer_steps(arguments: Mapping[str, Any]) -> int | None:
    """Optimizer steps of the run, as Ultralytics counts its `iterations`; None where they are not known yet.

    They are not where the images are not there yet, or the length is given in hours.
    """
    from ultralytics.utils import DEFAULT_CFG_DICT

    arguments = {**DEFAULT_CFG_DICT, **arguments}
    if arguments["time"] or not isinstance(arguments["data"], str):
        return None
    try:
        images = count_images(arguments["data"])
    except ValueError:  # Ultralytics itself will say what is wrong with it
        return None
    # AutoBatch (batch=-1 or a fraction) decides later; with nbs above it, as by default, it makes no difference.
    batch, fraction = arguments["batch"], arguments["fraction"]
    step = max(batch if isinstance(batch, int) else 0, arguments["nbs"], 1)  # Ultralytics 8.3 lets nbs=0 through
    part = fraction[0] if isinstance(fraction, list) else fraction  # a list is for train, val and test
    images = min(images, part) if isinstance(part, int) else images * part
    return math.ceil(images / min(step, math.ceil(images))) * arguments["epochs"] if images else None

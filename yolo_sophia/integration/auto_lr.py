"""Learning rates that follow from the run: `lr0: auto` in a preset, and head_lr_factor=auto.

Figures: docs/studies/2026-11-28-head.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from copy import deepcopy

import torch
from torch import nn

HEAD = 0.0025
"""Learning rate of a new head."""

KNOWN = 0.00012
"""Learning rate of weights that know the classes, except for a new head."""

CLASSES = 10
"""Number of classes that is assumed where it is unknown, as by Ultralytics."""


def rate_for(names: Collection[str], weight_names: Collection[str], single_cls: bool = False) -> tuple[float, str]:
    """The number for `lr0: auto`, and the reason in words: KNOWN, or .01 / (4 + classes).

    The weights know the classes if half of the names or more are among their own. The other form is that of
    Ultralytics' `optimizer=auto`, .002 * 5 / (4 + classes).

    Args:
        names: Class names of the data.
        weight_names: Class names of the weights, in lower case.
        single_cls: Whether all classes are trained as one.
    """
    known = sum(str(name).lower() in weight_names for name in names)
    if known and 2 * known >= len(names):
        return KNOWN, f"as the weights know {known} of {len(names)} classes"
    count = 1 if single_cls else len(names)
    shown = f"{count or 'an unknown number of'} new class{'es' * (count != 1)}"
    return round(0.01 / (4 + (count or CLASSES)), 6), f"for {shown}"


def factor_for(lr: float, new: bool) -> float:
    """The number for head_lr_factor=auto: a new head gets HEAD, or lr if that is more; a trained one gets lr.

    Args:
        lr: Learning rate of the other layers.
        new: Whether the head is new.
    """
    return round(max(1.0, HEAD / lr), 4) if new and lr > 0 else 1.0


def is_new(head: nn.Module | None) -> bool:
    """Whether a head of Ultralytics has initial biases somewhere: its class scores, where the classes have changed.

    The comparison has the precision of float16, in which weights are saved. Heads without a `bias_init`
    (classification, RT-DETR) count as trained.
    """
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

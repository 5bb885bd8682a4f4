"""Learning rates that follow from the run: `lr0: auto` in a preset, and `new: auto` in lr_factors.

Figures: docs/studies/2026-11-28-head.
"""

from __future__ import annotations

from collections.abc import Collection

NEW_RATE = 0.0025
"""Learning rate of what did not come from the weights."""

KNOWN = 0.00012
"""Learning rate of weights that know the classes, except for what is new."""

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


def factor_for(lr: float) -> float:
    """The number for `new: auto` in lr_factors: what is new gets NEW_RATE, or lr if that is more.

    Args:
        lr: Learning rate of what is not new.
    """
    return round(max(1.0, NEW_RATE / lr), 4) if lr > 0 else 1.0

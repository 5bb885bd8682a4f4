"""Learning rates that follow from the run: `lr0: auto` in a preset, and `new: auto` in lr_factors.

`lr0: auto` is measured: a run starts from a low rate, and `measured_lr.py` decides from how far the localization loss
has fallen. Figures: docs/studies/2026-12-01-rates.
"""

from __future__ import annotations

import math

MEASURED = "until measured"
"""Source of a learning rate that the run starts from and that it replaces by what it measures."""

START = 0.0002
"""Learning rate of a run until its own is known."""

START_STEPS = 40
"""Steps at `START` before the decision; a step at a part of it, as in the warm-up, counts as that part."""

NEAR, FAR = 0.00008, 0.0013
"""Learning rates for data that the weights know, and for data that they do not know."""

NEAR_RATIO, FAR_RATIO = 0.905, 0.87
"""Localization loss at the decision over that at the start: from `NEAR_RATIO` up the rate is `NEAR`, from `FAR_RATIO`
down it is `FAR`, and between them it is interpolated."""

FEWEST_STEPS = 120
"""Optimizer steps below which a run is too short to measure first."""

NEW_RATE = 0.01
"""Learning rate of what did not come from the weights."""

CLASSES = 10
"""Number of classes that is assumed where it is unknown, as by Ultralytics."""


def can_measure(steps: int | None) -> bool:
    """Whether a run of so many optimizer steps measures its learning rate; None stands for an unknown number."""
    return steps is None or steps >= FEWEST_STEPS


def rate_of(ratio: float) -> float:
    """The learning rate for a run.

    Args:
        ratio: Localization loss at the decision over that at the start.
    """
    share = (NEAR_RATIO - ratio) / (NEAR_RATIO - FAR_RATIO)
    rate = NEAR * math.pow(FAR / NEAR, min(max(share, 0.0), 1.0))
    return float(f"{rate:.3g}")


def ultralytics_rate(classes: int) -> float:
    """The rate of Ultralytics' `optimizer=auto`, .002 * 5 / (4 + classes): for runs that cannot measure.

    Args:
        classes: Number of classes that are trained; 0 where it is unknown.
    """
    return round(0.002 * 5 / (4 + (classes or CLASSES)), 6)


def factor_for(lr: float) -> float:
    """The number for `new: auto` in lr_factors: what is new gets NEW_RATE, or lr if that is more.

    Args:
        lr: Learning rate of what is not new.
    """
    return round(max(1.0, NEW_RATE / lr), 4) if lr > 0 else 1.0

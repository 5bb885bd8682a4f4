"""From an Ultralytics criterion to loss terms: which outputs it scores, with which coefficients.

`tap_for` picks the tap of a model's criterion. One that is not known here is no error: `UnknownTap` stands in for it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from yolo_sophia.integration.criteria.detect import DetectionTap
from yolo_sophia.integration.criteria.model import ClassificationTap, DistillationTap, UnknownTap
from yolo_sophia.integration.criteria.obb import RotatedTap
from yolo_sophia.integration.criteria.pose import PoseTap
from yolo_sophia.integration.criteria.recorder import Joint, Tap
from yolo_sophia.integration.criteria.segment import SegmentationTap

__all__ = ["DetectionTap", "Tap", "UnknownTap", "tap_for"]

# By name: not every supported version has all of them.
_KNOWN: dict[str, type[Tap]] = {
    "v8DetectionLoss": DetectionTap,
    "v8OBBLoss": RotatedTap,
    "v8SegmentationLoss": SegmentationTap,
    "SegmentLoss26": SegmentationTap,
    "v8PoseLoss": PoseTap,
    "PoseLoss26": PoseTap,
}
_TWO_HEADS = ("E2EDetectLoss", "E2ELoss")


def tap_for(model: nn.Module, criterion: Any) -> Tap:
    """The tap of a model's loss.

    Args:
        model: The model, bare.
        criterion: Its criterion; None where the model makes it at its first call.

    Raises:
        RuntimeError: The criterion is known, but Ultralytics changed its form.
    """
    student = getattr(model, "student_model", None)
    if student is not None:
        inner = tap_for(student, criterion)
        return Joint(criterion, [(inner, lambda: 1.0), (DistillationTap(criterion, model), lambda: 1.0)])
    if _name(criterion) == "v8ClassificationLoss":
        return ClassificationTap(criterion, model)
    return _tap_on(criterion) or UnknownTap(criterion, model)


def _tap_on(criterion: Any) -> Tap | None:
    """The tap that needs the criterion alone, or None where it is not known."""
    name = _name(criterion)
    if name in _TWO_HEADS:
        many, one = _tap_on(criterion.one2many), _tap_on(criterion.one2one)
        if many is None or one is None:
            return None
        # The weights of E2ELoss move from one head to the other over the epochs; E2EDetectLoss has none.
        weights = (lambda: getattr(criterion, "o2m", 1.0)), (lambda: getattr(criterion, "o2o", 1.0))
        return Joint(criterion, [*zip((many, one), weights)])
    return _KNOWN[name](criterion) if name in _KNOWN else None


def _name(criterion: Any) -> str:
    """Name of one of Ultralytics' criteria; a subclass from elsewhere may compute anything."""
    kind = type(criterion)
    return kind.__name__ if kind.__module__ == "ultralytics.utils.loss" else ""

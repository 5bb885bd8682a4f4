"""From an Ultralytics criterion to loss terms: which outputs it scores, with which coefficients.

`recorder_for` selects the recorder of a model's criterion. `SignedGradientRecorder` handles every criterion that is not
known here.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from yolo_sophia.integration.criteria.detect import DetectionRecorder
from yolo_sophia.integration.criteria.model import ClassificationRecorder, DistillationRecorder, SignedGradientRecorder
from yolo_sophia.integration.criteria.obb import OBBRecorder
from yolo_sophia.integration.criteria.pose import PoseRecorder
from yolo_sophia.integration.criteria.recorder import CompositeRecorder, Recorder
from yolo_sophia.integration.criteria.segment import SegmentationRecorder

__all__ = ["DetectionRecorder", "Recorder", "SignedGradientRecorder", "recorder_for"]

# By name: not every supported version has all of them.
_KNOWN: dict[str, type[Recorder]] = {
    "v8DetectionLoss": DetectionRecorder,
    "v8OBBLoss": OBBRecorder,
    "v8SegmentationLoss": SegmentationRecorder,
    "SegmentLoss26": SegmentationRecorder,
    "v8PoseLoss": PoseRecorder,
    "PoseLoss26": PoseRecorder,
}
_TWO_HEADS = ("E2EDetectLoss", "E2ELoss")


def recorder_for(model: nn.Module, criterion: Any) -> Recorder:
    """The recorder of a model's loss.

    Args:
        model: The model, bare.
        criterion: Its criterion; None where the model makes it at its first call.

    Raises:
        RuntimeError: The criterion is known, but Ultralytics changed its form.
    """
    student = getattr(model, "student_model", None)
    if student is not None:
        inner = recorder_for(student, criterion)
        return CompositeRecorder(
            criterion, [(inner, lambda: 1.0), (DistillationRecorder(criterion, model), lambda: 1.0)]
        )
    if _name(criterion) == "v8ClassificationLoss":
        return ClassificationRecorder(criterion, model)
    return _from_criterion(criterion) or SignedGradientRecorder(criterion, model)


def _from_criterion(criterion: Any) -> Recorder | None:
    """The recorder that needs the criterion alone, or None where it is not known."""
    name = _name(criterion)
    if name in _TWO_HEADS:
        many, one = _from_criterion(criterion.one2many), _from_criterion(criterion.one2one)
        if many is None or one is None:
            return None
        # The weights of E2ELoss move from one head to the other over the epochs; E2EDetectLoss has none.
        weights = (lambda: getattr(criterion, "o2m", 1.0)), (lambda: getattr(criterion, "o2o", 1.0))
        return CompositeRecorder(criterion, [*zip((many, one), weights)])
    return _KNOWN[name](criterion) if name in _KNOWN else None


def _name(criterion: Any) -> str:
    """Name of one of Ultralytics' criteria; a subclass from elsewhere may compute anything."""
    kind = type(criterion)
    return kind.__name__ if kind.__module__ == "ultralytics.utils.loss" else ""

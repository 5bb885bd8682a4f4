"""Selects the recorder of a criterion by the callables that it has, not by the name of its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from yolo_sophia.integration.criteria.detect import DetectionRecorder
from yolo_sophia.integration.criteria.model import DistillationRecorder, FunctionalLossRecorder
from yolo_sophia.integration.criteria.obb import OBBRecorder
from yolo_sophia.integration.criteria.pose import PoseRecorder
from yolo_sophia.integration.criteria.recorder import CompositeRecorder, Recorder
from yolo_sophia.integration.criteria.segment import SegmentationRecorder

_BY_CALLABLE: dict[str, type[Recorder]] = {
    "single_mask_loss": SegmentationRecorder,
    "keypoint_loss": PoseRecorder,
    "calculate_angle_loss": OBBRecorder,
    "bbox_loss": DetectionRecorder,  # the other three have it as well
}


def recorder_for(model: nn.Module, criterion: Any) -> Recorder:
    """The recorder of a model's loss. Whether its terms are those of the loss is known after a pass.

    Args:
        model: The model, bare.
        criterion: Its criterion; None where the model makes it at its first call.

    Raises:
        RuntimeError: The form of the criterion is not known.
    """
    student = getattr(model, "student_model", None)
    if student is not None:
        inner = recorder_for(student, criterion)
        parts = inner, DistillationRecorder(criterion, model)
        return CompositeRecorder(criterion, [(part, lambda: 1.0) for part in parts])
    return _from_criterion(criterion) or FunctionalLossRecorder(criterion, model)


def _from_criterion(criterion: Any, by_design: Sequence[str] = ()) -> Recorder | None:
    """The recorder that needs the criterion alone, or None."""
    if hasattr(criterion, "one2many") and hasattr(criterion, "one2one"):
        many = _from_criterion(criterion.one2many)
        # The second head is trained on detached features: its prototypes and semantic maps have no gradient.
        one = _from_criterion(criterion.one2one, by_design=("bcedice_loss",))
        if many is None or one is None:
            return None
        # The weights of E2ELoss move from one head to the other over the epochs; E2EDetectLoss has none.
        weights = (lambda: getattr(criterion, "o2m", 1.0)), (lambda: getattr(criterion, "o2o", 1.0))
        return CompositeRecorder(criterion, [*zip((many, one), weights)])
    for name, kind in _BY_CALLABLE.items():
        if callable(getattr(criterion, name, None)):
            return kind(criterion, by_design=by_design)
    return None

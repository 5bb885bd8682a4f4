"""v8OBBLoss: the detection loss on rotated boxes (x, y, w, h, angle).

ProbIoU in place of CIoU, and since Ultralytics 8.4 sin^2 of twice the angle's error: both are functions of the five
numbers of an anchor, so they share one 5 x 5 Hessian.
"""

from __future__ import annotations

from torch import Tensor

from yolo_sophia.integration.criteria.detect import DetectionRecorder
from yolo_sophia.integration.criteria.recorder import Call


class OBBRecorder(DetectionRecorder):
    """Records a `v8OBBLoss`."""

    recorded_callables = (*DetectionRecorder.recorded_callables, "calculate_angle_loss")

    def _extra_box_loss(self, calls: dict[str, list[Call]], boxes: Tensor) -> Tensor | float:
        if not calls.get("calculate_angle_loss"):
            return 0.0
        _, targets, mask, weights, _ = self._only(calls, "calculate_angle_loss").args
        unit = weights.new_ones(len(weights), dtype=boxes.dtype)
        angle = self.criterion.calculate_angle_loss(boxes, targets, mask, unit, 1.0)
        return self.criterion.hyp.angle * angle

"""The detection loss as likelihood terms; those of the other tasks add to it.

v8DetectionLoss (ultralytics/utils/loss.py), with B images, TSS = max(sum of target scores, 1) and w_i = summed target
score of the foreground anchor i:
    class scores  sum  (cls B class_weight_k / TSS) BCE          -> Bernoulli
    DFL           sum_i (dfl B w_i / (4 TSS)) CE, four sides     -> Categorical
    or L1         sum_i (dfl B w_i / (4 TSS)) |f - t|, reg_max=1 -> Laplace (YOLO26), f as a fraction of the image
    CIoU          sum_i (box B w_i / TSS) (1 - CIoU_i)           -> Quadratic
The scale 1 of the Laplace distribution, in the unit of f, is a convention (docs/TASKS.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from yolo_sophia.curvature import Bernoulli, Laplace, LossTerm, Quadratic
from yolo_sophia.curvature.losses import distribution_focal_loss
from yolo_sophia.integration.contract import BOX_ARGUMENTS
from yolo_sophia.integration.criteria.psd_hessian import quadratic, wide
from yolo_sophia.integration.criteria.recorder import Call, Recorder

_BBOX_LOSS_ARGUMENTS = tuple(BOX_ARGUMENTS.split())


class DetectionRecorder(Recorder):
    """Records one call of a `v8DetectionLoss`, or of a loss that extends it.

    Args:
        criterion: The criterion of the model that is trained.

    Raises:
        RuntimeError: The criterion lacks what this class records, or its form is not the one that is known here.
    """

    recorded_callables = ("bce", "bbox_loss", "bbox_loss.dfl_loss")

    def __init__(self, criterion: Any, by_design: Sequence[str] = ()):
        super().__init__(criterion, by_design=by_design)
        bbox_loss = getattr(criterion, "bbox_loss", None)
        found = tuple(inspect.signature(bbox_loss.forward).parameters)[: len(_BBOX_LOSS_ARGUMENTS)] if bbox_loss else ()
        if found != _BBOX_LOSS_ARGUMENTS or not callable(getattr(criterion, "bce", None)):
            raise RuntimeError(
                f"its bbox_loss.forward takes {found}, expected {_BBOX_LOSS_ARGUMENTS}, and a callable `bce`"
            )

    @torch.no_grad()
    def _read(self, calls: dict[str, list[Call]], weight: float) -> list[LossTerm]:
        scores, target_scores = self._only(calls, "bce").args
        self.complete = False
        box = None  # before Ultralytics 8.4 there is no call without foreground
        if calls["bbox_loss"]:
            box = dict(zip(_BBOX_LOSS_ARGUMENTS, self._only(calls, "bbox_loss").args))
        total = box["target_scores_sum"] if box else target_scores.sum().clamp(min=1)
        images = scores.new_tensor(weight * scores.shape[0], dtype=wide(scores))
        per_class = getattr(self.criterion, "class_weights", None)
        cls = self.criterion.hyp.cls * images / total * (1.0 if per_class is None else per_class)
        terms: list[LossTerm] = [Bernoulli(scores, cls, target_scores)]
        if box is not None and box["fg_mask"].any():
            self.complete = True
            per_anchor = images / total * box["target_scores"].sum(-1)[box["fg_mask"]]
            terms += [*self._sides(calls, per_anchor), self._boxes(calls, box, per_anchor)]
        return terms

    def _sides(self, calls: dict[str, list[Call]], per_anchor: Tensor) -> list[LossTerm]:
        """Of the distances to the four sides, shape (N,); none without bins before Ultralytics 8.4."""
        coefficient = self.criterion.hyp.dfl / 4 * per_anchor[:, None]
        if not self.criterion.use_dfl:
            return [Laplace(one.output, coefficient, one.target) for one in self._only(calls, "bbox_loss").inner]
        logits, t = self._only(calls, "bbox_loss.dfl_loss").args  # t is clamped in place by the call
        with torch.enable_grad():
            logits = logits.view(*t.shape, -1)
        return distribution_focal_loss(logits, t, coefficient[..., None])

    def _boxes(self, calls: dict[str, list[Call]], box: dict[str, Tensor], per_anchor: Tensor) -> Quadratic:
        """Of the IoU, and of what `_extra_box_loss` adds to it."""
        mask = box["fg_mask"]
        unit = torch.ones_like(box["target_scores"][..., :1])  # w_i = 1
        rest = self._only(calls, "bbox_loss").args[len(_BBOX_LOSS_ARGUMENTS) :]
        gain = self.criterion.hyp.box or 1.0
        fixed = box["anchor_points"], box["target_bboxes"], unit, unit.new_ones(()), mask, *rest

        def loss(rows: Tensor) -> Tensor:
            boxes = box["pred_bboxes"].detach().to(rows.dtype).index_put((mask,), rows)
            distances = box["pred_dist"].detach().to(rows.dtype)
            iou = self.criterion.bbox_loss(distances, boxes, *fixed)[0]
            return (self.criterion.hyp.box * iou + self._extra_box_loss(calls, boxes)) / gain

        with torch.enable_grad():
            output = box["pred_bboxes"][mask]
        return quadratic(output, gain * per_anchor, loss)

    def _extra_box_loss(self, calls: dict[str, list[Call]], boxes: Tensor) -> Tensor | float:
        """Another loss of the decoded boxes, shape (B, A, ...), with its gain and w_i / TSS = 1."""
        return 0.0

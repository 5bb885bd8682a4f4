"""v8SegmentationLoss: the detection loss and the masks, with B images and N foreground anchors.

    masks     sum  (box B / (N H W area_i)) BCE over the pixels in the box of anchor i  -> Bernoulli
    semantic  (box B weight_bce / pixels) BCE (YOLO26)                                   -> Bernoulli
A mask's logits are coefficients times prototypes; they are recorded where the loss takes them, one tensor per image, so
the pull-back goes through both. The Dice loss beside the semantic BCE ties all pixels of an image and is no likelihood:
it is left out, and the BCE of the same logits is their curvature.
"""

from __future__ import annotations

import torch

from yolo_sophia.curvature import Bernoulli, LossTerm
from yolo_sophia.integration.criteria.detect import DetectionRecorder
from yolo_sophia.integration.criteria.psd_hessian import wide
from yolo_sophia.integration.criteria.recorder import Call


class SegmentationRecorder(DetectionRecorder):
    """Records a `v8SegmentationLoss`."""

    recorded_callables = (
        *DetectionRecorder.recorded_callables,
        "single_mask_loss",
        "bcedice_loss",
        "bcedice_loss.dice",
    )

    @torch.no_grad()
    def _read(self, calls: dict[str, list[Call]], weight: float) -> list[LossTerm]:
        from ultralytics.utils.ops import crop_mask

        terms = super()._read(calls, weight)
        gain = weight * self.criterion.hyp.box * terms[0].output.shape[0]
        masks = calls.get("single_mask_loss", [])
        anchors = sum(len(call.args[1]) for call in masks)
        for call in masks:
            _, _, _, boxes, area = call.args
            (mask,) = call.inner
            logits = mask.output
            inside = crop_mask(torch.ones_like(logits, dtype=wide(logits)), boxes)
            per_pixel = gain / (anchors * logits[0].numel() * area.to(inside.dtype))
            terms.append(Bernoulli(logits, inside * per_pixel[:, None, None], mask.target))
        for call, dice in zip(calls.get("bcedice_loss", []), calls.get("bcedice_loss.dice", [])):
            (bce,) = call.inner
            if "bcedice_loss" in self.by_design and not bce.output.requires_grad:
                continue
            per_pixel = gain * self.criterion.bcedice_loss.weight_bce / bce.output.numel()
            terms.append(Bernoulli(bce.output, bce.output.new_tensor(per_pixel, dtype=wide(bce.output)), bce.target))
            with torch.enable_grad():
                self.left_out.append(gain * self.criterion.bcedice_loss.weight_dice * dice.result)
        return terms

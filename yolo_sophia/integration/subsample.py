"""A pass over a part of a batch, for a cheaper estimate of the curvature; it has no side effect on the training.

The sampled labels alone give an estimate a relative variance of about 2 per coordinate, from 4 images as from 16, so
few images are enough: docs/benchmarks/2026-11-26-refresh.md, made by scripts/measure_refresh.py.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from yolo_sophia.curvature.batches import buffers_kept
from yolo_sophia.curvature.noise import preserved

MIN_IMAGES = 4
"""Images of the smallest part: BatchNorm normalises them by their own statistics."""


def images_in_part(images: int, fraction: float) -> int:
    """How many of a micro-batch's images give an estimate: a fraction, rounded up, but `MIN_IMAGES` if there are."""
    return min(images, max(MIN_IMAGES, math.ceil(fraction * images)))


def take_part(batch: dict[str, Any], images: int, overlap_mask: bool = True, start: int = 0) -> dict[str, Any]:
    """Some consecutive images of a batch of any task with their labels.

    Args:
        batch: `img`, shape (B, 3, H, W); with `batch_idx` a row of `cls`, `bboxes` and `keypoints` for each object.
        images: How many of its images.
        overlap_mask: Whether `masks` has one map for an image, and not one for an object.
        start: Index of the first of them.
    """
    stop = start + images
    count = len(batch["img"])
    objects = {"batch_idx", "cls", "bboxes", "keypoints"} if "batch_idx" in batch else set()
    if not overlap_mask:
        objects.add("masks")
    index = batch["batch_idx"].view(-1) if objects else None
    rows = ((index >= start) & (index < stop)).nonzero().view(-1) if objects else None
    part = {}
    for key, value in batch.items():
        if key in objects:
            part[key] = value[rows]
        elif isinstance(value, (Tensor, list, tuple)) and len(value) == count:
            part[key] = value[start:stop]
        else:
            part[key] = value
    if objects and start:
        part["batch_idx"] = part["batch_idx"] - start
    return part


def loss_of_part(
    model: nn.Module, batch: dict[str, Any], images: int, start: int = 0, trainable: bool = False
) -> Tensor:
    """Loss of some images as a batch of their own, in a graph of its own. The model is left as it was.

    Args:
        model: The model itself, in train mode, inside neither DistributedDataParallel nor torch.compile.
        batch: A batch on the model's device.
        images: How many of its images.
        start: Index of the first of them.
        trainable: Whether copies stand in for frozen parameters, so that all parameters have a gradient.
    """
    arguments = getattr(model, "args", None)  # a classifier has none
    part = take_part(batch, images, getattr(arguments, "overlap_mask", True), start)
    with preserved([part["img"].device]), buffers_kept(model) as state:
        if trainable:
            frozen = ((name, p) for name, p in model.named_parameters() if not p.requires_grad)
            state |= {name: p.detach().clone().requires_grad_() for name, p in frozen}
        loss, _ = functional_call(model, state, (part,))
    return loss.sum()

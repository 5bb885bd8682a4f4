"""A pass over a part of a batch, for a cheaper estimate of the curvature.

The rule: to the training it never happened. The pass runs on copies of the buffers (BatchNorm's statistics), the global
random streams are put back, and its graph is gone before the ordinary forward pass begins.

Why a part is enough: one estimate is the square of one sampled vector, so the labels alone give it a relative variance
of about 2 per coordinate, from 4 images as from 16. More images lower only what the images add to that, and cost more:
docs/benchmarks/2026-11-26-refresh.md, made by scripts/measure_refresh.py.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from yolo_sophia.curvature.noise import preserved

MIN_IMAGES = 4
"""Images of the smallest part: BatchNorm normalises them by their own statistics."""


def images_in_part(images: int, fraction: float) -> int:
    """How many of a micro-batch's images give an estimate: a fraction, rounded up, but `MIN_IMAGES` if there are."""
    return min(images, max(MIN_IMAGES, math.ceil(fraction * images)))


def take_part(batch: dict[str, Any], images: int, overlap_mask: bool = True) -> dict[str, Any]:
    """The first images of a batch of any task with their labels.

    Args:
        batch: `img`, shape (B, 3, H, W); with `batch_idx` a row of `cls`, `bboxes` and `keypoints` for each object.
        images: How many of its images.
        overlap_mask: Whether `masks` has one map for an image, and not one for an object.
    """
    count = len(batch["img"])
    objects = {"batch_idx", "cls", "bboxes", "keypoints"} if "batch_idx" in batch else set()
    if not overlap_mask:
        objects.add("masks")
    rows = batch["batch_idx"].view(-1) < images if objects else None
    part = {}
    for key, value in batch.items():
        if key in objects:
            part[key] = value[rows]
        elif isinstance(value, (Tensor, list, tuple)) and len(value) == count:
            part[key] = value[:images]
        else:
            part[key] = value
    return part


def loss_of_part(model: nn.Module, batch: dict[str, Any], images: int) -> Tensor:
    """Loss of the first images as a batch of their own, in a graph of its own; the model is left as it was.

    Args:
        model: The model itself, in train mode, inside neither DistributedDataParallel nor torch.compile.
        batch: A batch on the model's device.
        images: How many of its images.
    """
    arguments = getattr(model, "args", None)  # a classifier has none
    part = take_part(batch, images, getattr(arguments, "overlap_mask", True))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with preserved([part["img"].device]):
        loss, _ = functional_call(model, buffers, (part,))
    return loss.sum()

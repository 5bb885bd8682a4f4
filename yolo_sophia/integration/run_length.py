"""The length of a training before it begins: batches, steps and warm-up, as the installed Ultralytics counts them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

AUTO_BATCH = 16
"""Batch that AutoBatch takes without a GPU."""


@dataclass(frozen=True)
class RunLength:
    """The length of a training that is not stopped early.

    Attributes:
        batches: Batches of an epoch, on each device.
        epochs: Epochs.
        batch: Images of a batch, on all devices together.
        accumulate: Batches of an optimizer step after the warm-up.
        steps: Optimizer steps.
        warmup_batches: Batches with a learning rate below its schedule.
        warmup_steps: Optimizer steps among them.
    """

    batches: int
    epochs: int
    batch: int
    accumulate: int
    steps: int
    warmup_batches: int
    warmup_steps: int

    @property
    def total_batches(self) -> int:
        """Batches of the training, on each device."""
        return self.batches * self.epochs


def run_length(arguments: Mapping[str, Any], images: int) -> RunLength | None:
    """Count the steps of a training; None where they are decided later, under `time=` or by AutoBatch on a GPU.

    Args:
        arguments: Arguments of the training; those that are not given have Ultralytics' defaults.
        images: Its training images, after `fraction`; at least one.
    """
    from ultralytics.utils import DEFAULT_CFG_DICT

    arguments = {**DEFAULT_CFG_DICT, **arguments}
    batch, devices = batch_size(arguments), device_count(arguments)
    if arguments.get("time") or batch is None:
        return None
    own = min(max(batch // max(devices, 1), 1), images)
    samples = math.ceil(images / max(devices, 1))  # the sampler of each device repeats images to have equally many
    batches = samples // own if arguments.get("compile") and samples > own else math.ceil(samples / own)
    epochs = int(arguments["epochs"])
    warmup = warmup_batches(arguments["warmup_epochs"], epochs, batches)
    return _steps(batches, epochs, batch, arguments["nbs"], warmup)


def _steps(batches: int, epochs: int, batch: int, nbs: int, warmup: int) -> RunLength:
    """Take the steps as the loop of Ultralytics' trainer does.

    A step is taken once `accumulate` batches have passed since the last one, over the end of an epoch as well. In the
    warm-up `accumulate` rises from 1. What is left at the end is dropped.
    """
    import numpy as np

    total, capped = batches * epochs, _is_capped()
    accumulate = max(round(nbs / batch), 1)
    accumulate = min(accumulate, total) if capped else accumulate
    top = accumulate if capped else nbs / batch
    last, steps, in_warmup = -1, 0, 0
    if warmup > 0:
        indices = np.arange(min(warmup + 1, total))  # the batch after the warm-up is the first on the schedule
        ramp = np.maximum(np.interp(indices, [0, warmup], [1, top]).round().astype(int), 1).tolist()
        for index, needed in enumerate(ramp):
            if index - last >= needed:
                steps, last, in_warmup = steps + 1, index, in_warmup + (index < warmup)
        accumulate = ramp[-1]
    steps += max(total - 1 - last, 0) // accumulate
    return RunLength(batches, epochs, batch, accumulate, steps, min(warmup, total), in_warmup)


def warmup_batches(warmup_epochs: float, epochs: int, batches: int) -> int:
    """Batches of warm-up, also where a training is shorter: 0 without."""
    from ultralytics.engine.trainer import BaseTrainer

    own = getattr(BaseTrainer, "_get_warmup_iterations", None)
    if own is not None:
        return own(SimpleNamespace(args=SimpleNamespace(warmup_epochs=warmup_epochs), epochs=epochs), batches)
    return max(round(warmup_epochs * batches), 100) if warmup_epochs > 0 else 0  # an expression inside `_do_train`


def _is_capped() -> bool:
    """Whether the trainer's `accumulate` is at most the number of batches of the training."""
    from ultralytics.engine.trainer import BaseTrainer

    return "acc0" in BaseTrainer._do_train.__code__.co_varnames


def batch_size(arguments: Mapping[str, Any]) -> int | None:
    """Images of a batch on all devices together; None where AutoBatch measures a GPU."""
    batch = arguments["batch"]
    if batch >= 1:
        return int(batch)
    return None if uses_gpu(arguments) else AUTO_BATCH


def device_count(arguments: Mapping[str, Any]) -> int:
    """Devices that `device=` names: 0 for the processor."""
    device = arguments.get("device")
    listed = device if isinstance(device, (list, tuple)) else str(device or "").strip("[]()").split(",")
    names = [name for name in (str(one).strip().lower() for one in listed) if name]
    if names and names[0] in {"cpu", "mps", "none"}:
        return 0
    return len(names) if names else int(uses_gpu(arguments))


def uses_gpu(arguments: Mapping[str, Any]) -> bool:
    """Whether the training will run on a GPU of this machine."""
    import torch

    return torch.cuda.is_available() and str(arguments.get("device")).lower() not in {"cpu", "mps"}


def images_used(images: int, fraction: Any, split: str = "train") -> int:
    """Images of a split that `fraction` leaves."""
    if isinstance(fraction, (list, tuple)):  # for train, val and test
        place = ("train", "val", "test").index(split)
        fraction = fraction[place] if place < len(fraction) else 1.0
    elif split != "train":
        fraction = 1.0
    if isinstance(fraction, int) and fraction > 1:
        return min(images, fraction)
    return min(images, max(1, round(images * fraction)))

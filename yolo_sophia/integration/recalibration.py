"""BatchNorm statistics recalibrated on training images before each validation.

Running statistics lag behind an optimizer that moves far between two validations, so that validation measures a model
that no longer exists. Only the EMA is changed, which Ultralytics validates and saves.
"""

from __future__ import annotations

import random
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

IMAGES = 256
"""Images to average over; a statistic over 256 images and all positions is stable to a few per mille."""


def recalibrate_before_validation(trainer: Any) -> None:
    """Callback for `on_train_start`: recalibrate the EMA's statistics before each validation of this trainer."""
    # The images that are trained on (`fraction`), spread over all of them. Ultralytics' own loader for validation would
    # sort them by aspect ratio, take them all, and keep its processes and a second cache.
    dataset = copy(trainer.train_loader.dataset)
    dataset.augment = dataset.rect = False
    dataset.transforms = dataset.build_transforms(copy(trainer.args))
    count = min(IMAGES, len(dataset))
    loader = DataLoader(
        Subset(dataset, [i * len(dataset) // count for i in range(count)]),
        batch_size=trainer.batch_size,
        num_workers=trainer.args.workers,
        collate_fn=dataset.collate_fn,
        generator=torch.Generator(),  # else each pass draws from torch's global one
    )
    original = trainer.validate

    def validate() -> Any:
        state = random.getstate()  # Format draws from it, where the loader has no processes of its own
        try:
            recalibrate(trainer.ema.ema, trainer, loader)
        finally:
            random.setstate(state)
        return original()

    trainer.validate = validate


@torch.no_grad()
def recalibrate(model: nn.Module, trainer: Any, batches: Any) -> None:
    """Replace the running statistics of all BatchNorm layers by their plain mean over the batches.

    Args:
        model: The model, in eval mode before and after.
        trainer: Its device and its scaling of images to [0, 1] are used.
        batches: Ultralytics batches with `img`, uint8, shape (B, C, H, W).
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    kept = [(m.momentum, m.num_batches_tracked.clone()) for m in layers]
    for m in layers:
        m.reset_running_stats()
        m.momentum = None  # the mean over all batches
        m.train()
    try:
        for batch in batches:
            model(batch["img"].to(trainer.device).float() / 255)
    finally:
        for m, (momentum, tracked) in zip(layers, kept):
            m.momentum = momentum
            m.num_batches_tracked.copy_(tracked)
            m.eval()

"""A window of gradient accumulation: the micro-batches whose losses one optimizer step sees.

An estimate is made from images of one micro-batch and staged. The step scales it to all images of the window, sums it
over the ranks and updates h with it. A step that is skipped, or gradients that are cleared, discard it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from yolo_sophia.integration.skipping import is_finite


class Window:
    """The micro-batches accumulated for the next step, and the estimate that is staged for it.

    Attributes:
        batches: Images of each micro-batch.
        staged: One estimate per parameter, None for a frozen one. None if nothing is staged.
        staged_images: Images that the estimate was made from.
        largest_batch: Images of the largest micro-batch of all windows so far.
    """

    def __init__(self):
        self.largest_batch = 0
        self.restart()

    def restart(self) -> None:
        """Begin the next window. A staged estimate is discarded."""
        self.batches: list[int] = []
        self.discard()

    def add(self, images: int) -> None:
        """Count a micro-batch."""
        self.batches.append(images)
        self.largest_batch = max(self.largest_batch, images)

    def stage(self, estimates: list[Tensor | None], images: int) -> None:
        """Keep an estimate for the step, in place of an earlier one.

        Args:
            estimates: One tensor per parameter, None for a frozen one.
            images: Images that it was made from.
        """
        self.staged: list[Tensor | None] | None = estimates
        self.staged_images = images

    def discard(self) -> None:
        """Discard the staged estimate."""
        self.staged, self.staged_images = None, 0

    def lacks(self, never_updated: Iterable[tuple[int, Tensor]]) -> bool:
        """Whether a trainable parameter has had no Hessian update, and has no staged estimate.

        Args:
            never_updated: The parameters whose h has never been updated, with their places among the estimates.
        """
        return any(p.requires_grad and (self.staged is None or self.staged[i] is None) for i, p in never_updated)

    def scale(self, exponent: int = 1, known: bool = True) -> bool | None:
        """Sum the staged estimate over the ranks and scale it from its images to those of the window, in place.

        Args:
            exponent: e in the growth of an estimate with the number of images n, as n ** e: -1, 0 or 1.
            known: Whether this rank knows the form of the loss.

        Returns:
            Whether the form of the loss is known; None where the ranks differ.
        """
        estimates = [e for e in self.staged if e is not None]
        factor, known = reduce_over_ranks(estimates, self.batches, self.staged_images, exponent, known)
        if factor != 1:
            torch._foreach_mul_(estimates, factor)
        return known

    def is_finite(self) -> bool:
        """Whether the staged estimate is finite. Waits for the device."""
        return is_finite([e for e in self.staged if e is not None])


def reduce_over_ranks(
    estimates: list[Tensor], window_batches: list[int], staged_images: int, exponent: int, known: bool
) -> tuple[float, bool | None]:
    """Sum estimates over the ranks, in place, and return the factor from the estimated images to the window's.

    Ultralytics multiplies the loss by the number of ranks and DDP averages the gradients, so the objective is the sum
    over ranks, and squares of the ranks' own pull-backs add up. A value that is not finite on one rank is on all.

    Args:
        estimates: Per-parameter estimates of this rank, any shapes.
        window_batches: Images of each micro-batch accumulated for the step on this rank.
        staged_images: Images that the estimates were made from on this rank.
        exponent: e in the growth of an estimate with the number of images n, as n ** e: -1, 0 or 1.
        known: Whether this rank knows the form of the loss.

    Returns:
        The factor, and whether the form of the loss is known: None where the ranks differ.
    """
    ranks, exponents = 1, (-1, 0, 1)
    window = [sum(float(n) ** e for n in window_batches) for e in exponents]
    staged = [float(staged_images) ** e for e in exponents]
    counts = torch.tensor([*window, *staged, exponent, known], dtype=torch.float64)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        flat = torch.cat([e.reshape(-1) for e in estimates])
        dist.all_reduce(flat)
        for e, part in zip(estimates, flat.split([e.numel() for e in estimates])):
            e.copy_(part.view_as(e))
        counts = counts.to(flat.device, torch.float32)
        dist.all_reduce(counts)
        ranks = dist.get_world_size()
    *sums, exponent_sum, votes = counts.tolist()
    place = exponents.index(round(exponent_sum / ranks))
    return sums[place] / sums[place + 3], None if 0 < votes < ranks else votes > 0

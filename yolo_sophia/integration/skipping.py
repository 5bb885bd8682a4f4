"""Steps of a trainer whose gradient is finite; the others are skipped and counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from ultralytics.utils import LOGGER

from yolo_sophia.optim._base import SophiaBase
from yolo_sophia.optim._schedule import is_report_due


class Skipping:
    """What a GradScaler does, also where it is disabled: Inf would stay in m, and Sophia's clip would hide it."""

    def __init__(self, optimizer: SophiaBase):
        self._optimizer = optimizer
        self._skipped = self._on_device = 0

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Take a step if the gradient is finite. The device is not waited for where it skips the step by itself.

        Args:
            scaler: The trainer's scaler; the gradients are unscaled.
        """
        optimizer = self._optimizer
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if scaler.is_enabled():
            scaler.step(optimizer)
        elif grads and optimizer._step_supports_amp_scaling:
            optimizer.found_inf = found_inf(grads)
            scaler.step(optimizer)
            del optimizer.found_inf
            self._report(optimizer.step_was_skipped)
        elif is_finite(grads):
            scaler.step(optimizer)
        else:
            self._report(1)

    def count(self, scaler: torch.amp.GradScaler) -> None:
        """Count the steps that the device has skipped, and report them where no scaler causes them. Waits for it."""
        self._optimizer.count_skipped_steps()
        new = self._optimizer.skipped_steps - self._on_device
        self._on_device += new
        if not scaler.is_enabled():
            self._report(new)

    def _report(self, steps: int) -> None:
        for _ in range(steps):
            self._skipped += 1
            name = type(self._optimizer).__name__
            warn_of(self._skipped, f"{name}: skipped a step, for the gradient is not finite")


def warn_of(count: int, event: str) -> None:
    """Log an event that may come at every step."""
    if is_report_due(count):
        LOGGER.warning(f"{event} ({count} so far)")


def is_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are finite, such as those of a gradient. Waits for the device."""
    # The sum of squares is ten times as fast as the largest entry, but overflows from 2e19 on.
    orders = (2, torch.inf)
    return not tensors or any(torch.stack(torch._foreach_norm(tensors, ord=n)).sum().isfinite() for n in orders)


def found_inf(grads: Sequence[Tensor]) -> Tensor:
    """Whether a gradient is not finite, as a GradScaler says it: a number on the device that is not 0.

    Args:
        grads: The gradient's tensors, at least one, of one device; those of a dtype are looked at in one launch.
    """
    found = torch.zeros((), device=grads[0].device)
    for dtype in {grad.dtype for grad in grads}:
        same = [grad for grad in grads if grad.dtype == dtype]
        torch._amp_foreach_non_finite_check_and_unscale_(same, found, torch.ones_like(found))
    return found

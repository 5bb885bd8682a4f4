"""One estimate of the curvature of a model, from a forward pass of its own over images of a micro-batch.

The pass has no side effect on the training (`subsample.py`), so an estimate depends on the batch and the weights alone:
not on how the trainer scales its loss, calls `backward()`, compiles the model or distributes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from yolo_sophia.curvature import Estimator, Hutchinson
from yolo_sophia.integration.binding import Binding
from yolo_sophia.integration.criteria import CriterionRecorder, measured_images_exponent
from yolo_sophia.integration.skipping import is_finite
from yolo_sophia.integration.subsample import loss_of_part

SCALES_TRIED = 4
"""Scales to try for an estimate in float16, each an eighth of the one before."""


class EstimatePass:
    """Makes estimates of the curvature of a model.

    Args:
        model: The model, inside neither DistributedDataParallel nor torch.compile.

    Attributes:
        recorder: Records the loss terms of a pass.
        unreached: Trainable parameters that no term of the last pass depends on.
    """

    def __init__(self, model: nn.Module):
        self.recorder = CriterionRecorder(model)
        self.unreached: list[Tensor] = []
        self._hutchinson = False
        self._loss_exponent: int | None = None
        self._largest_scale = math.inf

    @property
    def exponent(self) -> int:
        """Exponent e in the growth of the expected estimate with the number of images n of a pass, as n ** e."""
        if self._hutchinson:
            return 1 if self._loss_exponent is None else self._loss_exponent
        return self.recorder.estimate_exponent

    @property
    def complete(self) -> bool:
        """Whether the last pass had all terms of the loss. Without foreground, those of boxes are absent."""
        return self._hutchinson or self.recorder.complete

    def __call__(
        self,
        estimator: Estimator | Hutchinson,
        batch: dict[str, Any],
        images: int,
        parameters: list[Tensor],
        seed: int,
        scaler: Any = None,
    ) -> list[Tensor | None]:
        """Estimate from the first images of a batch.

        Args:
            estimator: What makes an estimate: from loss terms or, for Hutchinson's, from the loss itself.
            batch: A batch on the model's device.
            images: How many of its images.
            parameters: Parameters to estimate for.
            seed: Seed of the noise.
            scaler: The trainer's GradScaler, if it has one.

        Returns:
            One tensor per parameter, None for a frozen one. A loss that is not finite gives NaN, so that all ranks
            drop the estimate together.
        """
        self._hutchinson = isinstance(estimator, Hutchinson)
        if self._hutchinson and self._loss_exponent is None and images >= 2:
            self._loss_exponent = measured_images_exponent(self.recorder.model, batch, images)
        params = [p for p in parameters if p.requires_grad]
        try:
            if not self._hutchinson:
                self.recorder.start(batch, images)
            loss = loss_of_part(self.recorder.model, batch, images)
            if not loss.detach().isfinite():
                return not_finite(parameters)
            if self._hutchinson:
                found = estimator(loss, params, torch.Generator(loss.device).manual_seed(seed))
            else:
                found = self._from_terms(estimator, loss, params, seed, scaler)
        finally:
            self.recorder.stop()
        self.unreached = [p for p, estimate in zip(params, found) if estimate is None]
        # No path from the terms (without foreground: the box branch) means that the curvature is 0, not unknown.
        made = iter([torch.zeros_like(p) if e is None else e for p, e in zip(params, found)])
        return [next(made) if p.requires_grad else None for p in parameters]

    def _from_terms(
        self, estimator: Estimator, loss: Tensor, params: list[Tensor], seed: int, scaler: Any
    ) -> list[Tensor | None]:
        """Estimates from the recorded terms; in float16, at a scale at which they do not overflow.

        The sampled cotangents do not shrink as the loss is fitted, so they may overflow at the gradient's loss scale.
        """
        terms = self.recorder.terms(loss)
        if not (scaler and scaler.is_enabled()):
            return estimator(terms, params, torch.Generator(loss.device).manual_seed(seed), 1.0)
        scale = min(scaler.get_scale(), self._largest_scale)
        for attempt in range(SCALES_TRIED):
            found = estimator(terms, params, torch.Generator(loss.device).manual_seed(seed), scale)
            if is_finite([e for e in found if e is not None]):
                if attempt:
                    self._largest_scale = scale
                break
            scale /= 8
        return found


def not_finite(parameters: list[Tensor]) -> list[Tensor | None]:
    """NaN for each trainable parameter: an estimate that every rank drops."""
    return [torch.full_like(p, torch.nan) if p.requires_grad else None for p in parameters]


class LossProbe:
    """Notes whether one training pass uses the model's own loss, which the estimates are made from.

    Args:
        model: The model. A hook and a wrapper stay on it until `remove`.
    """

    def __init__(self, model: nn.Module):
        self.seen = False
        self._binding = Binding(model, "loss", self._loss)
        self._hook = model.register_forward_pre_hook(self._before_forward)

    def _loss(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        self.seen = True
        return original(*args, **kwargs)

    def _before_forward(self, _: nn.Module, args: tuple) -> None:
        self.seen |= bool(args) and isinstance(args[0], dict)

    def remove(self) -> None:
        """Take the hook and the wrapper off the model."""
        self._hook.remove()
        self._binding.release()

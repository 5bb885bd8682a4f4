"""Verifies that the recorded terms make up the loss, and falls back to signed gradients where they do not.

In the first pass with all terms, their gradient at the outputs of the model's last layer is compared with that of the
loss. The check is repeated when the criterion or one of its recorded callables is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.utils import LOGGER, RANK

from yolo_sophia.curvature import LossTerm
from yolo_sophia.curvature.autocast import no_autocast
from yolo_sophia.curvature.likelihoods import wide
from yolo_sophia.integration.criteria.model import HeadRecorder, gradient_scale, signed_terms
from yolo_sophia.integration.criteria.recorder import Recorder
from yolo_sophia.integration.criteria.selection import recorder_for
from yolo_sophia.integration.subsample import loss_of_part

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 4e-2}
"""Largest relative difference of the two gradients that counts as equal, by the dtype of the last layer's outputs."""

HALF = (torch.float16, torch.bfloat16)

MIN_SHARE = 1e-3
"""Gradients smaller than this share of the largest one are compared on its scale: they are rounding errors of it."""


class CriterionRecorder:
    """Loss terms of a model's criterion, verified in the first pass.

    Args:
        model: The model, inside neither DistributedDataParallel nor torch.compile.

    Attributes:
        known: Whether the terms are the criterion's own. Otherwise they are signed gradients of the model's outputs.
        complete: Whether the last pass gave all terms. Without foreground, those of boxes are absent.
        difference: Relative difference of the two gradients that was found in the last verification.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.known = self.complete = True
        self.difference: float | None = None
        self._recorder: Recorder | None = None
        self._head = HeadRecorder(model)
        self._identity: list[Any] = []
        self._verified = False
        self._frozen: set[str] = set()  # kinds of terms that are behind frozen parameters alone
        self._measured: int | None = None
        self._batch: dict[str, Any] | None = None
        self._images = 0
        self._line = ""

    @property
    def estimate_exponent(self) -> int:
        """E in the growth of the expected estimate with the number of images n of a pass, as n ** e.

        An estimate is linear in the coefficients of the terms. Signed gradients hold them squared: the sum over n
        images of squares of gradients that are each divided by n is of the order 1 / n.
        """
        if self.known:
            return 1 if self._recorder is None else self._recorder.images_exponent
        return 1 if self._measured is None else 2 * self._measured - 1

    def start(self, batch: dict[str, Any], images: int) -> None:
        """Record the next forward pass, and discard an earlier one.

        Args:
            batch: The batch that the pass is made on.
            images: How many of its images, from the first one on.
        """
        self.stop()
        # As BaseModel.loss does at its first call. A YOLOE with visual prompts chooses its criterion there.
        if getattr(self.model, "criterion", None) is None and batch.get("visuals") is None:
            self.model.criterion = self.model.init_criterion()
        self._select(getattr(self.model, "criterion", None))
        self._batch, self._images = batch, images
        if self.known:
            self._recorder.start()
        self._head.start()

    def _select(self, criterion: Any) -> None:
        """Select the recorder of the criterion if it, or one of its callables, is another one than before."""
        try:
            recorder = recorder_for(self.model, criterion)
        except (RuntimeError, TypeError, ValueError) as error:  # the signature of a callable cannot be read
            recorder, reason = None, str(error)
        identity = [criterion, *(recorder.callables if recorder else ())]
        if len(identity) == len(self._identity) and all(a is b for a, b in zip(identity, self._identity)):
            return
        self._identity, self._recorder = identity, recorder
        self._verified, self._measured, self._frozen = False, None, set()
        self.known = recorder is not None
        if recorder is None:
            self._report(reason)

    def stop(self) -> None:
        """Stop the recording, and discard what was recorded."""
        self._head.stop()  # wraps the loss after the recorder
        if self._recorder is not None:
            self._recorder.stop()
        self._batch = None

    def terms(self, loss: Tensor | None = None) -> list[LossTerm]:
        """Loss terms of the recorded pass, their outputs in its graph. Stops the recording.

        Args:
            loss: The loss of the pass, used where the model was trained without its `loss`.

        Raises:
            RuntimeError: A term lost its gradient, or there is neither a loss nor an output with a gradient.
        """
        batch = self._batch
        outputs, loss = self._head.outputs(loss)
        if loss is not None and not loss.requires_grad:
            self.stop()
            return []  # everything is frozen: Ultralytics' backward pass says so, as with any optimizer
        terms = self._known_terms(outputs, loss, batch) if self.known else None
        self.stop()
        if terms is not None:
            return terms
        self.complete = True
        if loss is None or not outputs:
            raise RuntimeError(
                f"{type(self.model).__name__} was trained without its `loss`, or its last layer gave no output with a "
                "gradient, so SophiaG has no curvature. Use another optimizer."
            )
        terms = signed_terms(outputs, loss)
        if self._measured is None and self._images >= 2:
            self._measured = measured_images_exponent(self.model, batch, self._images)
        return terms

    def _known_terms(self, outputs: list[Tensor], loss: Tensor | None, batch: dict[str, Any]) -> list[LossTerm] | None:
        """Terms of the recorder; None, and one line in the log, where they are not the criterion's."""
        recorder = self._recorder
        try:
            terms = recorder.terms()
        except Exception as error:
            if "out of memory" in str(error).lower():
                raise
            self.reject(f"its form is not known: {error}")
            return None
        self.complete = recorder.complete
        if not self._verified and loss is not None:
            self._verify(terms, outputs, loss, batch)
        recorder.left_out = []
        if not self.known:
            return None
        if not set(recorder.detached) <= self._frozen:
            self._check_frozen(batch)
        return terms

    def _verify(self, terms: list[LossTerm], outputs: list[Tensor], loss: Tensor, batch: dict[str, Any]) -> None:
        """Compare the gradient of the terms with that of the loss; reject the terms where they differ."""
        if any(x.dtype in HALF for x in outputs):
            # v8OBBLoss of Ultralytics 8.3.0 computes the overlap in bfloat16: its own gradient is off by up to a tenth.
            self._recorder.start()
            self._head.start()
            with no_autocast(loss.device):
                loss = loss_of_part(self.model, batch, self._images)
            outputs, loss = self._head.outputs(loss)
            terms = self._recorder.terms()
        left_out = sum(value for value in self._recorder.left_out if value.requires_grad)
        self.difference = difference(terms, outputs, loss - left_out)
        if self.difference is not None and self.difference > max(TOLERANCES.get(x.dtype, 0.0) for x in outputs):
            self.reject(f"the gradient of its terms differs from that of the loss by {self.difference:.2g}")
        self._verified = self.complete and self.difference is not None

    def _check_frozen(self, batch: dict[str, Any]) -> None:
        """Raise unless the terms without a gradient get one in a pass in which every parameter is trainable."""
        found = set(self._recorder.detached)
        self._recorder.start()
        try:
            loss_of_part(self.model, batch, self._images, trainable=True)
            self._recorder.terms()
        finally:
            self._recorder.stop()
        lost = [name for name in self._recorder.detached if name in found]
        self._recorder.left_out = []
        if lost:
            raise RuntimeError(
                f"{type(self._identity[0]).__name__}: found {', '.join(lost)} terms of the loss whose outputs have no "
                "gradient, although no parameter behind them is frozen; expected a gradient for every term. Remove the "
                "detach() or torch.no_grad() that cuts them off, or the term from the loss."
            )
        self._frozen |= found

    def reject(self, reason: str) -> None:
        """Estimate from signed gradients from now on.

        Args:
            reason: What does not fit, for the log.
        """
        if self.known:
            self.known, self.complete = False, True
            self._report(reason)

    def _report(self, reason: str) -> None:
        line = (
            f"SophiaG: the likelihood of {type(self._identity[0]).__name__} is not known here ({reason}). The "
            "curvature is estimated from signed gradients of the model's outputs (docs/TASKS.md), so tune rho"
        )
        if line != self._line and RANK in {-1, 0}:
            LOGGER.warning(line)
        self._line = line


def difference(terms: list[LossTerm], outputs: list[Tensor], loss: Tensor) -> float | None:
    """Largest relative difference between the gradient of loss terms and that of the loss, over the outputs.

    Args:
        terms: Terms in the graph of the loss. Those that depend on none of the outputs are compared at their own.
        outputs: Tensors of the graph.
        loss: The loss.

    Returns:
        The largest relative norm of the difference, or None where a gradient is not finite.
    """
    scale, points = gradient_scale(outputs), list(outputs)
    with no_autocast(loss.device):
        sums: list[Tensor | float] = [0.0 for _ in points]
        for term in terms:
            cotangent = (term.observed() * term.coefficient.sqrt() * scale).to(term.output.dtype)
            cotangent = cotangent.expand_as(term.output)
            found = torch.autograd.grad(term.output, points, cotangent, retain_graph=True, allow_unused=True)
            if all(g is None for g in found):
                points.append(term.output)
                sums.append(cotangent.to(wide(cotangent)))
            for i, g in enumerate(found):
                sums[i] = sums[i] if g is None else sums[i] + g.to(wide(g))
        expected = torch.autograd.grad(loss * scale, points, retain_graph=True, allow_unused=True)
    norms = []
    for x, found, gradient in zip(points, sums, expected):
        zero = torch.zeros_like(x, dtype=wide(x))
        a, b = zero + found, zero if gradient is None else gradient.to(zero.dtype)
        norms.append(torch.stack([(a - b).norm(), torch.maximum(a.norm(), b.norm())]).double().cpu())
    if not norms or not torch.stack(norms).isfinite().all():
        return None
    gaps, sizes = torch.stack(norms).unbind(1)
    return float((gaps / sizes.clamp(min=MIN_SHARE * float(sizes.max()))).nan_to_num(0).max())


def measured_images_exponent(model: nn.Module, batch: dict[str, Any], images: int) -> int:
    """How the loss of a model grows with the number of images n: 1 for a sum over images (n ** 1), 0 for a mean.

    The squared gradients at the last layer's outputs of a batch are compared with those of its halves: they are equal
    in sum for a sum over images, and a quarter for a mean.

    Args:
        model: The model, in train mode, inside neither DistributedDataParallel nor torch.compile.
        batch: A batch on the model's device.
        images: How many of its images to use, >= 2.
    """
    head = HeadRecorder(model)

    def squares(start: int, count: int) -> float:
        head.start()
        try:
            outputs, loss = head.outputs(loss_of_part(model, batch, count, start))
        finally:
            head.stop()
        return sum(float(term.gradient.double().square().sum()) for term in signed_terms(outputs, loss))

    half = images // 2
    halves = squares(0, half) + squares(half, images - half)
    return int(squares(0, images) > halves / 2)

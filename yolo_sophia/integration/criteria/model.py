"""Recorders of a model: a loss that is one function of PyTorch, distillation, and the head's outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from yolo_sophia.curvature import Gaussian, LossTerm, SignRandomised, sign_randomised
from yolo_sophia.curvature.losses import FUNCTIONS
from yolo_sophia.integration.criteria.psd_hessian import wide
from yolo_sophia.integration.criteria.recorder import Call, Recorder
from yolo_sophia.integration.modules import head_of


class FunctionalLossRecorder(Recorder):
    """A loss that is one call of a function in `curvature.losses.FUNCTIONS`, reduced to a mean or a sum.

    v8ClassificationLoss, the mean cross-entropy of B images, is one: (1 / B) sum CE -> Categorical.

    Args:
        criterion: The criterion.
        owner: The model, whose `loss` is recorded.
    """

    recorded_callables = ("loss",)
    images_exponent = 0

    @torch.no_grad()
    def _read(self, calls: dict[str, list[Call]], weight: float) -> list[LossTerm]:
        inner = self._only(calls, "loss").inner
        if len(inner) != 1 or inner[0].function not in FUNCTIONS:
            raise RuntimeError("no likelihood is known for its form")
        (call,) = inner
        terms_of = FUNCTIONS[call.function]
        names = set(inspect.signature(terms_of).parameters)
        self.images_exponent = int(call.options.get("reduction", "mean") == "sum")
        with torch.enable_grad():
            return terms_of(call.output, call.target, **{k: v for k, v in call.options.items() if k in names})


class DistillationRecorder(Recorder):
    """The loss between the student's and the teacher's features (nn/distill_model.py, `loss_sl2`).

    dis B sum s_p / (C sum s) (f - t)^2 over C channels and positions p, s_p the teacher's score -> Gaussian.

    Args:
        criterion: The student's criterion.
        owner: The model that holds student and teacher.
    """

    recorded_callables = ("loss_sl2",)

    @torch.no_grad()
    def _read(self, calls: dict[str, list[Call]], weight: float) -> list[LossTerm]:
        terms: list[LossTerm] = []
        for call in calls.get("loss_sl2", []):
            (squares,) = call.inner
            features = squares.output
            score = call.kwargs["teacher_scores"][call.kwargs["feat_idx"]].to(wide(features))
            images, channels = features.shape[:2]
            gain = weight * self.owner.dis * images
            terms.append(Gaussian(features, 2 * gain * score / (score.sum() * channels + 1e-9), squares.target))
        return terms


class HeadRecorder(Recorder):
    """Records the outputs of a model's last layer and the value of `model.loss`.

    The trainer of every version calls `model.loss`, with or without predictions. Its value is that of this process,
    before the trainer multiplies it by the number of processes.
    """

    recorded_callables = ("loss",)

    def __init__(self, owner: nn.Module):
        super().__init__(None, owner)
        self._hooks: list[Any] = []
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def start(self) -> None:
        """Record the loss and the last layer."""
        super().start()
        head = head_of(self.owner)
        if head is not None:
            self._hooks = [
                # Before the layer runs: that of Ultralytics 8.3 writes its outputs into the list of its inputs.
                head.register_forward_pre_hook(lambda _, args: self._inputs.extend(_tensors(args))),
                head.register_forward_hook(lambda _, args, output: self._outputs.extend(_tensors(output))),
            ]

    def stop(self) -> None:
        """Stop the recording."""
        super().stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._inputs, self._outputs = [], [], []

    def outputs(self, loss: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Outputs of the last layer that have a gradient, and the loss. Stops the recording.

        Args:
            loss: The loss of the pass, used where `model.loss` was not called exactly once.
        """
        # The features that a head returns beside its outputs are inputs of the outputs: they would count twice.
        inputs = {id(x) for x in self._inputs}
        outputs = [x for x in {id(x): x for x in self._outputs}.values() if x.requires_grad and id(x) not in inputs]
        calls = self._calls.get("loss", [])
        self.stop()
        if len(calls) == 1:
            result = calls[0].result
            loss = (result[0] if isinstance(result, (tuple, list)) else result).sum()
        return outputs, loss


def signed_terms(outputs: list[Tensor], loss: Tensor) -> list[SignRandomised]:
    """Terms of any loss: each output of the last layer, with the gradient of the loss and a random sign per element.

    This is an empirical Gauss-Newton diagonal: true labels, no cross terms between outputs. The coefficients of the
    loss are inside the gradient and cannot be separated from it, so they count squared, where a likelihood's count
    once. rho has another meaning here. See curvature/signs.py.
    """
    scale = gradient_scale(outputs)
    return sign_randomised(loss * scale, outputs, coefficient=scale**2)


def gradient_scale(outputs: list[Tensor]) -> float:
    """Factor for a loss, so that its gradients do not underflow in half precision."""
    return 1024.0 if any(x.dtype == torch.float16 for x in outputs) else 1.0


def _tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from _tensors(value)

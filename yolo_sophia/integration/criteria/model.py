"""Recorders of a model: classification, distillation, and losses that are not known here.

`model.loss` is recorded, because the trainer of every version calls it, with or without predictions. Its value is that
of this process, before the trainer multiplies it by the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from yolo_sophia.curvature import Gaussian, LossTerm, sign_randomised
from yolo_sophia.curvature.losses import cross_entropy
from yolo_sophia.integration.criteria.psd_hessian import wide
from yolo_sophia.integration.criteria.recorder import Call, Recorder


class ClassificationRecorder(Recorder):
    """v8ClassificationLoss: the mean cross-entropy of B images, (1 / B) sum CE -> Categorical.

    Args:
        criterion: The criterion.
        owner: The model.
    """

    recorded_callables = ("loss",)

    def _read(self, calls: dict[str, list[Call]], weight: float) -> list[LossTerm]:
        ((logits, labels),) = self._only(calls, "loss").inner
        return cross_entropy(logits, labels)


class DistillationRecorder(Recorder):
    """The loss that draws the student's features to the teacher's (nn/distill_model.py, `loss_sl2`).

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
            ((features, target),) = call.inner
            score = call.kwargs["teacher_scores"][call.kwargs["feat_idx"]].to(wide(features))
            images, channels = features.shape[:2]
            gain = weight * self.owner.dis * images
            terms.append(Gaussian(features, 2 * gain * score / (score.sum() * channels + 1e-9), target))
        return terms


class SignedGradientRecorder(Recorder):
    """Any loss: each output of the model's last layer, with the gradient of the loss and a random sign per element.

    This is an empirical Gauss-Newton diagonal: true labels, no cross terms between outputs. The coefficients of the
    loss are inside the gradient and cannot be told from it, so they count squared, where a likelihood's count once:
    rho means another thing here. See curvature/signs.py.

    Args:
        criterion: The criterion; None where the model makes it at its first call.
        owner: The model.
    """

    recorded_callables = ("loss",)
    known = False

    def __init__(self, criterion: Any, owner: nn.Module):
        super().__init__(criterion, owner)
        self._hooks: list[Any] = []
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def start(self) -> None:
        """Record the loss and the last layer."""
        super().start()
        head = self.owner.model[-1]
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

    def terms(self, weight: float = 1.0) -> list[LossTerm]:
        """Terms of the recorded pass; see `Recorder.terms`."""
        calls = self._calls.get("loss", [])
        # The features that a head hands on beside its outputs are inputs of theirs: they would count twice.
        inputs = {id(x) for x in self._inputs}
        outputs = [x for x in {id(x): x for x in self._outputs}.values() if x.requires_grad and id(x) not in inputs]
        self.stop()
        if not calls or not outputs:
            raise RuntimeError(
                f"{type(self.owner).__name__} was trained without its `loss`, or its last layer gave no output with a "
                "gradient, so SophiaG has no curvature. Use another optimizer."
            )
        # Half-precision gradients of an unscaled loss would underflow.
        scale = 1024.0 if any(x.dtype == torch.float16 for x in outputs) else 1.0
        return sign_randomised(calls[0].result[0].sum() * scale, outputs, coefficient=scale**2)


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

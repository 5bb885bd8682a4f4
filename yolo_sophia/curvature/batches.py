"""Estimates on batches of their own: a forward pass of a model that leaves no trace in it.

The model's buffers, its train or eval mode and every `.grad` are left unchanged. The pass runs in the mode that
the model is in. Running statistics of BatchNorm stay as they are, and of the other buffers it gets copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from yolo_sophia.curvature.hutchinson import Hutchinson, twice_differentiable


class Batches:
    """Cycles through batches; the batch of a number is the same in a resumed run.

    Args:
        data: Iterable of inputs or of (inputs, targets), such as a list or a DataLoader; a tensor is one batch of
            inputs.

    Raises:
        TypeError: It is not iterable.
    """

    def __init__(self, data: Iterable[Any]):
        self.data = [data] if isinstance(data, Tensor) else data
        if not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
            raise TypeError(
                f"Invalid input_data: found {type(data).__name__}, expected an iterable of inputs or of (inputs, "
                "targets), such as a list of batches or a DataLoader."
            )
        self._iterator: Iterator[Any] | None = None
        self._next = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the iterator out of a copy, which finds the place again."""
        return {**vars(self), "_iterator": None}

    def take(self, index: int | None = None) -> tuple[Any, Any]:
        """Inputs and targets (None without) of a batch.

        Args:
            index: Number of the batch, counted on over all rounds; None for the one after the last.

        Raises:
            ValueError: There is no batch, or the data is an iterator that ran out.
        """
        index = self._next if index is None else index
        if self._iterator is None or index != self._next:  # a resumed run: only the place within a round matters
            self._iterator, length = iter(self.data), self._length()
            self._next = index - index % length if length else 0
        while self._next <= index:
            batch = self._advance()
            self._next += 1
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        return tuple(batch) if pair else (batch, None)

    def _length(self) -> int | None:
        try:
            return len(self.data)
        except TypeError:  # an iterable without a length, or a loader of one
            return None

    def _advance(self) -> Any:
        nothing = object()
        batch = next(self._iterator, nothing)
        if batch is nothing:
            self._iterator = iter(self.data)
            batch = next(self._iterator, nothing)
        if batch is nothing:
            raise ValueError(
                f"input_data gave no batch after {self._next}. It is gone through again and again: pass a list of "
                "batches or a DataLoader, not an empty one, nor an iterator that can be used once."
            )
        return batch


class OnBatches:
    """An estimator as a function of the parameters alone, as `DecoupledSophia` calls it.

    Args:
        estimator: `Hutchinson`, or one of the estimators that take loss terms.
        model: The model whose parameters are estimated for.
        data: Iterable of inputs or of (inputs, targets), gone through again and again.
        score: From the model's output and the targets (None without) to what the estimator takes: the loss for
            `Hutchinson`, loss terms for the others (`losses.likelihood_of` makes such a function).
    """

    def __init__(
        self,
        estimator: Callable[[Any, Sequence[Tensor], Generator | None], list[Tensor | None]],
        model: nn.Module,
        data: Iterable[Any],
        score: Callable[[Any, Any], Any],
    ):
        self.estimator, self.model, self.score, self.batches = estimator, model, score, Batches(data)

    def __call__(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Estimate on the next batch; see `on`."""
        return self.on(self.batches.take(), params)

    def on(self, batch: tuple[Any, Any], params: Sequence[Tensor]) -> list[Tensor | None]:
        """Estimate on a batch of inputs and targets.

        Returns:
            Per parameter a tensor of its shape at the scale of the loss, or None where nothing depends on it.
        """
        device = next((p.device for p in params), torch.device("cpu"))
        inputs, targets = (moved(part, device) for part in batch)
        twice = twice_differentiable() if isinstance(self.estimator, Hutchinson) else nullcontext()
        with torch.enable_grad(), twice, buffers_kept(self.model) as buffers:
            output = functional_call(self.model, buffers, (inputs,))
            return self.estimator(self.score(output, targets), params, None)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep the buffers of a model as they are during a pass on the copies that this context returns, by name.

    Those of BatchNorm, hundreds, are not copied. In train mode it normalises by the batch whether it tracks running
    statistics or not, so meanwhile it does not; in eval mode it changes none.
    """
    forwards = (_BatchNorm.forward, SyncBatchNorm.forward)  # another one may do as it likes
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and getattr(m.forward, "__func__", 0) in forwards]
    own = {id(b) for m in norms for b in m.buffers(recurse=False)}
    tracking = [m for m in norms if m.training and m.track_running_stats]
    copies = {name: b.clone() for name, b in model.named_buffers() if id(b) not in own}
    try:
        for m in tracking:
            m.track_running_stats = False
        yield copies
    finally:
        for m in tracking:
            m.track_running_stats = True


def moved(part: Any, device: torch.device) -> Any:
    """Tensors, in tuples, lists and mappings too, on a device."""
    if isinstance(part, Tensor):
        return part.to(device)
    if isinstance(part, dict):
        return {key: moved(value, device) for key, value in part.items()}
    return type(part)(moved(value, device) for value in part) if type(part) in (tuple, list) else part

"""The update rule of Sophia in pieces that fit the cache: the default on CPU, which needs no compiler.

Operations in a row on whole tensors move them through main memory each time; on a piece that stays in the cache, once.
And an operation on 16 entries costs about as much as one on 4096. So tensors are cut, or gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from yolo_sophia.optim.layout import alike, buckets, flattened
from yolo_sophia.optim.reference import Rule, single_tensor_update, working_dtype

CHUNK = 262144
"""Entries of a chunk: five float32 arrays of it are 5.2 MB, a share of the L3 cache; smaller ones measured slower."""

PER_THREAD = 32768
"""Torch gives no thread less."""

SMALL = 16384
"""Tensors below this number of entries are gathered: copying them in and out costs less than seven more calls."""


def chunked_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    scales: list[float],
    rule: Rule,
) -> None:
    """Update params and exp_avgs in place, chunk by chunk; arguments as in `single_tensor_update`.

    A large tensor whose memory has gaps, or that does not lie like its gradient, is left to the reference.
    """
    size = max(CHUNK, PER_THREAD * torch.get_num_threads())
    for bucket in buckets(params, grads, exp_avgs, hessians, scales):
        chunk = _Chunk(rule, bucket.scale, working_dtype(bucket.params[0]))
        small: list[tuple[Tensor, ...]] = []
        for tensors in zip(*bucket.columns()):
            if tensors[0].numel() < SMALL:
                if tensors[0].numel():  # in PyTorch 2.4 an empty one comes back in another shape
                    small.append(tensors)
            elif alike(*tensors):
                flat = flattened(*tensors)
                for start in range(0, flat[0].numel(), size):
                    chunk.update(*(t[start : start + size] for t in flat))
            else:
                single_tensor_update(*([t] for t in tensors), [bucket.scale], rule)
        for members in _runs(small, size):
            chunk.update_gathered(*map(list, zip(*members)))


def _runs(tensors: list[tuple[Tensor, ...]], size: int) -> list[list[tuple[Tensor, ...]]]:
    """Cut a list into runs of at most `size` entries together."""
    runs, free = [], 0
    for item in tensors:
        count = item[0].numel()
        if not runs or count > free:
            runs.append([])
            free = size
        runs[-1].append(item)
        free -= count
    return runs


class _Chunk:
    """The rule for flat tensors, all of the scale given."""

    def __init__(self, rule: Rule, scale: float, dtype: torch.dtype):
        self.rule, self.dtype, self.scale = rule, dtype, scale
        # Torch makes a tensor of a number that is an operand at every call, which takes as long as a small operation.
        numbers = torch.tensor([rule.beta1, rule.eps_in(dtype), rule.shrink], dtype=dtype)
        self.beta1, self.eps, self.shrink = numbers.unbind()

    def update(self, *stored: Tensor) -> None:
        """Update p and m of (p, g, m, h) in place."""
        p, g, m, h = (t if t.dtype == self.dtype else t.to(self.dtype) for t in stored)
        self._apply(p, g, m, h)
        for kept, changed in ((stored[0], p), (stored[2], m)):
            if kept is not changed:
                kept.copy_(changed)

    def update_gathered(self, params: list[Tensor], *others: list[Tensor]) -> None:
        """Update lists of small tensors of any layout as one chunk."""
        p, g, m, h = (_flatten_dense_tensors(tensors).to(self.dtype) for tensors in (params, *others))
        self._apply(p, g, m, h)
        for kept, changed in ((params, p), (others[1], m)):
            torch._foreach_copy_(kept, _unflatten_dense_tensors(changed, kept))

    def _apply(self, p: Tensor, g: Tensor, m: Tensor, h: Tensor) -> None:
        rule = self.rule
        m.mul_(self.beta1).add_(g, alpha=rule.gain)
        if rule.root:
            update = torch.mul(h, self.scale).clamp_(min=0).sqrt_()
            update = update.clamp_(min=float(self.eps)) if rule.floor else update.add_(self.eps)
        elif rule.floor:
            update = torch.mul(h, self.scale).clamp_(min=float(self.eps))
        else:
            update = torch.add(self.eps, h, alpha=self.scale)
        torch.div(m, update, out=update).clamp_(-rule.bound, rule.bound)
        if rule.cautious:
            update.mul_(torch.sign(update * g).mul_(rule.uphill).clamp_(min=0))
        if rule.weight_decay:
            p.mul_(self.shrink)
        p.add_(update, alpha=-rule.lr)

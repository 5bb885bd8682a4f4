"""The update rule of Sophia in pieces that fit the cache: the default on CPU, which needs no compiler.

Eight operations in a row on whole tensors move them through main memory eight times; on a piece that stays in the
cache, once. And an operation on 16 entries costs about as much as one on 4096. So tensors are cut, or gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from yolo_sophia.optim.layout import alike, buckets, flattened
from yolo_sophia.optim.reference import Rule, single_tensor_update, working_dtype

CHUNK = 32768
"""Entries of a chunk per thread. Torch gives no thread less; five float32 arrays of it are about an L2 cache."""

SMALL = 8192
"""Tensors below this number of entries are gathered: copying them in and out costs less than eight more calls."""


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
    size = CHUNK * torch.get_num_threads()
    for bucket in buckets(params, grads, exp_avgs, hessians, scales):
        chunk = _Chunk(rule, bucket.scale, working_dtype(bucket.params[0]))
        small: list[tuple[Tensor, ...]] = []
        for tensors in zip(bucket.params, bucket.grads, bucket.exp_avgs, bucket.hessians):
            if tensors[0].numel() < SMALL:
                small.append(tensors)
            elif alike(*tensors):
                for piece in zip(*(t.split(size) for t in flattened(*tensors))):
                    chunk.update(*piece)
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
    """The rule for flat tensors of one dtype each, all of the scale given.

    Its numbers are tensors of the working dtype: torch turns a Python number into one at every call, for twice the
    time that the operation takes on a chunk.
    """

    def __init__(self, rule: Rule, scale: float, dtype: torch.dtype):
        self.rule, self.dtype = rule, dtype
        self.eps = rule.eps_in(dtype)
        numbers = torch.tensor([rule.beta1, scale, self.eps, rule.shrink], dtype=dtype)
        self.beta1, self.scale, self.eps_tensor, self.shrink = numbers.unbind()

    def update(self, *stored: Tensor) -> None:
        """Update p and m of (p, g, m, h) in place."""
        p, g, m, h = (t.to(self.dtype) for t in stored)  # itself where the dtype is right already
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
        update = torch.mul(h, self.scale)
        update = update.clamp_(min=self.eps) if rule.floor else update.add_(self.eps_tensor)
        torch.div(m, update, out=update).clamp_(-rule.bound, rule.bound)
        if rule.cautious:
            update.mul_(torch.sign(update * g).mul_(rule.uphill).clamp_(min=0))
        if rule.weight_decay:
            p.mul_(self.shrink)
        p.add_(update, alpha=-rule.lr)

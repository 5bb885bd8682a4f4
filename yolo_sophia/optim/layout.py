"""How the tensors of a step lie in memory: which can be treated together, which can be walked as flat arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor


@dataclass
class Bucket:
    """Tensors of one device, of the same dtypes and of one scale, as parallel lists."""

    scale: float
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    hessians: list[Tensor]

    def columns(self) -> tuple[list[Tensor], ...]:
        """The four lists."""
        return self.params, self.grads, self.exp_avgs, self.hessians

    def parted(self) -> tuple[Bucket, Bucket | None]:
        """Part what can be walked as flat arrays from the rest (None where there is none), see `alike`."""
        if all(all(map(Tensor.is_contiguous, column)) for column in self.columns()):  # nearly always
            return self, None
        flat = [alike(*tensors) for tensors in zip(*self.columns())]
        parts = flat, [not f for f in flat]
        kept, odd = (Bucket(self.scale, *(list(compress(c, part)) for c in self.columns())) for part in parts)
        return kept, odd if odd.params else None


def buckets(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    scales: list[float],
) -> Iterable[Bucket]:
    """Sort the tensors of a step by what they have to share; usually all of a parameter group are of one kind."""
    kinds = [(p.device, p.dtype, m.dtype, h.dtype, s) for p, m, h, s in zip(params, exp_avgs, hessians, scales)]
    lists = (params, grads, exp_avgs, hessians)
    if len(different := dict.fromkeys(kinds)) == 1:
        return [Bucket(scales[0], *lists)]
    return [
        Bucket(kind[-1], *([t for t, k in zip(column, kinds) if k == kind] for column in lists)) for kind in different
    ]


def alike(p: Tensor, g: Tensor, m: Tensor, h: Tensor) -> bool:
    """Whether tensors of one shape have no gaps in memory and corresponding entries at the same place."""
    if p.is_contiguous() and g.is_contiguous() and m.is_contiguous() and h.is_contiguous():
        return True
    return p.dim() == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in (p, g, m, h))


def flattened(p: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """One-dimensional views of tensors that are `alike`, in the order of memory."""
    if p.is_contiguous():
        return p.view(-1), *(t.view(-1) for t in others)
    return tuple(t.permute(0, 2, 3, 1).view(-1) for t in (p, *others))

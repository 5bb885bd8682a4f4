"""How the tensors of a step lie in memory: which can be treated together, which can be walked as flat arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Bucket:
    """Tensors of one device, of the same dtypes and of one scale, as parallel lists."""

    scale: float
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    hessians: list[Tensor] = field(default_factory=list)


def buckets(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    scales: list[float],
) -> Iterable[Bucket]:
    """Sort the tensors of a step; usually all of a parameter group are of one kind."""
    found: dict[tuple, Bucket] = {}
    for p, g, m, h, scale in zip(params, grads, exp_avgs, hessians, scales):
        key = p.device, p.dtype, m.dtype, h.dtype, scale
        if (bucket := found.get(key)) is None:
            bucket = found[key] = Bucket(scale)
        bucket.params.append(p)
        bucket.grads.append(g)
        bucket.exp_avgs.append(m)
        bucket.hessians.append(h)
    return found.values()


def alike(*tensors: Tensor) -> bool:
    """Whether tensors of one shape have no gaps in memory and corresponding entries at the same place."""
    if all(t.is_contiguous() for t in tensors):
        return True
    last = torch.channels_last
    return tensors[0].dim() == 4 and all(t.is_contiguous(memory_format=last) for t in tensors)


def flattened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """One-dimensional views of tensors that are `alike`, in the order of memory."""
    if all(t.is_contiguous() for t in tensors):
        return tuple(t.view(-1) for t in tensors)
    return tuple(t.permute(0, 2, 3, 1).view(-1) for t in tensors)

"""The average h of curvature estimates, for one tensor or many at once.

    h <- b2 h + (1 - b2) average(h_hat)

The mean is taken over the entries of a convolution kernel or of an output row, if at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

HESSIAN_AVERAGES: Mapping[str, int] = MappingProxyType({"kernel": 2, "row": 1})
"""Leading dimensions that an averaged estimate keeps; its mean is taken over the others. For a convolution's weight,
shape (out, in, height, width): "kernel" leaves one value per kernel, "row" one per output channel."""


def move_hessians(
    hessians: Sequence[Tensor],
    values: Sequence[Tensor],
    beta2: float,
    *,
    average: str | None = None,
    squared: bool = False,
    foreach: bool = False,
) -> None:
    """Move each h towards its estimate, in place.

    With `foreach`, the number of kernel launches does not depend on the number of tensors, and the estimates are copied
    once where a mean is taken.

    Args:
        hessians: h, one tensor per parameter.
        values: Estimates, or their roots, of the shapes of the hessians.
        beta2: Decay of h, in [0, 1).
        average: What the mean is taken over: a key of `HESSIAN_AVERAGES`, or None.
        squared: Whether the values are roots of the estimates.
        foreach: Use multi-tensor kernels instead of one tensor after the other.
    """
    for bucket, estimates, size in _buckets(hessians, values, average, foreach):
        torch._foreach_mul_(bucket, beta2)
        if squared and size == 1:  # no square is stored
            torch._foreach_addcmul_(bucket, estimates, estimates, value=1 - beta2)
            continue
        if squared:
            estimates = torch._foreach_mul(estimates, estimates)
        if size > 1:
            estimates = _averaged(estimates, average, size)
        torch._foreach_add_(bucket, estimates, alpha=1 - beta2)


def _buckets(
    hessians: Sequence[Tensor], values: Sequence[Tensor], average: str | None, foreach: bool
) -> Iterable[tuple[list[Tensor], list[Tensor], int]]:
    """Tensors of one device, dtypes and number of entries per mean (1: none), or (foreach=False) one by one."""
    buckets: dict[Any, tuple[list[Tensor], list[Tensor], int]] = {}
    for h, value in zip(hessians, values):
        if value.dtype != h.dtype:  # no square and no mean in half precision
            value = value.to(torch.promote_types(h.dtype, value.dtype))
        size = 1 if average is None else max(1, math.prod(h.shape[HESSIAN_AVERAGES[average] :]))
        if not foreach:
            yield [h], [value], size
            continue
        bucket = buckets.setdefault((h.device, h.dtype, value.dtype, size), ([], [], size))
        bucket[0].append(h)
        bucket[1].append(value)
    yield from buckets.values()


def _averaged(estimates: Sequence[Tensor], average: str, size: int) -> list[Tensor]:
    """The mean over every `size` entries: of one tensor in a shape that broadcasts, of several in their own shapes."""
    if len(estimates) == 1:
        (estimate,) = estimates
        return [estimate.mean(tuple(range(HESSIAN_AVERAGES[average], estimate.dim())), keepdim=True)]
    flat = torch.cat([estimate.reshape(-1, size) for estimate in estimates])
    flat.copy_(flat.mean(1, keepdim=True))
    parts = flat.split([estimate.numel() // size for estimate in estimates])
    return [part.view(estimate.shape) for part, estimate in zip(parts, estimates)]


def bias_correction_factor(group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """1 - b2^t where bias correction is on and h was updated t > 0 times, else 1."""
    updates = state["hessian_updates"]
    return 1 - group["betas"][1] ** updates if group["bias_correction"] and updates else 1.0

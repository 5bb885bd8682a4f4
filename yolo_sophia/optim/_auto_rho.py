"""rho="auto": rho is set so that a wanted fraction of the coordinates is clipped (docs/decisions/008-automatic-rho.md).

A coordinate is clipped where |m| >= rho h, so the rho that clips the fraction c is the (1 - c)-quantile of |m| / h. It
is measured after every Hessian update, with the gradient of the step already in m, and averaged in the logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from yolo_sophia.optim._step import denominator

SMOOTHING = 0.3
"""Weight of a measurement once there are many: rho remembers about three Hessian updates."""

SAMPLE = 2**16
"""Coordinates to measure on; the quantile of so many is off by under a percent of the coordinates."""

SPARSE = 2**10
"""If fewer moving coordinates are in the sample, all coordinates are looked at."""

YOUNG = 0.1
"""m is young while it lacks more than this share of its weights: 65 steps for b1 = .965."""


def smoothed(rho: float, measurements: int, quantile: float, *, young: bool = False) -> float:
    """Rho after one more measurement.

    Args:
        rho: Its value so far.
        measurements: How many made it.
        quantile: The new measurement q, > 0.
        young: Whether the momentum is young; the measurement then replaces rho.
    """
    weight = 1.0 if young else max(1 / (measurements + 1), SMOOTHING)
    return math.exp((1 - weight) * math.log(rho) + weight * math.log(quantile))


def is_young(beta1: float, age: int) -> bool:
    """Whether the momentum still grows noticeably after `age` steps."""
    return beta1**age > YOUNG


@torch.no_grad()
def clip_quantile(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    hessians: Sequence[Tensor],
    factors: Sequence[float],
    beta1: Sequence[float],
    clip_fraction: float,
    hessian_power: float = 1,
) -> float | None:
    """The rho that would clip a fraction of the coordinates in the step that is about to be taken.

    Every n-th coordinate of all tensors together is looked at; the device is waited for once, or twice where few move.

    Args:
        gradients: Gradients of the step, one tensor per parameter; negated where the objective is maximized.
        momenta: m before the step, of the same shapes.
        hessians: h, of the same shapes.
        factors: What else multiplies h in the denominator, per tensor (bs, the inverse of the bias correction).
        beta1: Decay of m, per tensor.
        clip_fraction: c, in (0, 1).
        hessian_power: 1 or 0.5, as in `denominator`.

    Returns:
        q, or None where no rho gives this fraction: nothing moves, h is positive nowhere, or a value is NaN.
    """
    tensors = list(zip(gradients, momenta, hessians, factors, beta1))
    stride = _stride(sum(g.numel() for g in gradients))
    ratio = _ratios(tensors, stride, hessian_power)
    if stride > 1 and ratio.numel() < SPARSE:
        ratio = torch.cat([_ratios([each], 1, hessian_power) for each in tensors])  # no copy of all coordinates
    if not ratio.numel() or ratio.isnan().any():
        return None
    finite = int((ratio < math.inf).sum())  # the others have no positive h
    rank = 1 + min(int((1 - clip_fraction) * ratio.numel()), int((1 - clip_fraction / 2) * finite), finite - 1)
    quantile = float(ratio.kthvalue(rank).values) if finite else math.inf
    return quantile if 0 < quantile < math.inf else None


def _ratios(tensors: Sequence[tuple[Tensor, Tensor, Tensor, float, float]], stride: int, power: float) -> Tensor:
    """|m| / h of every n-th coordinate, if it moves, on the CPU; infinite where h is not positive."""
    position, samples = 0, []
    for *states, factor, b1 in tensors:
        start = -position % stride
        position += states[0].numel()
        if start < states[0].numel():
            samples.append(([x.reshape(-1)[start::stride] for x in states], factor, b1))
    if not samples:
        return torch.empty(0)
    parts, factors, decays = zip(*samples)
    device, counts = parts[0][0].device, [part[0].numel() for part in parts]
    g, m, h = (torch.cat([x.to(device) for x in column]).float() for column in zip(*parts))
    numerator = torch.lerp(g, m, _per_coordinate(decays, counts, g)).abs()
    (divisor,) = denominator([h * _per_coordinate(factors, counts, h)], [1.0], 0.0, hessian_power=power)
    ratio = torch.where(divisor > 0, numerator / divisor, torch.inf)
    ratio = ratio.masked_fill(numerator.isnan() | divisor.isnan(), torch.nan).masked_fill(numerator == 0, -1.0)
    return ratio[ratio != -1.0].cpu()  # kthvalue is not on every device


def _per_coordinate(values: Sequence[float], counts: Sequence[int], like: Tensor) -> float | Tensor:
    """One number per tensor, repeated for its coordinates; a number where all are equal."""
    if all(value == values[0] for value in values):
        return values[0]
    return torch.tensor(values, dtype=like.dtype).repeat_interleave(torch.tensor(counts)).to(like.device)


def _stride(coordinates: int) -> int:
    """Distance of the coordinates looked at: odd, no multiple of 3, so that no place of a 3 x 3 kernel is favoured."""
    stride = max(1, coordinates // SAMPLE) | 1
    return stride + 2 if stride % 3 == 0 and stride > 1 else stride

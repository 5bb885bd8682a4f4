"""rho="auto": rho steered so that a wanted fraction of the coordinates is clipped.

A coordinate is clipped where |m| >= rho h. So the rho that clips the fraction c at this moment is the (1 - c)-quantile
of |m| / h over the coordinates; call it q. After every Hessian update, with the gradient of the step already in m:

    log rho <- log rho + a (log q - log rho),      a = max(1 / n, SMOOTHING), n the number of measurements

rho is a running average of measurements, in the logarithm since |m| / h spans decades: the mean of all at first, then
one that forgets. There is no feedback through a gain, so it cannot oscillate; between two Hessian updates rho is
constant. It makes the step invariant to the scale of the loss and of h: c means the same for every model and batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CLIP_FRACTION = 0.6
"""The fraction wanted where none is named (docs/studies)."""

SMOOTHING = 0.3
"""Weight of a measurement once there are many: rho remembers about three Hessian updates."""

SAMPLE = 2**16
"""Coordinates to measure on; the quantile of so many is off by under a percent of the coordinates."""


def steered(rho: float, measurements: int, quantile: float) -> float:
    """Rho after one more measurement.

    Args:
        rho: Its value so far.
        measurements: How many made it.
        quantile: The new measurement q, > 0.
    """
    weight = max(1 / (measurements + 1), SMOOTHING)
    return math.exp((1 - weight) * math.log(rho) + weight * math.log(quantile))


@torch.no_grad()
def clip_quantile(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    hessians: Sequence[Tensor],
    factors: Sequence[float],
    beta1: Sequence[float],
    clip_fraction: float,
    root: bool = False,
) -> float | None:
    """The rho that would clip a fraction of the coordinates in the step that is about to be taken.

    Every n-th coordinate of all tensors together is looked at; the device is waited for once.

    Args:
        gradients: Gradients of the step, one tensor per parameter.
        momenta: m before the step, of the same shapes.
        hessians: h, of the same shapes; where it is not positive, a coordinate counts as clipped.
        factors: What else multiplies h in the denominator, per tensor (bs, the inverse of the bias correction).
        beta1: Decay of m, per tensor.
        clip_fraction: c, in (0, 1).
        root: The denominator is rho sqrt(h), not rho h.

    Returns:
        q, or None where no rho gives this fraction: m is zero, or h is, for too many coordinates, or one is not finite.
    """
    stride, position, ratios = _stride(sum(g.numel() for g in gradients)), 0, []
    for g, m, h, factor, b1 in zip(gradients, momenta, hessians, factors, beta1):
        start = -position % stride
        position += g.numel()
        if start >= g.numel():
            continue
        g, m, h = (x.reshape(-1)[start::stride].float() for x in (g, m, h))
        numerator, denominator = torch.lerp(g, m, b1).abs(), h * factor
        denominator = denominator.clamp(min=0).sqrt() if root else denominator
        ratio = torch.where(denominator > 0, numerator / denominator, torch.inf)
        ratios.append(ratio.masked_fill(numerator == 0, 0.0))
    device = ratios[0].device
    ratio = torch.cat([r.to(device) for r in ratios]).cpu()  # kthvalue is not on every device
    rank = min(ratio.numel(), 1 + int((1 - clip_fraction) * ratio.numel()))
    quantile = float(torch.where(ratio.isnan().any(), torch.nan, ratio.kthvalue(rank).values))
    return quantile if 0 < quantile < math.inf else None


def _stride(coordinates: int) -> int:
    """Distance of the coordinates looked at: odd, no multiple of 3, so that no place of a 3 x 3 kernel is favoured."""
    stride = max(1, coordinates // SAMPLE) | 1
    return stride + 2 if stride % 3 == 0 and stride > 1 else stride

"""The update rule of Sophia over lists of tensors, written twice: tensor by tensor, and with multi-tensor kernels.

Both do the same arithmetic in the same order. Paper: arXiv 2305.14342, whose denominator is max(rho h, eps); the
official code's is rho h + eps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


def _representable(eps: float, dtype: torch.dtype) -> float:
    """Eps, or the smallest normal number of the dtype: in float16, 1e-15 is 0, and 0 / 0 would be NaN."""
    return max(eps, torch.finfo(dtype).tiny)


def single_tensor_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    scales: list[float],
    *,
    lr: float,
    beta1: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
    bound: float = 1.0,
    floor: bool = False,
) -> None:
    """Update params and exp_avgs in place, one tensor after the other.

    Args:
        params: Parameters theta.
        grads: Gradients g, of the shapes of params.
        exp_avgs: Momenta m.
        hessians: Curvatures h; read only.
        scales: Factor on h in the denominator per tensor: rho, times bs, over the bias correction.
        lr: Learning rate.
        beta1: Decay of m.
        weight_decay: Decoupled weight decay.
        eps: Added to the denominator, or its smallest value.
        maximize: Follow the gradient upwards.
        bound: Largest absolute entry of the update, before lr.
        floor: Take eps as the smallest value of the denominator: a negative h, as of Hutchinson's estimate, then
            gives a step of full size along the momentum.
    """
    for p, g, m, h, scale in zip(params, grads, exp_avgs, hessians, scales):
        m.mul_(beta1).add_(g, alpha=beta1 - 1 if maximize else 1 - beta1)
        update, least = torch.mul(h, scale), _representable(eps, h.dtype)
        update = update.clamp_(min=least) if floor else update.add_(least)
        torch.div(m, update, out=update).clamp_(-bound, bound)
        if weight_decay:
            p.mul_(1 - lr * weight_decay)
        p.add_(update, alpha=-lr)


def foreach_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    scales: list[float],
    *,
    lr: float,
    beta1: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
    bound: float = 1.0,
    floor: bool = False,
) -> None:
    """Update params and exp_avgs in place with multi-tensor kernels; arguments as in `single_tensor_update`."""
    buckets = Optimizer._group_tensors_by_device_and_dtype([params, grads, exp_avgs, hessians], with_indices=True)
    for (_, dtype), ((p, g, m, h), indices) in buckets.items():
        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, g, alpha=beta1 - 1 if maximize else 1 - beta1)
        update = torch._foreach_mul(h, [scales[i] for i in indices])
        (torch._foreach_clamp_min_ if floor else torch._foreach_add_)(update, _representable(eps, dtype))
        update = torch._foreach_div(m, update)
        torch._foreach_clamp_min_(update, -bound)
        torch._foreach_clamp_max_(update, bound)
        if weight_decay:
            torch._foreach_mul_(p, 1 - lr * weight_decay)
        torch._foreach_add_(p, update, alpha=-lr)

"""The update rule of Sophia, tensor by tensor: the form that every other implementation is tested against.

    m <- b1 m + (1 - b1) g
    theta <- (1 - lr wd) theta - lr clip(m / denominator(scale h), bound)

A cautious step leaves out the coordinates whose update has not the sign of the gradient (arXiv 2411.16085, without its
rescaling of the others: lr stays the bound of a coordinate's step).

Paper: arXiv 2305.14342, whose denominator is max(rho h, eps); the official code's is rho h + eps. With `root`, the
root of scale h takes the place of scale h: rho sqrt(h).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """The numbers of one step that all tensors of a parameter group share.

    Args:
        lr: Learning rate.
        beta1: Decay of m.
        weight_decay: Decoupled weight decay.
        eps: Added to the denominator, or its smallest value.
        maximize: Follow the gradient upwards.
        bound: Largest absolute entry of the update, before lr.
        floor: Take eps as the smallest value of the denominator: a negative h, as of Hutchinson's estimate, then
            gives a step of full size along the momentum.
        cautious: Move only the coordinates whose update has the sign of the gradient.
        root: Take the square root of scale h, 0 where it is negative.
    """

    lr: float
    beta1: float
    weight_decay: float
    eps: float
    maximize: bool
    bound: float = 1.0
    floor: bool = False
    cautious: bool = False
    root: bool = False

    @property
    def gain(self) -> float:
        """Weight of the gradient in the momentum; negative where the objective is maximized."""
        return self.beta1 - 1 if self.maximize else 1 - self.beta1

    @property
    def uphill(self) -> int:
        """Sign of the gradient in the momentum: -1 where the objective is maximized."""
        return -1 if self.maximize else 1

    @property
    def shrink(self) -> float:
        """What weight decay multiplies the parameters by."""
        return 1 - self.lr * self.weight_decay

    def eps_in(self, dtype: torch.dtype) -> float:
        """Eps, or the smallest normal number of the dtype: 0 / 0 would be NaN where eps rounds to 0."""
        return max(self.eps, torch.finfo(dtype).tiny)


Update = Callable[[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[float], Rule], None]
"""An implementation: changes params and exp_avgs in place. Its arguments are those of `single_tensor_update`."""


def working_dtype(p: Tensor) -> torch.dtype:
    """What the arithmetic of a step is done in: the parameter's dtype, but at least float32."""
    return torch.promote_types(p.dtype, torch.float32)


def single_tensor_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    scales: list[float],
    rule: Rule,
) -> None:
    """Update params and exp_avgs in place, one tensor after the other.

    Args:
        params: Parameters theta, of any floating dtype and memory layout.
        grads: Gradients g, of the shapes and dtypes of params.
        exp_avgs: Momenta m, of the shapes of params and of their dtype or another.
        hessians: Curvatures h, likewise; read only.
        scales: Factor on h in the denominator per tensor: rho (squared with `root`) times bs over the bias correction.
        rule: What the tensors share.
    """
    for *stored, scale in zip(params, grads, exp_avgs, hessians, scales):
        dtype = working_dtype(stored[0])
        p, g, m, h = (t.to(dtype) for t in stored)  # itself where the dtype is right already
        m.mul_(rule.beta1).add_(g, alpha=rule.gain)
        update, eps = torch.mul(h, scale), rule.eps_in(dtype)
        if rule.root:
            update.clamp_(min=0).sqrt_()
        update = update.clamp_(min=eps) if rule.floor else update.add_(eps)
        torch.div(m, update, out=update).clamp_(-rule.bound, rule.bound)
        if rule.cautious:
            update.mul_(torch.sign(update * g).mul_(rule.uphill).clamp_(min=0))
        if rule.weight_decay:
            p.mul_(rule.shrink)
        p.add_(update, alpha=-rule.lr)
        for kept, changed in ((stored[0], p), (stored[2], m)):
            if kept is not changed:
                kept.copy_(changed)

"""The update rule of Sophia with multi-tensor kernels: the default on CUDA.

A step is a fixed number of kernel launches per device and dtype and never waits for the device. One copy of the
parameters is alive meanwhile, two where it is cautious; 16-bit tensors are computed in float32, which takes a copy of
each of them as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yolo_sophia.optim.layout import buckets
from yolo_sophia.optim.reference import Rule, working_dtype


def foreach_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    scales: list[float],
    rule: Rule,
) -> None:
    """Update params and exp_avgs in place with multi-tensor kernels; arguments as in `single_tensor_update`."""
    for b in buckets(params, grads, exp_avgs, hessians, scales):
        apply_rule(b.params, b.grads, b.exp_avgs, b.hessians, b.scale, rule.shrink, rule.lr, rule)


def apply_rule(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    scale: float | Tensor,
    shrink: float | Tensor,
    lr: float | Tensor,
    rule: Rule,
) -> None:
    """Update tensors of one device and of the same dtypes; numbers that change from step to step may be tensors.

    Args:
        params: Parameters theta.
        grads: Gradients g.
        exp_avgs: Momenta m.
        hessians: Curvatures h.
        scale: Factor on h; as the next two a number or, for a compiled step, a tensor without dimensions.
        shrink: `rule.shrink`.
        lr: `rule.lr`.
        rule: Whatever else there is to know.
    """
    dtype = working_dtype(params[0])
    p, g, m, h = ([t.to(dtype) for t in tensors] for tensors in (params, grads, exp_avgs, hessians))
    torch._foreach_mul_(m, rule.beta1)
    torch._foreach_add_(m, g, alpha=rule.gain)
    update = torch._foreach_mul(h, scale)
    if rule.root:
        torch._foreach_clamp_min_(update, 0)
        torch._foreach_sqrt_(update)
    (torch._foreach_clamp_min_ if rule.floor else torch._foreach_add_)(update, rule.eps_in(dtype))
    torch._foreach_reciprocal_(update)  # m / update would be a second copy of the parameters
    torch._foreach_mul_(update, m)
    torch._foreach_clamp_min_(update, -rule.bound)
    torch._foreach_clamp_max_(update, rule.bound)
    if rule.cautious:
        mask = torch._foreach_mul(update, g)
        torch._foreach_sign_(mask)
        torch._foreach_mul_(mask, rule.uphill)
        torch._foreach_clamp_min_(mask, 0)
        torch._foreach_mul_(update, mask)
    if rule.weight_decay:
        torch._foreach_mul_(p, shrink)
    if isinstance(lr, Tensor):  # alpha must be a number
        torch._foreach_mul_(update, lr)
        torch._foreach_sub_(p, update)
    else:
        torch._foreach_add_(p, update, alpha=-lr)
    for kept, changed in ((params, p), (exp_avgs, m)):
        if kept[0] is not changed[0]:
            torch._foreach_copy_(kept, changed)

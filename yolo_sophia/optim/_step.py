"""The update rule of Sophia, once per tensor and once with multi-tensor kernels.

    m <- b1 m + (1 - b1) g
    theta <- (1 - lr wd) theta - lr clip(m / denominator(h), bound)

A cautious step omits the coordinates whose update differs in sign from the gradient (arXiv 2411.16085, without the
rescaling of the others, so that lr stays the bound of a coordinate's step). A factor of lr per row multiplies lr in
both lines. The arithmetic is in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from yolo_sophia.options import STEP_OPTIONS


@dataclass(frozen=True)
class StepOptions:
    """What all tensors of a parameter group share in a step: the group's settings, in the notation of its class.

    Args:
        bound: Largest absolute entry of the update, before lr.
        eps_is_minimum: See `denominator`.
    """

    lr: float
    beta1: float
    weight_decay: float
    eps: float
    maximize: bool
    bound: float = 1.0
    eps_is_minimum: bool = False
    cautious: bool = False
    hessian_power: float = 1

    @classmethod
    def of(cls, group: Mapping[str, Any], bound: float, eps_is_minimum: bool) -> StepOptions:
        """The settings of a parameter group."""
        own = {key: group[key] for key in ("weight_decay", "eps", "maximize", *STEP_OPTIONS)}
        return cls(float(group["lr"]), group["betas"][0], bound=bound, eps_is_minimum=eps_is_minimum, **own)


Tensors = list[Tensor]
Factors = list[Tensor | None]
Columns = tuple[Tensors, Tensors, Tensors, Tensors, Factors]
"""Parameters, gradients, momenta, curvatures, factors of lr."""
Step = Callable[[Tensors, Tensors, Tensors, Tensors, list[float], Factors, StepOptions], None]
"""An implementation: changes params and exp_avgs in place. Its arguments are those of `single_tensor_step`."""


def denominator(
    hessians: Sequence[Tensor],
    scales: Sequence[float],
    eps: float,
    *,
    eps_is_minimum: bool = False,
    hessian_power: float = 1,
) -> list[Tensor]:
    """What the momentum is divided by: (scale h)^power + eps, or max((scale h)^power, eps).

    The sum is that of the official release; the maximum is that of the paper, for estimates that can be negative.

    Args:
        hessians: Curvatures h of one device, in the dtype of the result.
        scales: Factor on h per tensor, see `hessian_scale`.
        eps: Added to the denominator, or its smallest value.
        eps_is_minimum: Whether eps is the smallest value.
        hessian_power: 1, or 0.5 for the square root of scale h (0 where h is negative).
    """
    same = len(hessians) == 1 or all(scale == scales[0] for scale in scales)
    # Not 0 where eps rounds to 0 in the dtype: 0 / 0 would be NaN.
    eps = max(eps, torch.finfo(hessians[0].dtype).tiny) if eps else 0.0
    result = torch._foreach_mul(hessians, scales[0] if same else scales)
    if hessian_power != 1:
        torch._foreach_clamp_min_(result, 0)
        torch._foreach_sqrt_(result)
    (torch._foreach_clamp_min_ if eps_is_minimum else torch._foreach_add_)(result, eps)
    return result


def hessian_scale(rho: float, hessian_power: float, factor: float = 1.0) -> float:
    """The factor on h inside the power, so that rho scales the denominator: rho h, or rho sqrt(h)."""
    return rho * factor if hessian_power == 1 else rho**2 * factor


def working_dtype(t: Tensor) -> torch.dtype:
    """What the arithmetic of a step is done in: the tensor's dtype, but at least float32."""
    return torch.promote_types(t.dtype, torch.float32)


def uses_foreach(group: Mapping[str, Any], params: Sequence[Tensor]) -> bool:
    """Whether a parameter group takes multi-tensor kernels: what `foreach` asks for, else on CUDA.

    Args:
        group: `foreach` is True, False, or None (choose by device).
        params: The parameters to update, at least one.
    """
    if group["foreach"] is not None:
        return group["foreach"]
    return all(p.is_cuda and type(p) in (Tensor, Parameter) for p in params)  # as torch.optim; not DTensor


def choose_step(group: Mapping[str, Any], params: Sequence[Tensor]) -> Step:
    """The implementation for a parameter group, see `uses_foreach`."""
    return foreach_step if uses_foreach(group, params) else single_tensor_step


def single_tensor_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    hessians: Tensors,
    scales: list[float],
    factors: Factors,
    options: StepOptions,
) -> None:
    """Update params and exp_avgs in place, one tensor after the other.

    Args:
        params: Parameters theta, of any floating dtype and memory layout.
        grads: Gradients g, of the shapes of params.
        exp_avgs: Momenta m, of the shapes of params.
        hessians: Curvatures h, likewise; read only.
        scales: Factor on h per tensor: rho to the inverse power, times bs, over the bias correction.
        factors: Factor on lr per tensor, of a shape that broadcasts to the parameter's, or None for 1.
        options: What the tensors share.
    """
    o, sign = options, -1 if options.maximize else 1
    form = {"eps_is_minimum": options.eps_is_minimum, "hessian_power": options.hessian_power}
    for kept_p, g, kept_m, h, scale, factor in zip(params, grads, exp_avgs, hessians, scales, factors):
        dtype = working_dtype(kept_p)
        p, g, m, h = (t if t.dtype == dtype else t.to(dtype) for t in (kept_p, g, kept_m, h))
        m.mul_(o.beta1).add_(g, alpha=sign * (1 - o.beta1))
        (update,) = denominator([h], [scale], o.eps, **form)
        torch.div(m, update, out=update).clamp_(-o.bound, o.bound)
        if o.cautious:
            update.mul_(torch.sign(update * g).mul_(sign).clamp_(min=0))
        decay = o.lr * o.weight_decay
        if factor is not None:
            factor = factor.to(dtype)
            update.mul_(factor)
            decay = decay * factor
        if o.weight_decay:
            p.mul_(1 - decay)
        p.add_(update, alpha=-o.lr)
        if p is not kept_p:
            kept_p.copy_(p)
        if m is not kept_m:
            kept_m.copy_(m)


def foreach_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    hessians: Tensors,
    scales: list[float],
    factors: Factors,
    options: StepOptions,
) -> None:
    """Update params and exp_avgs in place with multi-tensor kernels; arguments as in `single_tensor_step`.

    A step is a fixed number of kernel launches per device and dtype and never waits for the device; tensors with
    factors add some. One copy of the parameters is alive meanwhile, two where it is cautious; 16-bit tensors are
    copied to float32 as well.
    """
    o, sign = options, -1 if options.maximize else 1
    form = {"eps_is_minimum": options.eps_is_minimum, "hessian_power": options.hessian_power}
    for *bucket, factor, scale in _buckets(params, grads, exp_avgs, hessians, scales, factors):
        dtype = working_dtype(bucket[0][0])
        p, g, m, h, f = ([t.to(dtype) for t in tensors] for tensors in (*bucket, factor))
        torch._foreach_mul_(m, o.beta1)
        torch._foreach_add_(m, g, alpha=sign * (1 - o.beta1))
        update = denominator(h, [scale] * len(h), o.eps, **form)
        torch._foreach_reciprocal_(update)  # m / update would be a second copy of the parameters
        torch._foreach_mul_(update, m)
        torch._foreach_clamp_min_(update, -o.bound)
        torch._foreach_clamp_max_(update, o.bound)
        if o.cautious:
            mask = torch._foreach_mul(update, g)
            torch._foreach_sign_(mask)
            torch._foreach_mul_(mask, sign)
            torch._foreach_clamp_min_(mask, 0)
            torch._foreach_mul_(update, mask)
        kept_share: Any = 1 - o.lr * o.weight_decay
        if f:
            torch._foreach_mul_(update, f)
            kept_share = torch._foreach_mul(f, -o.lr * o.weight_decay)
            torch._foreach_add_(kept_share, 1)
        if o.weight_decay:
            torch._foreach_mul_(p, kept_share)
        torch._foreach_add_(p, update, alpha=-o.lr)
        for kept, changed in ((bucket[0], p), (bucket[2], m)):
            if kept[0] is not changed[0]:
                torch._foreach_copy_(kept, changed)


def _buckets(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, hessians: Tensors, scales: list[float], factors: Factors
) -> Iterable[tuple[Tensors, Tensors, Tensors, Tensors, Tensors, float]]:
    """Group the tensors of a step by device, dtypes, scale and whether they have factors; without them, [] for these.

    Usually all of a parameter group are of one kind.
    """
    columns = (params, grads, exp_avgs, hessians, factors)
    kinds = [
        (p.device, p.dtype, m.dtype, h.dtype, f is not None, s)
        for p, m, h, f, s in zip(params, exp_avgs, hessians, factors, scales)
    ]
    for kind in (different := dict.fromkeys(kinds)):
        same = len(different) == 1
        bucket = [column if same else [t for t, k in zip(column, kinds) if k == kind] for column in columns]
        yield *bucket[:-1], [f for f in bucket[-1] if f is not None], kind[-1]

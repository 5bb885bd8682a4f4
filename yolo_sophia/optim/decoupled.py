"""DecoupledSophia: Sophia over any estimator of the curvature, with the names of the Agora release.

    theta <- theta - lr clip(m / max(h, eps), rho)

Here rho is the bound of the clip, as in that release; everywhere else in this package rho multiplies h. The two rules
are one: (lr, rho, eps) here moves as (lr rho, rho, eps rho) does there, but for the weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from yolo_sophia.optim.refreshing import RefreshingSophia

HessianEstimator = Callable[[Sequence[Tensor]], Iterable[Tensor | None]]
"""Called with the trainable parameters, gradients enabled; gives one tensor of its shape, or None, for each. Global
random states are seeded for the call and given back after it."""


class DecoupledSophia(RefreshingSophia):
    """Sophia with a curvature estimator of your own.

    Args:
        params: Parameters or parameter groups, real floating-point, dense gradients.
        hessian_estimator: Called every k-th step with the list of trainable parameters; returns one tensor of the
            parameter's shape at the scale of the objective, or None (h stays), for each. `curvature.OnBatches` makes
            such functions of this package's estimators.
        lr: Learning rate, >= 0.
        betas: Decay of the momentum m per step and of the curvature h per refresh, each in [0, 1).
        eps: Smallest value of the denominator, > 0: where h is smaller, zero or negative, the step is of full size.
        weight_decay: Decoupled weight decay, >= 0; a step multiplies the parameters by 1 - lr * weight_decay.
        k: Steps per refresh, >= 1; the first step makes one.
        rho: Bound of the clip, > 0; a coordinate moves by at most lr * rho in a step (before weight decay).
        seed: Seed of the estimates' noise, >= 0.
        bias_correction: Divide h by 1 - b2^t after t refreshes, as Adam does.
        hessian_average: None, "kernel" or "row", as in `SophiaG`.
        cautious: Move only the coordinates whose update has the sign of the gradient (arXiv 2411.16085).
        foreach: Use the multi-tensor implementation, or (False) the reference; None chooses by device.
        fused: Use one compiled pass: needs a C++ compiler on CPU and Triton on CUDA.
        hessian_dtype: What h is stored in, torch.bfloat16 to save memory; None: the parameter's dtype.
        momentum_dtype: The same for m. See `optim/precision.py`.

    The state of a parameter is that of `SophiaG`. Where several processes train one model, the estimator has to give
    the same on all of them.

    Raises:
        TypeError: The estimator is not callable.
        ValueError: A hyperparameter is out of range, or a parameter is complex.
        RuntimeError: `fused` and no compiler works here.
    """

    steers = False

    def __init__(
        self,
        params,
        hessian_estimator: HessianEstimator,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        k: int = 10,
        rho: float = 1.0,
        *,
        seed: int = 0,
        bias_correction: bool = False,
        hessian_average: str | None = None,
        cautious: bool = False,
        foreach: bool | None = None,
        fused: bool = False,
        hessian_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
    ):
        if not callable(hessian_estimator):
            raise TypeError(
                f"Invalid hessian_estimator: found {type(hessian_estimator).__name__}, expected a function from the "
                "list of parameters to one estimate for each."
            )
        self.hessian_estimator = hessian_estimator
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rho": rho,
            "foreach": foreach,
            "fused": fused,
            "hessian_dtype": hessian_dtype,
            "momentum_dtype": momentum_dtype,
            "bias_correction": bias_correction,
            "hessian_average": hessian_average,
            "cautious": cautious,
        }
        super().__init__(params, defaults, k=k, seed=seed)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep the estimator; a state dict does not hold it."""
        return {**super().__getstate__(), "hessian_estimator": self.hessian_estimator}

    def _estimates(self, params: Sequence[Tensor], loss: Tensor | None) -> Iterable[Tensor | None]:
        return self.hessian_estimator(params)

    def _scale_and_bound(self, group: dict[str, Any]) -> tuple[float, float]:
        return 1.0, group["rho"]

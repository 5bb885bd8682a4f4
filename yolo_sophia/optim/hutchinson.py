"""SophiaH: Sophia with Hutchinson's estimate of the Hessian's own diagonal, for any loss (arXiv 2305.14342).

    theta <- theta - lr clip(m / max(rho h, eps), 1)

The estimate can be negative, by noise or where the loss curves down. It enters the average h as it is, so that h stays
unbiased; the maximum in the denominator then turns a negative h into a step of full size along the momentum, as the
paper has it. (An eps that is added, as in SophiaG, would turn it uphill.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from yolo_sophia.curvature import Hutchinson
from yolo_sophia.optim.refreshing import RefreshingSophia


class SophiaH(RefreshingSophia):
    """Sophia with Hutchinson's estimator.

    The loss that it differentiates twice comes from `step(closure)`, or by hand, from any training loop:

        loss = loss_function(model(inputs), targets)
        if optimizer.refresh_due:
            optimizer.refresh(loss)
        loss.backward()
        optimizer.step()

    Args:
        params: Parameters or parameter groups, real floating-point, dense gradients.
        lr: Learning rate, >= 0; the largest move of a coordinate in one step (before weight decay).
        betas: Decay of the momentum m per step and of the curvature h per refresh, each in [0, 1).
        rho: Scale of the curvature in the denominator, > 0: larger rho means fewer clipped coordinates.
            "auto" steers it to `clip_fraction`, see `optim/steering.py`.
        weight_decay: Decoupled weight decay, >= 0; a step multiplies the parameters by 1 - lr * weight_decay.
        eps: Smallest value of the denominator, > 0.
        k: Steps per refresh, >= 1; the first step makes one. None: h moves only when told to.
        probes: Hessian-vector products per estimate, >= 1.
        seed: Seed of the signs, >= 0.
        bias_correction: Divide h by 1 - b2^t after t refreshes, as Adam does.
        hessian_average: None, "kernel" or "row", as in `SophiaG`.
        cautious: Move only the coordinates whose update has the sign of the gradient (arXiv 2411.16085).
        hessian_root: Divide by rho sqrt(h) instead of rho h: steps as Adam's, with the curvature in the place of the
            squared gradients. Off in the official release.
        clip_fraction: With rho="auto", the fraction of coordinates to clip, in (0, 1), as in `SophiaG`.
        foreach: Use the multi-tensor implementation, or (False) the reference; None chooses by device.
        fused: Use one compiled pass: needs a C++ compiler on CPU and Triton on CUDA.
        hessian_dtype: What h is stored in, torch.bfloat16 to save memory; None: the parameter's dtype.
        momentum_dtype: The same for m. See `optim/precision.py`.

    The state of a parameter is that of `SophiaG`.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter is complex.
        RuntimeError: `fused` and no compiler works here.
    """

    needs_loss = True

    def __init__(
        self,
        params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float | str = 0.01,
        weight_decay: float = 1e-1,
        *,
        eps: float = 1e-12,
        k: int | None = 10,
        probes: int = 1,
        seed: int = 0,
        bias_correction: bool = False,
        hessian_average: str | None = None,
        cautious: bool = False,
        hessian_root: bool = False,
        clip_fraction: float | None = None,
        foreach: bool | None = None,
        fused: bool = False,
        hessian_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "weight_decay": weight_decay,
            "eps": eps,
            "foreach": foreach,
            "fused": fused,
            "hessian_dtype": hessian_dtype,
            "momentum_dtype": momentum_dtype,
            "probes": Hutchinson(probes).probes,
            "bias_correction": bias_correction,
            "hessian_average": hessian_average,
            "cautious": cautious,
            "hessian_root": hessian_root,
            "clip_fraction": clip_fraction,
        }
        super().__init__(params, defaults, k=k, seed=seed)

    def _estimates(self, params: Sequence[Tensor], loss: Tensor | None) -> Iterable[Tensor | None]:
        if not isinstance(loss, torch.Tensor):
            raise RuntimeError(
                "SophiaH needs the loss to refresh h, found none. Call step(closure) with a closure that returns it, "
                "refresh(loss) before its backward(), or update_hessian(estimates)."
            )
        return Hutchinson(self.param_groups[0]["probes"])(loss, params, None)

"""SophiaH: Sophia with Hutchinson's estimate of the Hessian's own diagonal, for any loss (arXiv 2305.14342).

    theta <- theta - lr clip(m / max(rho h, eps), 1)

The estimate can be negative and enters h as it is, so that h stays unbiased; where h is negative, the maximum makes the
step one of full size along the momentum (docs/decisions/017-negative-curvature.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from yolo_sophia.curvature import Hutchinson
from yolo_sophia.optim._base import shares_docs
from yolo_sophia.optim._self_estimating import SelfEstimatingSophia


@shares_docs
class SophiaH(SelfEstimatingSophia):
    """Sophia with Hutchinson's estimator.

    The loss that it differentiates twice comes from `step(closure)`, or from any training loop:

        loss = loss_function(model(inputs), targets)
        if optimizer.refresh_due:
            optimizer.refresh(loss)
        loss.backward()
        optimizer.step()

    Under DistributedDataParallel each rank estimates for its own loss, and h_hat is the mean over the ranks:
    (1 / W) sum_r v_r * (H_r v_r), an estimate of the Hessian of the mean loss.

    Args:
        {params}
        {lr}
        {betas}
        {rho}
        {weight_decay}
        eps: Smallest value of the denominator, > 0.
        {hessian_interval} None: only given estimates update h.
        n_samples: Hessian-vector products per estimate, >= 1.
        {seed}
        {options}
        {step_options}
        {auto}
        deprecated: Names of version 0.1: `k`, `probes`, `hessian_root`.

    {state}

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter is complex.
    """

    needs_loss = True
    how_to_update = "Call step(closure), or refresh(loss) where refresh_due says so, or set hessian_interval."

    def __init__(
        self,
        params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float | str = 0.01,
        weight_decay: float = 1e-1,
        *,
        eps: float = 1e-12,
        hessian_interval: int | None = 10,
        n_samples: int = 1,
        seed: int = 0,
        bias_correction: bool = False,
        hessian_average: str | None = None,
        cautious: bool = False,
        hessian_power: float = 1,
        clip_fraction: float | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        **deprecated: Any,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "weight_decay": weight_decay,
            "eps": eps,
            "foreach": foreach,
            "fused": fused,
            "n_samples": n_samples,
            "bias_correction": bias_correction,
            "hessian_average": hessian_average,
            "cautious": cautious,
            "hessian_power": hessian_power,
            "clip_fraction": clip_fraction,
        }
        super().__init__(params, defaults, hessian_interval=hessian_interval, seed=seed, deprecated=deprecated)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        Hutchinson(group["n_samples"])

    def _estimates(self, params: Sequence[Tensor], loss: Tensor | None) -> Iterable[Tensor | None]:
        if not isinstance(loss, torch.Tensor):
            raise RuntimeError(
                "SophiaH needs the loss to update h, found none. Call step(closure) with a closure that returns it, "
                "refresh(loss) before its backward(), or update_hessian(estimates)."
            )
        return Hutchinson(self.param_groups[0]["n_samples"])(loss, params, None)

"""SophiaG: Sophia with a diagonal Gauss-Newton curvature h that is given to it (arXiv 2305.14342).

The numbers equal those of the official release (`sophia-opt`) for the same calls:

    theta <- theta - lr clip(m / (rho bs h + eps), 1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from yolo_sophia.optim._base import SophiaBase, evaluated, shares_docs
from yolo_sophia.optim._state import CLASS_KEYS, MATURE


@shares_docs
class SophiaG(SophiaBase):
    """Sophia with a Gauss-Newton-Bartlett diagonal (arXiv 2305.14342, algorithm 3).

    Args:
        {params}
        {lr}
        {betas}
        {rho}
        {weight_decay}
        eps: Added to the denominator, > 0, as the official code does.
        maximize: Maximize the objective instead of minimizing it.
        {options}
        {step_options}
        {auto}
        deprecated: Names of version 0.1: `hessian_root`.

    {state}

    Checkpoints of the official release load: the first three states have its names. Settings that it does not have
    (`bias_correction`, `rho="auto"`, ...) stay as they were passed to the constructor, and its h counts as mature:
    bias correction leaves it as it is.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter is complex.
    """

    eps_is_minimum = False

    def __init__(
        self,
        params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float | str = 0.04,
        weight_decay: float = 1e-1,
        *,
        eps: float = 1e-15,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        bias_correction: bool = False,
        hessian_average: str | None = None,
        cautious: bool = False,
        hessian_power: float = 1,
        clip_fraction: float | None = None,
        **deprecated: Any,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "weight_decay": weight_decay,
            "eps": eps,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "bias_correction": bias_correction,
            "hessian_average": hessian_average,
            "cautious": cautious,
            "hessian_power": hessian_power,
            "clip_fraction": clip_fraction,
            "hessian_source": None,  # what h was made of: None (no update yet), "grad" (needs bs) or "estimates"
        }
        super().__init__(params, defaults, deprecated)

    def _validated(self, state_dict: dict) -> dict:
        """As in the base class; a state of the official release is completed with the settings of this optimizer."""
        state_dict = super()._validated(state_dict)
        if any(key in group for group in state_dict["param_groups"] for key in CLASS_KEYS):
            return state_dict
        held = {
            i: {**state, "hessian_updates": MATURE if state["hessian"].any() else 0}
            for i, state in state_dict["state"].items()
        }
        groups = []
        for own, saved in zip(self.param_groups, state_dict["param_groups"]):
            has_hessian = any(held[i]["hessian_updates"] for i in saved["params"] if i in held)
            changes = {"hessian_source": "grad" if has_hessian else None, "rho_measurements": 0, "rho_age": 0}
            changes["rho_due"] = has_hessian and own["clip_fraction"] is not None
            groups.append({**own, **saved, **changes})
        return {**state_dict, "state": held, "param_groups": groups}

    def _check_class(self, found: set[str]) -> None:
        if found:  # the official release has none
            super()._check_class(found)

    @torch.no_grad()
    def update_hessian(self, estimates: Iterable[Tensor | None] | None = None, *, reduce: bool = True) -> None:
        """Move h towards a new estimate: h <- b2 h + (1 - b2) h_hat.

        With several processes (torch.distributed), estimates are replaced by their mean over the ranks, as the base
        class does: (1 / W) sum_r h_hat_r. Without estimates, the gradients are replaced by their mean before they are
        squared, which changes nothing if DistributedDataParallel has averaged them; bs is then the number of
        predictions on all ranks. Every rank has to call it. Sharded parameters (DTensor, FSDP) are left out of the
        mean: their gradients are averaged already, and their estimates have to be made for the loss of all ranks.

        Args:
            estimates: One tensor per parameter in the order of the parameter groups, of the parameter's shape and at
                the scale of the objective that `step` sees (None skips a parameter). Without it, h_hat is the square of
                each `.grad`, to be left there by the backward pass of a mean loss with labels sampled from the
                model; every later `step` then needs `bs`, the number of predictions in that mean.
            reduce: Whether to take the mean over the ranks; False if the values are equal on all ranks already.

        Raises:
            ValueError: Number or shape of the estimates differs from the parameters'.
            RuntimeError: A second kind of estimate (their scales differ), no gradient at all, or a sparse one.
        """
        pairs = self._parameters()
        if estimates is None:
            source, values = "grad", [self._dense(p.grad, "update_hessian()") for _, p in pairs]
        else:
            source, values = "estimates", self._checked(estimates)
        values = self._reduced(values) if reduce else values
        if source == "grad" and all(g is None for g in values):
            raise RuntimeError(
                "update_hessian() found no .grad on any parameter; call it after the backward() of a loss with "
                "labels sampled from the model, or pass the estimates: update_hessian(estimates)."
            )
        for group in self.param_groups:
            if group["hessian_source"] not in {None, source}:
                raise RuntimeError(
                    f"This optimizer's h was made from {group['hessian_source']!r} and is now updated from {source!r}. "
                    "Their scales differ by bs: use one kind of update only."
                )
        for (group, _), value in zip(pairs, values):
            if value is not None:
                group["hessian_source"] = source
        self._move_hessian(values, squared=source == "grad")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, bs: float | None = None) -> Tensor | None:
        """Take one step with the gradients in `.grad`.

        Args:
            closure: Re-evaluates the model and returns the loss.
            bs: Number of predictions in the mean loss, as in the official release; multiplies h. Needed after
                `update_hessian()`, not allowed after `update_hessian(estimates)`, which has the objective's scale.

        Returns:
            What the closure returned, if one was given.

        Raises:
            ValueError: `bs` is missing, superfluous or not positive.
            RuntimeError: A gradient is sparse.
        """
        loss = evaluated(closure)
        self._check_bs(bs)  # after the closure, which may update h
        self._move_parameters(1.0 if bs is None else bs)
        return loss

    def _check_bs(self, bs: float | None) -> None:
        sources = {group["hessian_source"] for group in self.param_groups}
        if bs is None and "grad" in sources:
            raise ValueError(
                "step() needs bs, the number of predictions in the mean loss, after update_hessian() from .grad: "
                "h is the curvature divided by it. Call step(bs=...), or use update_hessian(estimates)."
            )
        if bs is not None and "estimates" in sources:
            raise ValueError("step(bs=...) after update_hessian(estimates): these have the objective's scale; drop bs.")
        if bs is not None and not bs > 0:
            raise ValueError(f"bs must be positive, found {bs}.")

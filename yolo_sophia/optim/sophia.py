"""SophiaG: sign-like momentum steps, bounded per coordinate by a diagonal Gauss-Newton curvature.

One rule is kept here: the numbers equal those of the official release (`sophia-opt`) for the same calls. Paper:
"Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training", arXiv 2305.14342. Its notation:

    m <- b1 m + (1 - b1) g                            every step
    h <- b2 h + (1 - b2) h_hat                        every k-th step, before the parameters move
    theta <- theta - lr wd theta                      decoupled decay
    theta <- theta - lr clip(m / (rho bs h + eps), 1)

The estimate h_hat comes from outside: from `.grad` of a loss with labels sampled from the model, as in the official
code, or from tensors that a curvature estimator made (`yolo_sophia.curvature`). What it shares with the rest of the
family is in `optim/base.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from yolo_sophia.optim.base import SophiaBase, evaluated


class SophiaG(SophiaBase):
    """Sophia with a Gauss-Newton-Bartlett diagonal (arXiv 2305.14342, algorithm 3).

    Args:
        params: Parameters or parameter groups, real floating-point, dense gradients.
        lr: Learning rate, >= 0; the largest move of a coordinate in one step (before weight decay).
        betas: Decay of the momentum m per step and of the curvature h per Hessian update, each in [0, 1).
        rho: Scale of the curvature in the denominator, > 0: larger rho means fewer clipped coordinates.
            "auto" steers it to `clip_fraction`, see `optim/steering.py`.
        weight_decay: Decoupled weight decay, >= 0; a step multiplies the parameters by 1 - lr * weight_decay.
        eps: Added to the denominator, > 0, as the official code does.
        maximize: Maximize the objective instead of minimizing it.
        foreach: Use the multi-tensor implementation, or (False) the reference; None chooses by device.
        fused: Use one compiled pass: needs a C++ compiler on CPU and Triton on CUDA.
        hessian_dtype: What h is stored in, torch.bfloat16 to save memory; None: the parameter's dtype.
        momentum_dtype: The same for m. See `optim/precision.py`.
        bias_correction: Divide h by 1 - b2^t after t Hessian updates, as Adam does. Off in the official release.
        hessian_average: Replace an estimate by its mean over each "kernel" of a convolution, or over each output "row",
            before it enters h: less noise, one value of h for all of it. For every parameter of more than 2
            (kernel) or 1 (row) dimensions. Off in the official release.
        cautious: Move only the coordinates whose update has the sign of the gradient (arXiv 2411.16085, without
            its rescaling of the others). Off in the official release.
        hessian_root: Divide by rho sqrt(h) instead of rho h: steps as Adam's, with the curvature in the place of the
            squared gradients. Off in the official release.
        clip_fraction: With rho="auto", the fraction of coordinates to clip, in (0, 1); None takes
            `steering.CLIP_FRACTION`.

    State per parameter: `step` (scalar), `exp_avg` (m), `hessian` (h, both of the parameter's shape), and
    `hessian_updates` (int, t above). The first three are named as in the official release: its checkpoints load.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter is complex.
        RuntimeError: `fused` and no compiler works here.
    """

    floor = False

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
        fused: bool = False,
        hessian_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
        bias_correction: bool = False,
        hessian_average: str | None = None,
        cautious: bool = False,
        hessian_root: bool = False,
        clip_fraction: float | None = None,
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
            "hessian_dtype": hessian_dtype,
            "momentum_dtype": momentum_dtype,
            "bias_correction": bias_correction,
            "hessian_average": hessian_average,
            "cautious": cautious,
            "hessian_root": hessian_root,
            "clip_fraction": clip_fraction,
            "hessian_source": None,  # what h was made of: None (no update yet), "grad" (needs bs) or "estimates"
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict) -> None:
        """Restore a pickled or loaded state; fills in what checkpoints of the official release do not hold."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("eps", 1e-15)
            held = [self.state[p] for p in group["params"] if p in self.state]
            if "hessian_source" not in group:  # the official release knows one source only
                group["hessian_source"] = "grad" if any(bool(s["hessian"].any()) for s in held) else None

    def _check_marks(self, found: set[str]) -> None:
        if found:  # the official release has none
            super()._check_marks(found)

    @torch.no_grad()
    def update_hessian(self, estimates: Iterable[Tensor | None] | None = None) -> None:
        """Move h towards a new estimate: h <- b2 h + (1 - b2) h_hat.

        Args:
            estimates: One tensor per parameter in the order of the parameter groups, of the parameter's shape and at
                the scale of the objective that `step` sees (None skips a parameter). Without it, h_hat is the square of
                each `.grad`, to be left there by the backward pass of a mean loss with labels sampled from the
                model; every later `step` then needs `bs`, the number of predictions in that mean.

        Raises:
            ValueError: Number or shape of the estimates differs from the parameters'.
            RuntimeError: A second kind of estimate (their scales differ), no gradient at all, or a sparse one.
        """
        pairs = self._parameters()
        if estimates is None:
            source, values = "grad", [self._dense(p.grad, "update_hessian()") for _, p in pairs]
            if all(g is None for g in values):
                raise RuntimeError(
                    "update_hessian() found no .grad on any parameter; call it after the backward() of a loss with "
                    "labels sampled from the model, or pass the estimates: update_hessian(estimates)."
                )
        else:
            source, values = "estimates", self._checked(estimates)
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

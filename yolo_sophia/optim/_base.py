"""What all optimizers of the Sophia family share: state, checks, the average h of curvature estimates, the step.

A subclass says where estimates come from and how the step is scaled. Paper: arXiv 2305.14342. Its notation, with t the
number of Hessian updates:

    m <- b1 m + (1 - b1) g                            every step
    h <- b2 h + (1 - b2) average(h_hat)               every Hessian update, before the parameters move
    theta <- theta - lr wd theta                      decoupled decay
    theta <- theta - lr clip(m / denominator(h / (1 - b2^t)), bound)      cautious: where it has the sign of g
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolo_sophia.optim._auto_rho import clip_quantile, is_young, smoothed
from yolo_sophia.optim._compat import DEPRECATED, renamed
from yolo_sophia.optim._fused import uses_triton
from yolo_sophia.optim._hessian import HESSIAN_AVERAGES, bias_correction_factor, move_hessians
from yolo_sophia.optim._ranks import mean_over_ranks
from yolo_sophia.optim._skipping import Members, SkippingOptimizer
from yolo_sophia.optim._state import GROUP_KEYS, MOMENTS
from yolo_sophia.optim._step import StepOptions, choose_step, hessian_scale, uses_foreach
from yolo_sophia.options import OPTIONS, STEP_OPTIONS

STEPS_WITHOUT_HESSIAN = 12
"""Steps until a warning says that h was never updated; the official scripts update h after their tenth step."""

SHARED_DOCS = {
    "params": "params: Parameters or parameter groups, real floating-point, dense gradients.",
    "lr": "lr: Learning rate, >= 0; the largest move of a coordinate in one step (before weight decay).",
    "betas": "betas: Decay of the momentum m per step and of the curvature h per Hessian update, each in [0, 1).",
    "rho": f"rho: {OPTIONS['rho'].doc}",
    "weight_decay": """weight_decay: Decoupled weight decay, >= 0; a step multiplies the parameters by
            1 - lr * weight_decay.""",
    "hessian_interval": f"hessian_interval: {OPTIONS['hessian_interval'].doc}",
    "seed": "seed: Seed of the estimates' noise, >= 0.",
    "options": f"""bias_correction: Divide h by 1 - b2^t after t Hessian updates, as Adam does. Off in the official
            release.
        hessian_average: {OPTIONS["hessian_average"].doc} Estimates are averaged before they enter h, for every
            parameter of more than 2 (kernel) or 1 (row) dimensions. None (element) in the official release.
        foreach: Use multi-tensor kernels, or (False) one tensor after the other; None chooses by device.
        fused: {OPTIONS["fused"].doc} Not by default where `foreach` is given.
            A GradScaler then calls `step` without waiting for its check of the gradients; trainers that refuse such
            optimizers together with a clip of the gradient need False.""",
    "cautious": f"cautious: {OPTIONS['cautious'].doc}",
    "step_options": "\n        ".join(
        f"{name}: {OPTIONS[name].doc} {OPTIONS[name].default} in the official release." for name in STEP_OPTIONS
    ),
    "auto": f"""clip_fraction: {OPTIONS["clip_fraction"].doc} None takes {OPTIONS["clip_fraction"].default}. Groups
            with a fixed rho ignore it.""",
    "state": """State per parameter: `step` (scalar), `exp_avg` (m), `hessian` (h, both of the parameter's shape), and
    `hessian_updates` (int, t above). h is stored in float32 at least; m in the parameter's dtype, but in float32 for
    float16 parameters, whose smallest numbers are too large for it.

    Attribute `row_factors`: a dictionary, parameter -> tensor on its device that broadcasts to its shape, such as
    (rows, 1, 1, 1). It multiplies lr, weight decay included. It is empty at first and not part of `state_dict()`.""",
}
"""Parts of the docstrings that classes share; `shares_docs` fills them in."""


def shares_docs(cls: type) -> type:
    """Class decorator: replaces `{name}` in the docstring by the shared text of that name."""
    text = cls.__doc__ or ""
    for name, shared in SHARED_DOCS.items():
        text = text.replace(f"{{{name}}}", shared)
    cls.__doc__ = text
    return cls


class DueForRho(NamedTuple):
    """Parameter groups that share a rho to be measured.

    Attributes:
        groups: The groups.
        pairs: Each group with its parameters that have a gradient and a state.
        updated: Whether h has moved since the last measurement.
        young: Whether m is young, see `is_young`.
        age: Number of this step, from 1.
    """

    groups: list[dict[str, Any]]
    pairs: list[tuple[dict[str, Any], Tensor]]
    updated: bool
    young: bool
    age: int


class SophiaBase(SkippingOptimizer):
    """State, checks, and both halves of the algorithm; see the subclasses for the hyperparameters.

    Attributes:
        eps_is_minimum: Whether eps is the smallest value of the denominator, as in the paper, or added to it, as in
            the official code. An estimate that can be negative needs the former.
        scales_hessian: Whether rho scales h, and so can be set by a clip fraction: rho="auto".
        row_factors: Factors of lr within a parameter; rho="auto" does not depend on them.
    """

    eps_is_minimum = True
    scales_hessian = True

    def __init__(self, params: Any, defaults: dict[str, Any], deprecated: Mapping[str, Any] | None = None):
        defaults = renamed({**GROUP_KEYS, **defaults}, deprecated or {}, type(self).__name__)
        super().__init__(params, defaults)
        if defaults["clip_fraction"] is not None and all(g["clip_fraction"] is None for g in self.param_groups):
            require(False, defaults, "clip_fraction", 'None, as rho is not "auto"')

    # Parameter groups -----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        """Add a parameter group; its hyperparameters and parameters are checked first.

        Args:
            param_group: `params` and any hyperparameter that differs from the defaults.

        Raises:
            ValueError: A hyperparameter is out of range, or a parameter is complex.
            RuntimeError: `fused` is True, and the kernel cannot be used.
        """
        if isinstance(param_group, dict):
            old = {key: param_group[key] for key in DEPRECATED if key in param_group}
            kept = {key: value for key, value in param_group.items() if key not in old}
            param_group = renamed(kept, old, type(self).__name__, self.defaults)
        inherits = "clip_fraction" not in param_group
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if self.scales_hessian and isinstance(group["rho"], str) and group["rho"] == "auto":
                group["rho"] = 1.0  # without effect: h is 0 until rho is measured
                clip = OPTIONS["clip_fraction"]
                group["clip_fraction"] = clip.default if group["clip_fraction"] is None else group["clip_fraction"]
                require(clip.contains(group["clip_fraction"]), group, "clip_fraction", clip.expected)
            else:
                group["clip_fraction"] = None if inherits else group["clip_fraction"]
                require(group["clip_fraction"] is None, group, "clip_fraction", 'None, as rho is not "auto"')
            self._check_group(group)
        except (TypeError, ValueError, RuntimeError):  # TypeError: a comparison with what is no number
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict) -> None:
        require(float(group["lr"]) >= 0, group, "lr", "a number >= 0")
        betas = group["betas"]
        valid = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(0 <= b < 1 for b in betas)
        require(valid, group, "betas", "two numbers in [0, 1)")
        valid = not isinstance(group["rho"], str) and group["rho"] > 0
        require(valid, group, "rho", 'a number > 0, or "auto"' if self.scales_hessian else "a number > 0")
        require(group["weight_decay"] >= 0, group, "weight_decay", "a number >= 0")
        require(group["eps"] > 0, group, "eps", "a number > 0")
        require(not (group["fused"] and group["foreach"]), group, "fused", "None or False with foreach=True")
        for name in STEP_OPTIONS:
            require(OPTIONS[name].contains(group[name]), group, name, OPTIONS[name].expected)
        average = group["hessian_average"]
        require(average in (None, *HESSIAN_AVERAGES), group, "hessian_average", f"None or of {[*HESSIAN_AVERAGES]}")
        for p in group["params"]:
            if p.is_complex():
                raise ValueError(
                    f"{type(self).__name__} does not support complex parameters, found one of {p.dtype} and shape "
                    f"{tuple(p.shape)}; train torch.view_as_real(...) of it instead."
                )
        if group["fused"] and group["params"]:
            uses_triton(group, group["params"])  # raises where it cannot

    # The curvature --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_hessian(self, estimates: Iterable[Tensor | None], *, reduce: bool = True) -> None:
        """Move h towards a new estimate: h <- b2 h + (1 - b2) h_hat.

        With several processes (torch.distributed), h_hat is the mean of the estimates over the ranks, as the gradient
        of DistributedDataParallel is that of the mean loss: (1 / W) sum_r h_hat_r estimates the curvature of
        (1 / W) sum_r loss_r. Every rank has to call it. None on all ranks leaves h as it is; None on some of them
        counts as 0 there. Sharded parameters (DTensor, FSDP) are left out of the mean: their estimates have to be made
        for the loss of all ranks.

        Args:
            estimates: One tensor per parameter in the order of the parameter groups, of the parameter's shape and at
                the scale of the objective that `step` sees (None skips a parameter).
            reduce: Whether to take that mean; False if the estimates are equal on all ranks already.

        Raises:
            ValueError: Number or shape of the estimates differs from the parameters'.
        """
        values = self._checked(estimates)
        self._move_hessian(self._reduced(values) if reduce else values)

    def _checked(self, estimates: Iterable[Tensor | None]) -> list[Tensor | None]:
        pairs, values = self._parameters(), list(estimates)
        if len(values) != len(pairs):
            raise ValueError(f"update_hessian() got {len(values)} estimates for {len(pairs)} parameters.")
        for i, ((_, p), value) in enumerate(zip(pairs, values)):
            if value is not None and value.shape != p.shape:
                raise ValueError(f"Estimate {i} has shape {tuple(value.shape)}, its parameter has {tuple(p.shape)}.")
        return values

    def _reduced(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        return mean_over_ranks([p for _, p in self._parameters()], values)

    def _move_hessian(self, values: Sequence[Tensor | None], squared: bool = False) -> None:
        """Average over kernels or rows, then over time; `squared` says that the values are roots of estimates."""
        self.count_skipped_steps()
        remaining = iter(values)
        for group in self.param_groups:
            pairs = [(p, value) for p, value in zip(group["params"], remaining) if value is not None]
            if not pairs:
                continue
            group["rho_due"] = group["clip_fraction"] is not None
            self._steps_without_hessian = None
            params, estimates = map(list, zip(*pairs))
            states = [self._state_of(p) for p in params]
            for state in states:
                state["hessian_updates"] += 1
            move_hessians(
                [state["hessian"] for state in states],
                estimates,
                group["betas"][1],
                average=group["hessian_average"],
                squared=squared,
                foreach=uses_foreach(group, params),
            )

    # The step -------------------------------------------------------------------------------------------------------

    def _scale_and_bound(self, group: dict) -> tuple[float, float]:
        """Rho in the denominator, and the largest entry of the update: here the paper's rho and 1."""
        return group["rho"], 1.0

    def _move_parameters(self, factor: float = 1.0) -> None:
        """One step with the gradients in `.grad`; the factor multiplies h."""
        due = self._due_for_rho()
        if due and self._may_hold_skipped:  # the steps decide it
            self.count_skipped_steps()
            due = self._due_for_rho()
        members = [m for group in self.param_groups if (m := self._members(group)) is not None]
        columns = tuple([*chain(*each)] for each in zip(*(m.columns for m in members if m.is_fused)))  # () if none
        if self._is_skipped(members, columns, wait=bool(due)):
            return
        self._set_rho(due, factor)
        fused: list[tuple[StepOptions, list[float]]] = []
        for group, (*tensors, factors), states, is_fused in members:
            rho, bound = self._scale_and_bound(group)
            scale = hessian_scale(rho, group["hessian_power"], factor)
            examples = {s["hessian_updates"]: s for s in states}  # usually one: all were updated equally often
            corrected = {t: scale / bias_correction_factor(group, s) for t, s in examples.items()}
            scales = [corrected[s["hessian_updates"]] for s in states]
            options = StepOptions.of(group, bound, self.eps_is_minimum)
            if is_fused:
                fused.append((options, scales))
            else:
                choose_step(group, tensors[0])(*tensors, scales, factors, options)
        if fused:
            self._fused(columns, fused, self.found_inf, self._grad_scale)
        if self._steps_without_hessian is not None:
            self._warn_without_hessian()

    def _members(self, group: dict[str, Any]) -> Members | None:
        """What a step moves of a parameter group; None if nothing."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return None
        grads = [self._dense(p.grad, "step()") for p in params]
        states = [self.state[p] or self._state_of(p) for p in params]
        m, h = ([s[key] for s in states] for key in MOMENTS)
        factors = [self.row_factors.get(p) if self.row_factors else None for p in params]
        return Members(group, (params, grads, m, h, factors), states, uses_triton(group, params))

    def _warn_without_hessian(self) -> None:
        """Warn once if the parameters have moved for some steps and h was never updated."""
        if any(state.get("hessian_updates") for state in self.state.values()):  # by a run before
            self._steps_without_hessian = None
        elif any(float(group["lr"]) > 0 for group in self.param_groups):
            self._steps_without_hessian += 1
            if self._steps_without_hessian == STEPS_WITHOUT_HESSIAN:
                self._steps_without_hessian = None
                warnings.warn(
                    f"{type(self).__name__} has taken {STEPS_WITHOUT_HESSIAN} steps and h was never updated: every "
                    f"step is lr times the sign of the momentum. {self.how_to_update}",
                    stacklevel=6,
                )

    how_to_update = "Call update_hessian() every few steps, see its documentation."

    def _due_for_rho(self) -> list[DueForRho]:
        """Groups whose rho is to be measured in this step; those of one clip fraction and power share one rho."""
        due, automatic = [], [group for group in self.param_groups if group["clip_fraction"] is not None]
        for kind in {(group["clip_fraction"], group["hessian_power"]) for group in automatic}:
            groups = [group for group in automatic if (group["clip_fraction"], group["hessian_power"]) == kind]
            pairs = [(g, p) for g in groups for p in g["params"] if p.grad is not None and self.state.get(p)]
            if not pairs:
                continue
            updated = any(group["rho_due"] for group in groups)
            age = 1 + int(self.state[pairs[0][1]]["step"])
            young = is_young(pairs[0][0]["betas"][0], age)
            grown = young and groups[0]["rho_measurements"] == 1 and 0 < 1.25 * groups[0]["rho_age"] <= age
            if updated or grown:
                due.append(DueForRho(groups, pairs, updated, young, age))
        return due

    def _set_rho(self, due: Iterable[DueForRho], factor: float) -> None:
        """Measure rho where it is due."""
        for groups, pairs, updated, young, age in due:
            states = [self.state[p] for _, p in pairs]
            quantile = clip_quantile(
                [-p.grad if g["maximize"] else self._dense(p.grad, "step()") for g, p in pairs],
                [s["exp_avg"] for s in states],
                [s["hessian"] for s in states],
                [factor / bias_correction_factor(g, s) for (g, _), s in zip(pairs, states)],
                [g["betas"][0] for g, _ in pairs],
                groups[0]["clip_fraction"],
                groups[0]["hessian_power"],
            )
            for group in groups:
                group["rho_due"] = False
                if quantile is not None:
                    group["rho"] = smoothed(group["rho"], group["rho_measurements"], quantile, young=young)
                    group["rho_measurements"] += updated
                    group["rho_age"] = age

    def _dense(self, grad: Tensor | None, where: str) -> Tensor | None:
        if grad is not None and grad.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__}.{where} found a sparse gradient; it supports dense ones only. Use sparse=False "
                "in the embedding layer, or torch.optim.SparseAdam for that parameter."
            )
        return grad


def evaluated(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """What the closure returns, with gradients enabled; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def require(valid: bool, group: Mapping[str, Any], name: str, expected: str) -> None:
    """Refuse a hyperparameter of a parameter group.

    Raises:
        ValueError: `valid` is false.
    """
    if not valid:
        raise ValueError(f"Invalid {name}: found {group[name]!r}, expected {expected}.")

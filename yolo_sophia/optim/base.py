"""What all optimizers of the Sophia family share: state, checks, the average h of curvature estimates, the step.

The rule: a subclass says where estimates come from and how the step is scaled; nothing else differs in the family.
Paper: arXiv 2305.14342. Its notation, with t the number of Hessian updates:

    m <- b1 m + (1 - b1) g                            every step
    h <- b2 h + (1 - b2) average(h_hat)               every Hessian update, before the parameters move
    theta <- theta - lr wd theta                      decoupled decay
    theta <- theta - lr clip(m / denominator(h / (1 - b2^t)), bound)      cautious: where it has the sign of g
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from yolo_sophia.optim.fused import check_compiler
from yolo_sophia.optim.precision import SETTINGS, STORABLE, round_at_random, stored_dtype
from yolo_sophia.optim.reference import Rule, working_dtype
from yolo_sophia.optim.steering import CLIP_FRACTION, clip_quantile, steered
from yolo_sophia.optim.update import choose_update

STATE = ("step", "exp_avg", "hessian", "hessian_updates")
MARKS = ("hessian_source", "k", "probes")
"""Keys of the parameter groups that tell the optimizers of this package apart."""

HESSIAN_AVERAGES: Mapping[str, int] = MappingProxyType({"kernel": 2, "row": 1})
"""Leading dimensions that an averaged estimate keeps; its mean is taken over the others. For a convolution's weight,
shape (out, in, height, width): "kernel" leaves one value per kernel, "row" one per output channel."""


class SophiaBase(Optimizer):
    """State, checks, and both halves of the algorithm; see the subclasses for the hyperparameters.

    State per parameter: `step` (scalar), `exp_avg` (m), `hessian` (h, both of the parameter's shape), and
    `hessian_updates` (int, t above). `momentum_dtype` and `hessian_dtype` of a group name another dtype for m and h.

    Attributes:
        floor: Whether eps is the smallest value of the denominator, as in the paper, or added to it, as in the official
            code. An estimate that can be negative needs the former.
        steers: Whether rho scales h, and so can be steered: rho="auto".
    """

    floor = True
    steers = True

    def __init__(self, params: Any, defaults: dict[str, Any]):
        super().__init__(params, {"maximize": False, "foreach": None, **optional_settings(), **defaults})

    def __setstate__(self, state: dict) -> None:
        """Restore a pickled or loaded state; fills in what older checkpoints do not hold."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in {"maximize": False, "foreach": None, **optional_settings()}.items():
                group.setdefault(key, value)
        for held in self.state.values():
            held.setdefault("hessian_updates", 0)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state; one of another optimizer is refused before anything changes.

        Args:
            state_dict: What `state_dict()` of this class gave.

        Raises:
            ValueError: The state is another optimizer's, or of other parameters or parameter groups.
        """
        foreign = sorted({key for state in state_dict["state"].values() for key in state} - set(STATE))
        if foreign or any(not state.keys() >= SETTINGS.keys() for state in state_dict["state"].values()):
            name = type(self).__name__
            found = f"{foreign} as well" if foreign else f"some without {' or '.join(SETTINGS)}"
            raise ValueError(
                f"The state is not {name}'s: expected {list(STATE)} for each parameter, found {found}. Start the "
                f"optimizer anew, or load a checkpoint that {name} wrote."
            )
        self._check_marks({key for group in state_dict["param_groups"] for key in MARKS if key in group})
        self._check_shapes(state_dict)
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, (group, p) in zip(saved, self._parameters()):
            for key in SETTINGS:  # torch has cast them to the parameter's dtype, which may be narrower
                if i in state_dict["state"]:
                    value = state_dict["state"][i][key]
                    self.state[p][key] = value.to(device=p.device, dtype=stored_dtype(group, p, key))

    def _check_marks(self, found: set[str]) -> None:
        """Refuse the state of another one of the family: the same rho and h would mean something else."""
        own = {key for key in MARKS if key in self.defaults}
        if found != own:
            name = type(self).__name__
            raise ValueError(
                f"The state is not {name}'s: its groups have {sorted(found)}, expected {sorted(own)}. "
                f"Start the optimizer anew, or load a checkpoint that {name} wrote."
            )

    def _check_shapes(self, state_dict: dict) -> None:
        """Refuse the state of other parameters, or of the same ones in other groups: torch compares no shapes."""
        found = [len(group["params"]) for group in state_dict["param_groups"]]
        expected = [len(group["params"]) for group in self.param_groups]
        remedy = "The model or its parameter groups have changed: start the optimizer anew."
        if found != expected:
            raise ValueError(f"The state is of groups of {found} parameters, expected {expected}. {remedy}")
        saved = (i for group in state_dict["param_groups"] for i in group["params"])
        for n, (i, (_, p)) in enumerate(zip(saved, self._parameters())):
            for key in SETTINGS if i in state_dict["state"] else ():
                if (shape := state_dict["state"][i][key].shape) != p.shape:
                    there, here = tuple(shape), tuple(p.shape)
                    raise ValueError(
                        f"The state has {key} of shape {there} for parameter {n}, expected {here}. {remedy}"
                    )

    def add_param_group(self, param_group: dict) -> None:
        """Add a parameter group; its hyperparameters and parameters are checked first.

        Args:
            param_group: `params` and any hyperparameter that differs from the defaults.

        Raises:
            ValueError: A hyperparameter is out of range, or a parameter is complex.
            RuntimeError: `fused=True` and no compiler works here.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if self.steers and isinstance(group["rho"], str) and group["rho"] == "auto":
                group["rho"] = 1.0  # without effect: h is 0 until rho is measured
                group["clip_fraction"] = CLIP_FRACTION if group["clip_fraction"] is None else group["clip_fraction"]
                require(0 < group["clip_fraction"] < 1, group, "clip_fraction", "a number in (0, 1)")
            else:
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
        require(valid, group, "rho", 'a number > 0, or "auto"' if self.steers else "a number > 0")
        require(group["weight_decay"] >= 0, group, "weight_decay", "a number >= 0")
        require(group["eps"] > 0, group, "eps", "a number > 0")
        average = group["hessian_average"]
        require(average in (None, *HESSIAN_AVERAGES), group, "hessian_average", f"None or of {[*HESSIAN_AVERAGES]}")
        for p in group["params"]:
            if p.is_complex():
                raise ValueError(
                    f"{type(self).__name__} does not support complex parameters, found one of {p.dtype} and shape "
                    f"{tuple(p.shape)}; train torch.view_as_real(...) of it instead."
                )
        for name in SETTINGS.values():
            require(group[name] in (None, *STORABLE), group, name, "None, torch.bfloat16 or torch.float32")
        if group["fused"]:
            require(not group["foreach"], group, "foreach", "None or False beside fused=True: choose one of them")
            for p in group["params"]:
                check_compiler(p, *(stored_dtype(group, p, key) for key in SETTINGS))

    def _parameters(self) -> list[tuple[dict, Tensor]]:
        """All (group, parameter) pairs in the order of the groups."""
        return [(group, p) for group in self.param_groups for p in group["params"]]

    def _state_of(self, group: dict, p: Tensor) -> dict:
        """The state of one parameter, made at its first use."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            for key in SETTINGS:
                dtype = stored_dtype(group, p, key)
                state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            state["hessian_updates"] = 0
        return state

    @torch.no_grad()
    def update_hessian(self, estimates: Iterable[Tensor | None]) -> None:
        """Move h towards a new estimate: h <- b2 h + (1 - b2) h_hat.

        Args:
            estimates: One tensor per parameter in the order of the parameter groups, of the parameter's shape and at
                the scale of the objective that `step` sees (None skips a parameter).

        Raises:
            ValueError: Number or shape of the estimates differs from the parameters'.
        """
        self._move_hessian(self._checked(estimates))

    def _checked(self, estimates: Iterable[Tensor | None]) -> list[Tensor | None]:
        pairs, values = self._parameters(), list(estimates)
        if len(values) != len(pairs):
            raise ValueError(f"update_hessian() got {len(values)} estimates for {len(pairs)} parameters.")
        for i, ((_, p), value) in enumerate(zip(pairs, values)):
            if value is not None and value.shape != p.shape:
                raise ValueError(f"Estimate {i} has shape {tuple(value.shape)}, its parameter has {tuple(p.shape)}.")
        return values

    def _move_hessian(self, values: Sequence[Tensor | None], squared: bool = False) -> None:
        """Average over kernels or rows, then over time; `squared` says that the values are roots of estimates."""
        for i, ((group, p), value) in enumerate(zip(self._parameters(), values)):
            if value is None:
                continue
            group["rho_due"] = group["clip_fraction"] is not None
            state, beta2, average = self._state_of(group, p), group["betas"][1], group["hessian_average"]
            state["hessian_updates"] += 1
            h = state["hessian"].to(working_dtype(state["hessian"]))  # itself where it is wide enough
            if squared and average is None:  # no square is stored
                h.mul_(beta2).addcmul_(value, value, value=1 - beta2)
            else:
                estimate = value.square() if squared else value
                h.mul_(beta2).add_(averaged(estimate, average), alpha=1 - beta2)
            if state["hessian"].dtype == torch.bfloat16:
                state["hessian"].copy_(round_at_random(h, seed=(state["hessian_updates"] << 20) + i))
            elif h is not state["hessian"]:
                state["hessian"].copy_(h)

    def _scale_and_bound(self, group: dict) -> tuple[float, float]:
        """Factor on h in the denominator, and the largest entry of the update: here the paper's rho and 1."""
        return group["rho"], 1.0

    def _move_parameters(self, factor: float = 1.0) -> None:
        """One step with the gradients in `.grad`; the factor multiplies h."""
        self._steer(factor)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [self._dense(p.grad, "step()") for p in params]
            states = [self.state[p] or self._state_of(group, p) for p in params]
            scale, bound = self._scale_and_bound(group)
            scales = [(scale**2 if group["hessian_root"] else scale) * factor] * len(states)
            if group["bias_correction"]:
                scales = [x / bias_correction_factor(group, s) for x, s in zip(scales, states)]
            _count([s["step"] for s in states])
            rule = Rule(
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
                bound=bound,
                floor=self.floor,
                cautious=group["cautious"],
                root=group["hessian_root"],
            )
            m, h = ([s[key] for s in states] for key in SETTINGS)
            choose_update(group, params)(params, grads, m, h, scales, rule)

    def _steer(self, factor: float) -> None:
        """Measure rho where it is steered and h has moved since; groups of one clip fraction share one rho."""
        due = [group for group in self.param_groups if group["rho_due"]]
        for fraction, root in {(group["clip_fraction"], group["hessian_root"]) for group in due}:
            groups = [g for g in due if (g["clip_fraction"], g["hessian_root"]) == (fraction, root)]
            pairs = [(g, p) for g in groups for p in g["params"] if p.grad is not None and p in self.state]
            if not pairs:
                continue
            states = [self.state[p] for _, p in pairs]
            quantile = clip_quantile(
                [self._dense(p.grad, "step()") for _, p in pairs],
                [s["exp_avg"] for s in states],
                [s["hessian"] for s in states],
                [factor / bias_correction_factor(g, s) for (g, _), s in zip(pairs, states)],
                [g["betas"][0] for g, _ in pairs],
                fraction,
                root,
            )
            for group in groups:
                group["rho_due"] = False
                if quantile is not None:
                    group["rho"] = steered(group["rho"], group["rho_measurements"], quantile)
                    group["rho_measurements"] += 1

    def _dense(self, grad: Tensor | None, where: str) -> Tensor | None:
        if grad is not None and grad.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__}.{where} found a sparse gradient; it supports dense ones only. Use sparse=False "
                "in the embedding layer, or torch.optim.SparseAdam for that parameter."
            )
        return grad


def optional_settings() -> dict[str, Any]:
    """What the paper does not have, off by default: keys of every parameter group."""
    return {
        "fused": False,
        "hessian_dtype": None,
        "momentum_dtype": None,
        "bias_correction": False,
        "hessian_average": None,
        "cautious": False,
        "hessian_root": False,
        "clip_fraction": None,  # the fraction that rho is steered to, None: rho is fixed
        "rho_measurements": 0,
        "rho_due": False,  # whether h has moved since rho was measured
    }


def _count(steps: list[Tensor]) -> None:
    """Add 1 to each; on CPU a tensor 1 for all is several times faster than a number, which becomes one for each."""
    torch._foreach_add_(steps, torch.ones(()) if steps[0].is_cpu else 1)


def evaluated(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """What the closure returns, with gradients enabled; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def averaged(estimate: Tensor, average: str | None) -> Tensor:
    """Mean over a kernel or an output row, shape (..., 1, 1); as it is where there is nothing to average over."""
    dims = tuple(range(estimate.dim() if average is None else HESSIAN_AVERAGES[average], estimate.dim()))
    return estimate.mean(dims, keepdim=True) if dims else estimate


def bias_correction_factor(group: dict, state: dict) -> float:
    """1 - b2^t where bias correction is on and h was updated t > 0 times, else 1."""
    updates = state["hessian_updates"]
    return 1 - group["betas"][1] ** updates if group["bias_correction"] and updates else 1.0


def require(valid: bool, group: dict, name: str, expected: str) -> None:
    """Refuse a hyperparameter of a parameter group.

    Raises:
        ValueError: `valid` is false.
    """
    if not valid:
        raise ValueError(f"Invalid {name}: found {group[name]!r}, expected {expected}.")

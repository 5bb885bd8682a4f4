"""The state of the optimizers of the Sophia family, and how states of other versions and releases are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from yolo_sophia.optim._compat import reads_old_keys
from yolo_sophia.options import OPTIONS, STEP_OPTIONS

STATE = ("step", "exp_avg", "hessian", "hessian_updates")
MOMENTS = ("exp_avg", "hessian")
"""State tensors of the parameter's shape."""

CLASS_KEYS = ("hessian_source", "seed", "n_samples")
"""Keys of the parameter groups that tell the optimizers of this package apart."""

GROUP_KEYS: Mapping[str, Any] = MappingProxyType(
    {
        "maximize": False,
        "foreach": None,
        "fused": None,
        "bias_correction": False,
        "hessian_average": None,
        **{name: OPTIONS[name].default for name in STEP_OPTIONS},
        "clip_fraction": None,  # the fraction that rho is set by; None: rho is fixed
        "rho_measurements": 0,
        "rho_age": 0,  # steps of the momentum at the last measurement
        "rho_due": False,  # whether h has moved since rho was measured
    }
)
"""Keys of every parameter group that the paper does not have, with the values of a checkpoint that lacks them."""

MATURE = 10**6
"""Number of Hessian updates that a loaded h of the official release counts for: 1 - b2^t is 1."""


class StatefulOptimizer(Optimizer):
    """An optimizer with the state of `STATE` for every parameter, whose dtypes survive loading."""

    def __init__(self, params: Any, defaults: dict[str, Any]):
        self.row_factors: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict) -> None:
        """Restore a pickled or loaded state; fills in what older checkpoints do not hold."""
        super().__setstate__(state)
        self.__dict__.setdefault("row_factors", {})  # a pickle does not hold them
        for group in self.param_groups:
            reads_old_keys(group)
            for key, value in GROUP_KEYS.items():
                group.setdefault(key, value)
        for held in self.state.values():
            held.setdefault("hessian_updates", 0)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state; one of another optimizer is refused before anything changes.

        Hooks that convert a state run first. States of version 0.1 are translated: renamed keys, and h and m in
        bfloat16. `fused` stays as it is.

        Args:
            state_dict: What `state_dict()` of this class gave.

        Raises:
            ValueError: The state is another optimizer's, or of other parameters or parameter groups.
        """
        loaded: dict[str, Any] = {}

        def validate(_: Optimizer, given: dict) -> dict:
            loaded.update(self._validated(given))
            return loaded

        def restore_dtypes(_: Optimizer) -> None:
            saved = [i for group in loaded["param_groups"] for i in group["params"]]
            for i, (_, p) in zip(saved, self._parameters()):
                for key in MOMENTS if i in loaded["state"] else ():  # torch has cast them to the parameter's dtype
                    value = loaded["state"][i][key]
                    self.state[p][key] = value.to(device=p.device, dtype=state_dtype(p, key))
                if "step" in self.state.get(p, {}):  # torch has moved it where `fused` is True
                    self.state[p]["step"] = self.state[p]["step"].cpu()

        # The last hook before the state is taken over, and the first one after it.
        before = self.register_load_state_dict_pre_hook(validate)
        after = self.register_load_state_dict_post_hook(restore_dtypes, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        self._steps_without_hessian = 0

    def _validated(self, state_dict: dict) -> dict:
        """The state in today's form.

        Raises:
            ValueError: It is no state of this optimizer's class, groups and shapes.
        """
        name = type(self).__name__
        foreign = sorted({key for state in state_dict["state"].values() for key in state} - set(STATE))
        if foreign or any(not state.keys() >= set(MOMENTS) for state in state_dict["state"].values()):
            found = f"{foreign} as well" if foreign else f"some without {' or '.join(MOMENTS)}"
            raise ValueError(
                f"The state is not {name}'s: expected {list(STATE)} for each parameter, found {found}. Start with a "
                f"new optimizer, or load a checkpoint that {name} wrote."
            )
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group in groups:
            reads_old_keys(group)
        for own, group in zip(self.param_groups, groups):
            group["fused"] = own["fused"]  # a matter of the machine
        state_dict = {**state_dict, "param_groups": groups}
        self._check_class({key for group in groups for key in CLASS_KEYS if key in group})
        self._check_shapes(state_dict)
        return state_dict

    def _check_class(self, found: set[str]) -> None:
        """Refuse the state of another one of the family: the same rho and h would mean something else."""
        own = {key for key in CLASS_KEYS if key in self.defaults}
        if found != own:
            name = type(self).__name__
            raise ValueError(
                f"The state is not {name}'s: its groups have {sorted(found)}, expected {sorted(own)}. "
                f"Start with a new optimizer, or load a checkpoint that {name} wrote."
            )

    def _check_shapes(self, state_dict: dict) -> None:
        """Refuse the state of other parameters, or of the same ones in other groups: torch compares no shapes."""
        found = [len(group["params"]) for group in state_dict["param_groups"]]
        expected = [len(group["params"]) for group in self.param_groups]
        remedy = "The model or its parameter groups have changed: start with a new optimizer."
        if found != expected:
            raise ValueError(f"The state is of groups of {found} parameters, expected {expected}. {remedy}")
        saved = (i for group in state_dict["param_groups"] for i in group["params"])
        for n, (i, (_, p)) in enumerate(zip(saved, self._parameters())):
            for key in MOMENTS if i in state_dict["state"] else ():
                if (shape := state_dict["state"][i][key].shape) != p.shape:
                    there, here = tuple(shape), tuple(p.shape)
                    raise ValueError(
                        f"The state has {key} of shape {there} for parameter {n}, expected {here}. {remedy}"
                    )

    def _parameters(self) -> list[tuple[dict, Tensor]]:
        """All (group, parameter) pairs in the order of the groups."""
        return [(group, p) for group in self.param_groups for p in group["params"]]

    def _state_of(self, p: Tensor) -> dict:
        """The state of one parameter, made at its first use."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            for key in MOMENTS:
                state[key] = torch.zeros_like(p, dtype=state_dtype(p, key), memory_format=torch.preserve_format)
            state["hessian_updates"] = 0
        return state


def state_dtype(p: Tensor, key: str) -> torch.dtype:
    """The dtype of a state tensor of a parameter: h needs the range and the precision of float32, m the range."""
    if key == "exp_avg" and p.dtype != torch.float16:
        return p.dtype
    return torch.promote_types(p.dtype, torch.float32)

"""Optimizers of the family that refresh h themselves, every k-th step.

The rule: the clock, the seed and the number of the estimate are kept in the parameter groups, hence in every state
dict; an estimate's noise follows from the latter two alone. So a resumed run makes the estimates it would have made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from yolo_sophia.curvature.hutchinson import twice_differentiable
from yolo_sophia.curvature.noise import forked, noise_seed
from yolo_sophia.optim.base import SophiaBase, evaluated, require


class RefreshingSophia(SophiaBase):
    """Refreshes h at the first step and at every k-th after it; subclasses estimate.

    Every parameter group holds `k` (None: no refresh but from outside), `seed`, `refreshes` (estimates made) and
    `hessian_age` (steps since h was last updated, None: never); the first group's are used.
    """

    needs_loss: bool = False
    """Whether `_estimates` may use the loss of the closure, whose graph then outlives its backward pass."""

    def __init__(self, params: Any, defaults: dict[str, Any], *, k: int | None, seed: int):
        super().__init__(params, {**defaults, "k": k, "seed": seed, "refreshes": 0, "hessian_age": None})

    def _check_group(self, group: dict) -> None:
        super()._check_group(group)
        for key, least in (("k", 1), ("seed", 0)):
            value = group[key]
            valid = isinstance(value, int) and not isinstance(value, bool) and value >= least
            require(valid or (key == "k" and value is None), group, key, f"a whole number >= {least}")

    def _estimates(self, params: Sequence[Tensor], loss: Tensor | None) -> Iterable[Tensor | None]:
        """One estimate or None for each parameter; gradients are enabled, global random states seeded."""
        raise NotImplementedError

    def _tick(self, **changes: Any) -> None:
        for group in self.param_groups:
            group.update(changes)

    @property
    def refresh_due(self) -> bool:
        """Whether the next step refreshes h."""
        k, age = (self.param_groups[0][key] for key in ("k", "hessian_age"))
        return k is not None and (age is None or age >= k)

    def update_hessian(self, estimates: Iterable[Tensor | None]) -> None:
        """Move h towards an estimate from elsewhere, as in the base class; the next k steps make none."""
        super().update_hessian(estimates)
        self._tick(hessian_age=0)

    @torch.no_grad()
    def refresh(self, loss: Tensor | None = None) -> None:
        """Make an estimate and move h towards it. `step` does so by itself when it is due.

        Args:
            loss: Loss to estimate from, before its backward pass, for those that take one.

        Raises:
            ValueError: Number or shape of the estimates differs from the parameters'.
            RuntimeError: What is needed for the estimate is missing.
        """
        everything, clock = [p for _, p in self._parameters()], self.param_groups[0]
        params = [p for p in everything if p.requires_grad]
        with torch.enable_grad(), forked(noise_seed(clock["seed"], clock["refreshes"])):
            values = list(self._estimates(params, loss))
        if len(values) != len(params):
            raise ValueError(f"The estimator gave {len(values)} estimates for {len(params)} parameters.")
        if all(v is None or v.isfinite().all() for v in values):
            made = iter(values)
            self.update_hessian([next(made) if p.requires_grad else None for p in everything])
        else:  # one NaN in h would stay there
            warnings.warn(f"{type(self).__name__}: dropped a Hessian estimate that is not finite.", stacklevel=2)
        self._tick(refreshes=clock["refreshes"] + 1, hessian_age=0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Refresh h if it is due, and take one step with the gradients in `.grad`.

        Args:
            closure: Re-evaluates the model and returns the loss; may call `backward()`, without `create_graph`.

        Returns:
            What the closure returned, if one was given.

        Raises:
            ValueError: As `refresh`.
            RuntimeError: As `refresh`, or a gradient is sparse.
        """
        due = self.refresh_due
        if due and self.needs_loss:
            with _KeepGraph(), twice_differentiable():
                loss = evaluated(closure)
        else:
            loss = evaluated(closure)
        if due:
            self.refresh(loss)
        self._move_parameters()
        if self.param_groups[0]["k"] is not None:
            self._tick(hessian_age=self.param_groups[0]["hessian_age"] + 1)
        return loss


class _KeepGraph(TorchFunctionMode):
    """Lets the graph outlive `loss.backward()`, for the second differentiation; `.grad` is as ever."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call the function; `backward` with `retain_graph=True`."""
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.backward:
            kwargs["retain_graph"] = True
        return func(*args, **kwargs)

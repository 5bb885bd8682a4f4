"""Optimizers of the family that estimate h themselves, every few steps.

Schedule, seed and index of the estimate are kept in the parameter groups and determine the noise, so a resumed run
makes the estimates that it would have made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from yolo_sophia.curvature.hutchinson import twice_differentiable
from yolo_sophia.curvature.noise import forked, noise_seed
from yolo_sophia.optim._base import SophiaBase, evaluated, require
from yolo_sophia.optim._ranks import all_agree, rank
from yolo_sophia.optim._schedule import COUNTERS, HessianSchedule, is_report_due


class SelfEstimatingSophia(SophiaBase):
    """Updates h at the first step and every few steps after it; subclasses estimate.

    Every parameter group holds `hessian_interval`, `seed` and the counters of the schedule; the first group's are used.
    With `hessian_interval=None` in the constructor, only `refresh` and `update_hessian` move h, and the caller counts.

    With several processes (torch.distributed), each rank estimates for its own loss, with noise of its own, and h_hat
    is the mean over the ranks, see `update_hessian`.
    """

    needs_loss: bool = False
    """Whether `_estimates` may use the loss of the closure, whose graph then outlives its backward pass."""

    interval_name = "hessian_interval"

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        hessian_interval: int | None,
        seed: int,
        deprecated: Mapping[str, Any] | None = None,
    ):
        schedule = {"hessian_interval": hessian_interval, "seed": seed, **COUNTERS}
        super().__init__(params, {**defaults, **schedule}, deprecated)

    def __setstate__(self, state: dict) -> None:
        """Restore a pickled or loaded state; fills in what older checkpoints do not hold."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in COUNTERS.items():
                group.setdefault(key, value)

    def _check_group(self, group: dict) -> None:
        super()._check_group(group)
        for key, name, least in (("hessian_interval", self.interval_name, 1), ("seed", "seed", 0)):
            value = group[key]
            valid = isinstance(value, int) and not isinstance(value, bool) and value >= least
            valid = valid or (key == "hessian_interval" and value is None)
            require(valid, {name: value}, name, f"an integer >= {least}")

    def _estimates(self, params: Sequence[Tensor], loss: Tensor | None) -> Iterable[Tensor | None]:
        """One estimate or None for each parameter; gradients are enabled, global random states seeded."""
        raise NotImplementedError

    @property
    def schedule(self) -> HessianSchedule:
        """When h is updated."""
        return HessianSchedule(self)

    @property
    def _updates_itself(self) -> bool:
        """Whether `step` keeps the schedule; else a caller does, whose interval may be in the groups."""
        return self.defaults["hessian_interval"] is not None

    @property
    def refresh_due(self) -> bool:
        """Whether the next step updates h."""
        return self._updates_itself and self.schedule.due

    def update_hessian(self, estimates: Iterable[Tensor | None], *, reduce: bool = True) -> None:
        """Move h towards an estimate from elsewhere, as in the base class; the interval starts again."""
        super().update_hessian(estimates, reduce=reduce)
        self._count_update()

    def _count_update(self) -> None:
        if self._updates_itself:
            self.schedule.updated()
        else:
            self.schedule.set(hessian_age=0)

    @torch.no_grad()
    def refresh(self, loss: Tensor | None = None) -> None:
        """Make an estimate and update h with it. `step` does so by itself when it is due.

        With several processes, every rank has to call it; an estimate that is not finite on one rank is dropped on all.

        Args:
            loss: Loss to estimate from, before its backward pass, for those that take one.

        Raises:
            ValueError: Number or shape of the estimates differs from the parameters'.
            RuntimeError: What is needed for the estimate is missing.
        """
        everything, schedule = [p for _, p in self._parameters()], self.schedule
        params = [p for p in everything if p.requires_grad]
        parts = (schedule["seed"], schedule["refresh_index"], *([rank()] if rank() else []))
        with torch.enable_grad(), forked(noise_seed(*parts)):
            values = list(self._estimates(params, loss))
        if len(values) != len(params):
            raise ValueError(f"The estimator gave {len(values)} estimates for {len(params)} parameters.")
        made = iter(values)
        values = self._reduced(self._checked(next(made) if p.requires_grad else None for p in everything))
        schedule.estimated()
        finite = all(v is None or bool(v.isfinite().all()) for v in values)
        if all_agree(finite, everything[0].device):
            self._move_hessian(values)
            self._count_update()
        elif is_report_due(dropped := schedule.dropped()):  # one NaN in h would stay there
            warnings.warn(
                f"{type(self).__name__}: dropped a Hessian estimate that is not finite ({dropped} so far).",
                stacklevel=2,
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update h if it is due, and take one step with the gradients in `.grad`.

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
        if due and self._reads_skip():
            return loss
        if due:
            self.refresh(loss)
        self._move_parameters()
        if self._updates_itself and not self.step_was_skipped:
            self.schedule.stepped()
        return loss


class _KeepGraph(TorchFunctionMode):
    """Lets the graph outlive `loss.backward()`, for the second differentiation; `.grad` is as ever."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call the function; `backward` with `retain_graph=True`."""
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.backward:
            kwargs["retain_graph"] = True
        return func(*args, **kwargs)

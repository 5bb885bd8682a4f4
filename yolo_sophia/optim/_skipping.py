"""Steps that are skipped for a gradient that is not finite: the flags of a GradScaler, and counters that obey them.

A GradScaler reads its flag on the host and skips `step()`, or, of optimizers that read it on the device, calls `step()`
always. The kernel of `_triton.py` reads it there. The host then counts every step and takes back what was skipped when
somebody needs the counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolo_sophia.optim._fused import FusedStep, uses_triton
from yolo_sophia.optim._state import StatefulOptimizer
from yolo_sophia.optim._step import Columns


class Members(NamedTuple):
    """What a step moves of one parameter group.

    Attributes:
        group: The parameter group.
        columns: Its parameters with a gradient, and what belongs to them.
        states: Their states.
        is_fused: Whether the kernel steps them.
    """

    group: dict[str, Any]
    columns: Columns
    states: list[dict[str, Any]]
    is_fused: bool


class SkippingOptimizer(StatefulOptimizer):
    """An optimizer whose steps can be skipped on the device.

    Attributes:
        found_inf: Whether the gradient is not finite, as one number; a GradScaler sets it while it calls `step`.
        grad_scale: What the gradients have to be divided by, likewise.
        step_was_skipped: Whether the last step is known to have been skipped.
        skipped_steps: Steps that the device has skipped, as far as they are counted.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None  # a GradScaler multiplies what it finds, so there is no default
    step_was_skipped = False
    skipped_steps = 0
    _steps_without_hessian: int | None = 0  # None: h was updated, or the warning was given

    def __init__(self, params: Any, defaults: dict[str, Any]):
        self._start_anew()
        super().__init__(params, defaults)

    def _start_anew(self) -> None:
        self._fused = FusedStep()
        self._steps = torch.empty(0)  # of the states that were stepped last, see `_count`
        self._addresses: list[int] = []
        self._may_hold_skipped = False  # whether `_steps` may hold steps that the device has skipped

    def __setstate__(self, state: dict) -> None:
        """Restore a pickled or loaded state."""
        super().__setstate__(state)
        self._start_anew()  # nothing of it is in a pickle

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler asks: whether to call `step` without having read its flag."""
        members = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        return all(uses_triton(group, params) for group, params in members if params)

    def count_skipped_steps(self) -> None:
        """Take the steps that the device has skipped out of `step` and of the schedule; waits for the device.

        Saving, loading and Hessian updates do so by themselves. Until then, the counters hold the skipped steps too.
        """
        is_asked, self._may_hold_skipped = self._may_hold_skipped, False
        skipped = self._fused.take_skipped() if is_asked else 0
        if not skipped:
            return
        self.skipped_steps += skipped
        self._steps -= skipped
        for group in self.param_groups:
            if group.get("hessian_age"):
                group["hessian_age"] = max(0, group["hessian_age"] - skipped)
        if self._steps_without_hessian:
            self._steps_without_hessian = max(0, self._steps_without_hessian - skipped)

    def state_dict(self) -> dict[str, Any]:
        """The state of `torch.optim.Optimizer.state_dict`; its counters are without the skipped steps."""
        self.count_skipped_steps()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state, see `StatefulOptimizer`."""
        self.count_skipped_steps()
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold."""
        self.count_skipped_steps()
        return super().__getstate__()

    def _is_skipped(self, members: Sequence[Members], columns: Columns | tuple[()], wait: bool) -> bool:
        """Prepare a step and count it.

        Args:
            members: What is moved.
            columns: The tensors that the kernel steps; () if it steps none.
            wait: Whether the flag has to be known before the step.

        Returns:
            Whether the step is known to be skipped; nothing is to be done then.
        """
        if columns and self._fused.arrange(columns):
            self.count_skipped_steps()
        is_fused = columns and all(each.is_fused for each in members)
        on_device = is_fused and self._fused.launches and not self._fused.rest
        if (wait or not on_device) and self._reads_skip():
            return True
        self.step_was_skipped = False
        self._count([state for each in members for state in each.states])
        self._may_hold_skipped |= self.found_inf is not None
        return False

    def _count(self, states: list[dict[str, Any]]) -> None:
        """Add 1 to the `step` of each state; they become views of one tensor, as hundreds of additions take longer."""
        steps = [state["step"] for state in states]
        if [*map(Tensor.data_ptr, steps)] != self._addresses:
            self.count_skipped_steps()
            self._steps = torch.tensor([float(step) for step in steps], dtype=torch.float32, device="cpu")
            for state, step in zip(states, views := self._steps.unbind()):
                state["step"] = step
            self._addresses = [*map(Tensor.data_ptr, views)]
        self._steps += 1

    def _reads_skip(self) -> bool:
        """Read the flag, and unscale the gradients if the step is taken. Waits for the device if there is a flag."""
        if self.found_inf is None:
            return False
        self.step_was_skipped = bool(self.found_inf)
        if not self.step_was_skipped and (scale := self._grad_scale) is not None:
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                p.grad.div_(scale.to(p.grad.device))
        self.found_inf = None
        if "grad_scale" in self.__dict__:
            self.grad_scale = None
        return self.step_was_skipped

    @property
    def _grad_scale(self) -> Tensor | None:
        return getattr(self, "grad_scale", None)

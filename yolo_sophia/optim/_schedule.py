"""When a Hessian update is due: one schedule for all optimizers of the package and for the trainings of Ultralytics.

Its counters are keys of the parameter groups, so every state dict holds them and a resumed run continues the schedule.
All groups hold the same values; the first group is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch.optim import Optimizer

COUNTERS: Mapping[str, int | None] = MappingProxyType(
    {"hessian_age": None, "refresh_index": 0, "hessian_updates": 0, "hessian_dropped": 0}
)
"""Keys that count, with their values at the start: optimizer steps since h was last updated (None: never), estimates
made (with the seed, it determines the noise of the next one), updates of h, and estimates that were dropped."""


class HessianSchedule:
    """Decides when h is updated, and counts.

    An update is due at the first step, in each of the first `hessian_warmup` steps, and then every `hessian_interval`
    steps. A dropped estimate leaves the age as it is: the next step makes another one.

    Args:
        optimizer: Its groups hold the keys of `COUNTERS`, `hessian_interval` (None: no update is ever due) and
            optionally `hessian_warmup`.
    """

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer

    def __getitem__(self, key: str) -> Any:
        return self._optimizer.param_groups[0][key]

    def set(self, **values: Any) -> None:
        """Write keys into all groups."""
        for group in self._optimizer.param_groups:
            group.update(values)

    @property
    def due(self) -> bool:
        """Whether the next step needs a Hessian update."""
        if not self._is_due():
            return False
        if (count := getattr(self._optimizer, "count_skipped_steps", None)) is not None:
            count()  # the age may hold steps that the device has skipped
        return self._is_due()

    def _is_due(self) -> bool:
        interval, age = self["hessian_interval"], self["hessian_age"]
        if interval is None:
            return False
        warmup = self._optimizer.param_groups[0].get("hessian_warmup", 0)
        return age is None or age >= interval or self["refresh_index"] < warmup

    def estimated(self) -> int:
        """Count an estimate; returns its index, which determines its noise."""
        index = self["refresh_index"]
        self.set(refresh_index=index + 1)
        return index

    def updated(self) -> None:
        """Count an update of h."""
        self.set(hessian_age=0, hessian_updates=self["hessian_updates"] + 1)

    def dropped(self) -> int:
        """Count an estimate that was dropped; returns how many there are so far."""
        self.set(hessian_dropped=self["hessian_dropped"] + 1)
        return self["hessian_dropped"]

    def stepped(self) -> None:
        """Count a step of the optimizer."""
        if self["hessian_age"] is not None:
            self.set(hessian_age=self["hessian_age"] + 1)


def is_report_due(count: int) -> bool:
    """Whether an event that may come at every step is reported: the first time, then whenever the count has doubled."""
    return count & (count - 1) == 0

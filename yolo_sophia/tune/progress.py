"""The state of a study's trials for showing, as a comparison shows its runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from yolo_sophia.runs.scheduler import Progress
from yolo_sophia.tune.plan import TunePlan

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from yolo_sophia.tune.study import SharedStudy

REFRESH = 5.0
"""Seconds between two looks at what other processes do."""
SETTINGS, NOTE = "settings", "note"
"""Names under which a trial keeps what it searched as it was trained, and why it failed."""
STATES = {"RUNNING": "elsewhere", "COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}


def progress(plan: TunePlan, number: int, settings: Mapping[str, Any] | None = None) -> Progress:
    """The line of a trial; one that has not begun has no settings."""
    words = ", ".join(f"{key}={value}" for key, value in (settings or {}).items())
    run = plan.runs({})[0]
    arguments = {**run.arguments, "epochs": plan.trial_epochs}
    return Progress(replace(run, key=f"trial {number}" + (f": {words}" if words else ""), arguments=arguments))


class Board:
    """All trials: those trained here, those of other processes and of earlier calls, and those to come.

    Args:
        study: The study.
    """

    def __init__(self, study: SharedStudy):
        self._study, self._read = study, -REFRESH
        self._own: dict[int, Progress] = {}
        self._others: dict[int, Progress] = {}

    def hold(self, number: int, shown: Progress) -> None:
        """Show a trial that is trained here as its training keeps it up to date."""
        self._own[number] = shown

    def lines(self) -> list[Progress]:
        """A line per trial, by number."""
        if time.monotonic() - self._read >= REFRESH:
            self._read = time.monotonic()
            self._others = {trial.number: self._line(trial) for trial in self._study.trials}
        known = {**self._others, **self._own}
        for number in range(self._study.plan.trials):
            known.setdefault(number, progress(self._study.plan, number))
        return [known[number] for number in sorted(known)]

    def _line(self, trial: FrozenTrial) -> Progress:
        line = progress(self._study.plan, trial.number, trial.user_attrs.get(SETTINGS))
        line.state, line.epochs = STATES[trial.state.name], max(trial.intermediate_values, default=0)
        line.note = trial.user_attrs.get(NOTE) or ("" if trial.value is None else f"mAP50-95 {trial.value:.4f}")
        return line

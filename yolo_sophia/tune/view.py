"""The state of a study, for its report and the best settings.

Every trial that was begun is counted once, as finished, pruned, failed or running.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna

from yolo_sophia.tune.best_settings import BestSettings, best_settings
from yolo_sophia.tune.plan import TunePlan
from yolo_sophia.tune.study import NOTE, SETTINGS, STATES, SharedStudy


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: Its number, from 0.
        state: "finished", "pruned", "failed" or "running".
        value: Its score if it finished: the mean over its trainings of the last mAP50-95.
        settings: The searched arguments, as trained.
        curve: The score that the pruner saw after each epoch, by epoch of the trial.
        note: Why it failed.
        seconds: Wall time from start to end, interruptions included; None before the end.
    """

    number: int
    state: str
    value: float | None
    settings: Mapping[str, Any]
    curve: Mapping[int, float]
    note: str = ""
    seconds: float | None = None

    @property
    def score(self) -> float | None:
        """The score of a finished trial, or the last one of a pruned trial; None if there is none."""
        return next(reversed(self.curve.values()), None) if self.state == "pruned" else self.value


@dataclass(frozen=True)
class View:
    """A study as it stands.

    Attributes:
        plan: The plan.
        study: Optuna's study, for its plots.
        trials: Its trials by number.
        importance: Share of each argument, the largest first; empty for too few trials.
    """

    plan: TunePlan
    study: optuna.Study
    trials: tuple[Trial, ...]
    importance: Mapping[str, float]

    @classmethod
    def of(cls, study: SharedStudy) -> View:
        """Read a study."""
        made = []
        for found in study.trials:
            state = STATES[found.state.name]
            attributes, length = found.user_attrs, found.duration
            made.append(
                Trial(
                    found.number,
                    "running" if state == "elsewhere" else state,
                    found.value if state == "finished" else None,
                    attributes.get(SETTINGS, {}),
                    dict(sorted(found.intermediate_values.items())),
                    attributes.get(NOTE, "no sign of life from its process" if state == "failed" else ""),
                    None if length is None else length.total_seconds(),
                )
            )
        return cls(study.plan, study.study, tuple(made), study.importance())

    def having(self, state: str) -> list[Trial]:
        """Trials in a state."""
        return [trial for trial in self.trials if trial.state == state]

    @cached_property
    def best(self) -> Trial | None:
        """The finished trial with the largest value, the earliest of equals."""
        finished = self.having("finished")
        return max(finished, key=lambda trial: (trial.value, -trial.number)) if finished else None

    @cached_property
    def start(self) -> Trial | None:
        """The finished trial with the optimizer's own settings; None without one."""
        complete = self.plan.start.keys() == self.plan.space.keys()
        same = [t for t in self.having("finished") if complete and t.settings == dict(self.plan.start)]
        return same[0] if same else None

    @cached_property
    def best_settings(self) -> BestSettings | None:
        """The best settings as files; None before a trial has finished."""
        if self.best is None:
            return None
        return best_settings(self.plan, self.best.settings, self.best.value, len(self.trials))

"""The trials of a study as a queue of trainings, and what a trial reports of them.

A trial that is resumed finds its finished trainings, and the checkpoint of the interrupted one, in their folders.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from yolo_sophia.runs.results import MAP50_95
from yolo_sophia.runs.scheduler import Progress, folder_of
from yolo_sophia.runs.worker import read_curve
from yolo_sophia.tune.plan import TunePlan
from yolo_sophia.tune.study import NOTE, SETTINGS, STATES, Claim, SharedStudy

READ_INTERVAL = 5.0
"""Seconds between two looks at the trials of other processes."""
RETRY = 2.0
"""Seconds until a training that another process holds is tried again."""


class TrialQueue:
    """Trials of a study as a `Queue` of the scheduler: the trainings of a trial follow each other.

    With `wait`, it is done only when the trials of other processes have ended as well.
    """

    def __init__(self, study: SharedStudy, *, wait: bool = False):
        self._study, self._wait, self._read = study, wait, -math.inf
        self._active: list[Attempt] = []
        run = trial_progress(study.plan, 0, {}).run
        self._waiting = {n: Progress(replace(run, key=f"trial {n}")) for n in range(study.plan.trials)}
        self._others: dict[int, Progress] = {}
        self._own: dict[int, Progress] = {}
        self._refused: float | None = None

    def take(self) -> Progress | None:
        """The next training of a trial that was begun, or the first of another trial."""
        self._study.beat()
        now = time.monotonic()
        for attempt in self._active:
            if attempt.item is None and attempt.ready <= now:
                return attempt.begin()
        if self._refused is not None and (self._active or self._wait) and now - self._refused < READ_INTERVAL:
            return None
        if (claim := self._study.claim()) is None:
            self._refused = now
            return None
        self._refused = None
        attempt = Attempt(self._study.plan, claim)
        self._active.append(attempt)
        self._own[claim.trial.number] = attempt.shown
        return attempt.begin()

    def is_done(self) -> bool:
        """Whether no trial is left, here or to begin."""
        if self._active or self._refused is None:
            return False
        return not (self._wait and any(trial.state == TrialState.RUNNING for trial in self._study.trials))

    def should_stop(self, item: Progress) -> bool:
        """Report new epochs; whether the pruner stops the trial."""
        self._study.beat()
        return self._of(item).report()

    def ended(self, item: Progress) -> None:
        """Go on with the trial, or end it."""
        attempt = self._of(item)
        if (state := attempt.ended()) is not None:
            self._study.end(attempt.claim, state, attempt.value, attempt.failure)
            self._active.remove(attempt)

    def progress(self) -> list[Progress]:
        """All trials by number: those trained here, those of other processes and earlier calls, and those to come."""
        if time.monotonic() - self._read >= READ_INTERVAL:
            self._read = time.monotonic()
            self._others = {trial.number: self._shown(trial) for trial in self._study.trials}
        known = {**self._waiting, **self._others, **self._own}
        return [known[number] for number in sorted(known)]

    def _shown(self, trial: FrozenTrial) -> Progress:
        shown = trial_progress(self._study.plan, trial.number, trial.user_attrs.get(SETTINGS, {}))
        shown.state, shown.epochs = STATES[trial.state.name], max(trial.intermediate_values, default=0)
        shown.note = trial.user_attrs.get(NOTE) or ("" if trial.value is None else f"mAP50-95 {trial.value:.4f}")
        return shown

    def release(self) -> None:
        """Let other processes resume the trials that have not ended."""
        for attempt in self._active:
            attempt.claim.lock.release()

    def _of(self, item: Progress) -> Attempt:
        return next(attempt for attempt in self._active if attempt.item is item)


class Attempt:
    """A trial in training."""

    def __init__(self, plan: TunePlan, claim: Claim):
        self.plan, self.claim = plan, claim
        self._runs = plan.runs(claim.settings)
        self._finals: list[float] = []
        self._reported = set(claim.trial.study.get_trials(deepcopy=False)[claim.trial.number].intermediate_values)
        self._begun, self._pruned = time.monotonic(), False
        self.item: Progress | None = None
        self.ready = 0.0
        self.value: float | None = None
        self.failure = ""
        self.shown = trial_progress(plan, claim.trial.number, claim.settings)
        self.shown.before = sum(len(self._rows(number)) for number in range(len(self._runs)))

    def begin(self) -> Progress:
        """The next training."""
        self.item, self.shown.state = Progress(self._runs[len(self._finals)]), "running"
        return self.item

    def report(self) -> bool:
        """Report the new epochs to the pruner; whether it stops the trial."""
        rows = self._rows(len(self._finals))
        done = len(self._finals) * self.plan.epochs
        for row in rows:
            self._report_epoch(done + row["epoch"], row.get(MAP50_95))
        self.shown.state, self.shown.epochs = "running", done + len(rows)
        self.shown.seconds = time.monotonic() - self._begun
        return self._pruned

    def ended(self) -> TrialState | None:
        """Note the end of a training; returns how the trial ended, None while it goes on.

        After COMPLETE, `value` is its score: the mean over its trainings of the last mAP50-95; after FAIL, `failure`
        says why.
        """
        self.report()
        item, self.item = self.item, None
        if item.state == "elsewhere":
            self.ready = time.monotonic() + RETRY
            return None
        if item.state == "finished":
            rows = self._rows(len(self._finals))
            score = rows[-1].get(MAP50_95) if rows else None
            if score is None:
                return self._failed("the last mAP50-95 is not finite")
            self._finals.append(score)
            if len(self._finals) == len(self._runs):
                self.value = sum(self._finals) / len(self._finals)
                self.shown.state, self.shown.note = "finished", f"mAP50-95 {self.value:.4f}"
                return TrialState.COMPLETE
            if not self._pruned:
                return None
        if self._pruned:
            self.shown.state = "pruned"
            return TrialState.PRUNED
        return self._failed(item.note)

    def _rows(self, number: int) -> list[dict]:
        return read_curve(folder_of(self.plan.out, self._runs[number]))

    def _report_epoch(self, step: int, score: float | None) -> None:
        """Report an epoch: the mean of the finished trainings and of this one as it stands."""
        if step in self._reported or self._pruned:
            return
        self._reported.add(step)
        value = math.nan if score is None else sum([*self._finals, score]) / (len(self._finals) + 1)
        self.claim.trial.report(value, step)
        self._pruned = step < self.plan.trial_epochs and self.claim.trial.should_prune()

    def _failed(self, note: str) -> TrialState:
        self.shown.state, self.shown.note, self.failure = "failed", note, note
        return TrialState.FAIL


def trial_progress(plan: TunePlan, number: int, settings: Mapping[str, Any]) -> Progress:
    """The state of a trial for showing, as a comparison shows its runs."""
    words = ", ".join(f"{key}={value}" for key, value in settings.items())
    run = plan.runs({})[0]
    arguments = {**run.arguments, "epochs": plan.trial_epochs}
    return Progress(replace(run, key=f"trial {number}" + (f": {words}" if words else ""), arguments=arguments))

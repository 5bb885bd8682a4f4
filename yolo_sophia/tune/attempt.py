"""One trial while it is trained here: its trainings one after another, judged after each epoch.

The rule: the folders are the memory, as in a comparison. A trial that is taken up again finds its finished trainings
and the checkpoint of the cut one.
"""

from __future__ import annotations

import math
import threading
import time

from optuna.trial import TrialState

from yolo_sophia.runs.results import MAP50_95
from yolo_sophia.runs.scheduler import Progress, folder_of, is_finished, train_one
from yolo_sophia.runs.worker import read_curve
from yolo_sophia.tune.plan import TunePlan
from yolo_sophia.tune.progress import progress
from yolo_sophia.tune.study import Claim

RETRY = 2.0
"""Seconds until a training that another process holds is tried again."""


class Attempt:
    """A trial in training.

    Args:
        plan: The plan.
        claim: The trial.
        threads: Threads of the processor that a training has.
        device: Number of the GPU; None for the CPU.
    """

    def __init__(self, plan: TunePlan, claim: Claim, threads: int, device: str | None):
        self.plan, self.claim, self._threads, self._device = plan, claim, threads, device
        self._runs = plan.runs(claim.settings)
        self._finals: list[float] = []
        self._told = set(claim.trial.study.get_trials(deepcopy=False)[claim.trial.number].intermediate_values)
        self._stop, self._begun = threading.Event(), time.monotonic()
        self._pruned = False
        self.value: float | None = None
        self.failure = ""
        self.shown = progress(plan, claim.trial.number, claim.settings)
        self.shown.before = sum(len(read_curve(folder_of(plan.out, run))) for run in self._runs)
        self._start()

    def _start(self) -> None:
        self._item = Progress(self._runs[len(self._finals)])
        arguments = (self.plan.out, self._item, self._threads, self._device, self._stop)
        self._thread = threading.Thread(target=train_one, args=arguments, daemon=True)
        self._thread.start()

    def look(self) -> TrialState | None:
        """Report the new epochs, go on with the next training, and return how the trial ended; None while it goes on.

        After COMPLETE, `value` is its score: the mean over its trainings of the last mAP50-95; after FAIL, `failure`
        says why.
        """
        over = not self._thread.is_alive()  # asked before the curve is read: nothing is written after it
        rows = read_curve(folder_of(self.plan.out, self._item.run))
        done = len(self._finals) * self.plan.epochs
        for row in rows:
            self._tell(done + row["epoch"], row.get(MAP50_95))
        self.shown.state, self.shown.epochs = "running", done + len(rows)
        self.shown.seconds = time.monotonic() - self._begun
        if not over:
            return None
        if self._item.state == "elsewhere" and not self._stop.wait(RETRY):
            self._start()
            return None
        if is_finished(folder_of(self.plan.out, self._item.run)):
            return self._next(rows[-1].get(MAP50_95) if rows else None)
        if self._pruned:
            self.shown.state = "pruned"
            return TrialState.PRUNED
        return self._failed(self._item.note)

    def _tell(self, step: int, score: float | None) -> None:
        """Give an epoch to the pruner: the mean of the finished trainings and this one as it stands."""
        if step in self._told or self._pruned:
            return
        self._told.add(step)
        value = math.nan if score is None else sum([*self._finals, score]) / (len(self._finals) + 1)
        self.claim.trial.report(value, step)
        if step < self.plan.trial_epochs and self.claim.trial.should_prune():
            self._pruned = True
            self._stop.set()

    def _next(self, score: float | None) -> TrialState | None:
        if score is None:
            return self._failed("the last mAP50-95 is not finite")
        self._finals.append(score)
        if len(self._finals) < len(self._runs) and not self._pruned:
            self._start()
            return None
        if len(self._finals) < len(self._runs):
            self.shown.state = "pruned"
            return TrialState.PRUNED
        self.value = sum(self._finals) / len(self._finals)
        self.shown.state, self.shown.note = "finished", f"mAP50-95 {self.value:.4f}"
        return TrialState.COMPLETE

    def _failed(self, note: str) -> TrialState:
        self.shown.state, self.shown.note = "failed", note
        self.failure = note
        return TrialState.FAIL

    def stop(self) -> None:
        """End the training; its folder stays resumable and the trial is taken up by whoever comes next."""
        self._stop.set()
        self._thread.join(timeout=30)
        self.claim.lock.release()

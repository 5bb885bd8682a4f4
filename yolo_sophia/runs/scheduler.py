"""One loop that trains: it takes trainings from a queue, and an executor runs each in a process with its own folder.

All state is in the folders. A finished run has a receipt and is not repeated. The process that trains locks the folder,
so two invocations share the work. Everything else is resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from yolo_sophia.atomic import atomic_write
from yolo_sophia.runs.run import Run
from yolo_sophia.runs.worker import BUSY, FAILURE, LOG, RECEIPT, read_curve, write_order

LAST_LINES = 12
POLL = 0.5
"""Seconds between two rounds of the loop."""
LOCKED_OUT = 5.0
"""Seconds after which a worker that found its folder locked has ended."""
RETRY = 5.0
"""Seconds until a run that another process trains is tried again."""
STOP = 30.0
"""Seconds that trainings have to end after an interrupt."""


@dataclass
class Progress:
    """The state of a run.

    Attributes:
        run: The run.
        state: "waiting", "running", "finished", "failed" or "elsewhere" (another process trains it); a trial of `tune`
            also "pruned".
        epochs: Finished epochs.
        seconds: Wall time of this process's training so far.
        note: Last lines of the log of a failed run.
        before: Epochs that were finished before this process's training.
    """

    run: Run
    state: str = "waiting"
    epochs: int = 0
    seconds: float = 0.0
    note: str = ""
    before: int = 0


class Job:
    """A worker that an executor has started."""

    def started(self) -> bool:
        """Whether it runs; an executor may let it wait."""
        return True

    def poll(self) -> int | None:
        """The exit code, negative where a signal ended it; None while it runs."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ask it to end; its folder stays resumable."""
        raise NotImplementedError

    def explain(self) -> str:
        """What is known of a failure that is not in the log."""
        return ""


class Executor(Protocol):
    """Where workers run.

    Attributes:
        places: Workers that it takes at once; infinite where it queues them itself.
        threads: Processor threads of a worker.
    """

    places: float
    threads: int

    def start(self, folder: Path) -> Job:
        """Start the worker of a folder."""


class Queue(Protocol):
    """Trainings for the loop; the methods are described in `RunQueue`."""

    take: Callable[[], Progress | None]
    is_done: Callable[[], bool]
    should_stop: Callable[[Progress], bool]
    ended: Callable[[Progress], None]
    progress: Callable[[], list[Progress]]


class RunQueue:
    """Trainings for the loop: a fixed list of runs. Those that another process trains are tried again later."""

    def __init__(self, runs: Iterable[Run]):
        self._progress = [Progress(run) for run in runs]
        self._waiting = list(self._progress)
        self._elsewhere: list[tuple[float, Progress]] = []

    def take(self) -> Progress | None:
        """The next training; None while no training is ready."""
        if self._waiting:
            return self._waiting.pop(0)
        if self._elsewhere and self._elsewhere[0][0] <= time.monotonic():
            return self._elsewhere.pop(0)[1]
        return None

    def is_done(self) -> bool:
        """Whether no training will come once those that were taken have ended."""
        return not self._waiting and not self._elsewhere

    def should_stop(self, item: Progress) -> bool:
        """Whether a training in progress is to be stopped; asked once a round."""
        return False

    def ended(self, item: Progress) -> None:
        """Note that a training has ended, with its state set."""
        if item.state == "elsewhere":
            self._elsewhere.append((time.monotonic() + RETRY, item))

    def progress(self) -> list[Progress]:
        """The state of everything, for showing."""
        return self._progress


@dataclass
class _Active:
    item: Progress
    job: Job
    folder: Path
    begun: float | None = None
    stopped: bool = False


def folder_of(out: Path, run: Run) -> Path:
    """The run's folder."""
    return out / "runs" / run.key


def is_finished(folder: Path) -> bool:
    """Whether the run has its receipt."""
    return (folder / RECEIPT).is_file()


def train(
    out: Path, queue: Queue, executor: Executor, on_change: Callable[[list[Progress]], None] = lambda _: None
) -> None:
    """Train what a queue holds until it is done.

    On an exception, KeyboardInterrupt included, the trainings are stopped, their folders stay resumable, and the
    exception goes on to the caller.

    Args:
        out: Folder of results.
        queue: The trainings.
        executor: Where they run.
        on_change: Called about twice a second with the state of all trainings.
    """
    active: list[_Active] = []
    try:
        while True:
            while len(active) < executor.places and (item := queue.take()) is not None:
                if (begun := _start(out, item, executor)) is not None:
                    active.append(begun)
                else:
                    queue.ended(item)
            if not active and queue.is_done():
                break
            on_change(queue.progress())
            time.sleep(POLL)
            for one in list(active):
                code = one.job.poll()  # before the curve is read: nothing is written after the end
                _update(one)
                if not one.stopped and code is None and queue.should_stop(one.item):
                    one.stopped = True
                    one.job.stop()
                if code is not None:
                    active.remove(one)
                    _finalize(one.folder, one.item, code, stopped=one.stopped, why=one.job.explain())
                    queue.ended(one.item)
    except BaseException:
        for one in active:
            one.job.stop()
        end = time.monotonic() + STOP
        while any(one.job.poll() is None for one in active) and time.monotonic() < end:
            time.sleep(0.05)
        raise
    on_change(queue.progress())


def _start(out: Path, item: Progress, executor: Executor) -> _Active | None:
    """Start a training; None where there is nothing to train, with its state set."""
    folder = folder_of(out, item.run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        item.before, item.seconds = len(read_curve(folder)), 0.0
        if is_finished(folder):
            _finalize(folder, item, 0)
            return None
        write_order(folder, item.run, executor.threads)
        return _Active(item, executor.start(folder), folder)
    except OSError as error:  # such as a full disk: this run failed, the others go on
        item.state, item.note = "failed", f"{type(error).__name__}: {error}"
        return None


def _update(one: _Active) -> None:
    """Read the progress of a training from its folder."""
    if one.begun is None and not one.job.started():
        return
    one.begun = one.begun or time.monotonic()
    item = one.item
    item.epochs, item.seconds = len(read_curve(one.folder)), time.monotonic() - one.begun
    if item.state != "elsewhere" or item.seconds > LOCKED_OUT:
        item.state = "running"


def _finalize(folder: Path, item: Progress, code: int, *, stopped: bool = False, why: str = "") -> None:
    """Set the run's state from the exit code of its worker, negative where a signal ended it."""
    try:
        item.epochs = len(read_curve(folder))
        if is_finished(folder):
            item.state = "finished"
            (folder / FAILURE).unlink(missing_ok=True)
        elif code == BUSY:
            item.state, item.seconds = "elsewhere", 0.0
        elif stopped:
            item.state = "waiting"
        else:
            item.state, item.note = "failed", "\n".join(part for part in (last_lines(folder / LOG), why) if part)
            atomic_write(folder / FAILURE, item.note)
    except OSError as error:
        item.state, item.note = "failed", f"{type(error).__name__}: {error}"


def last_lines(log: Path) -> str:
    """The last lines of a log, progress bars left out."""
    text = log.read_bytes().decode("utf-8", errors="replace") if log.is_file() else ""
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]  # \r: a progress bar, as it was last
    return "\n".join([line for line in lines if line][-LAST_LINES:])

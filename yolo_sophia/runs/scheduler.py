"""Runs the trainings of a plan: workers side by side on this machine, each training a process with its own folder.

The rule: the folders are the only memory. A finished run has a receipt and is not repeated; a run that is being trained
is locked by the process that trains, so two invocations share the work; anything else is taken up again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from yolo_sophia.atomic import atomic_write
from yolo_sophia.runs.run import Run
from yolo_sophia.runs.worker import BUSY, ORDER, RECEIPT, read_curve

LAST_LINES = 12
LOG, FAILURE = "log.txt", "failure.txt"
LOCKED_OUT = 5.0
"""Seconds after which a worker that found its folder locked is gone."""


@dataclass
class Progress:
    """What is known of a run while the comparison goes on.

    Attributes:
        run: The run.
        state: "waiting", "running", "finished", "failed" or "elsewhere" (another process trains it); a trial
            of `tune` also "pruned": stopped as it fell behind.
        epochs: Finished epochs.
        seconds: Wall time of this process's training so far.
        note: Last lines of the log of a failed run.
        before: Epochs that were there before this process's training.
    """

    run: Run
    state: str = "waiting"
    epochs: int = 0
    seconds: float = 0.0
    note: str = ""
    before: int = 0


def folder_of(out: Path, run: Run) -> Path:
    """The run's folder."""
    return out / "runs" / run.key


def is_finished(folder: Path) -> bool:
    """Whether the run has its receipt."""
    return (folder / RECEIPT).is_file()


def execute(
    out: Path,
    runs: Iterable[Run],
    *,
    workers: int = 1,
    devices: tuple[str, ...] = (),
    on_change: Callable[[list[Progress]], None] = lambda _: None,
) -> list[Progress]:
    """Train what is missing, `workers` at a time.

    Args:
        out: Folder of the comparison.
        runs: The runs.
        workers: Processes side by side; each gets its share of the processor's threads.
        devices: GPU numbers, given to the workers in turn; none for the CPU.
        on_change: Called from this thread about twice a second with the state of all runs.

    Returns:
        The state of all runs at the end. On KeyboardInterrupt the trainings are stopped, their folders stay resumable,
        and the interrupt goes on to the caller.
    """
    board = [Progress(run) for run in runs]
    waiting = list(board)
    mutex, stopping = threading.Lock(), threading.Event()
    threads = max(1, (os.cpu_count() or 1) // workers)

    def work(slot: int) -> None:
        device = devices[slot % len(devices)] if devices else None
        while not stopping.is_set():
            with mutex:
                if not waiting:
                    return
                item = waiting.pop(0)
            train_one(out, item, threads, device, stopping)
            if item.state == "elsewhere":  # its turn comes again, after those that nobody trains yet
                with mutex:
                    waiting.append(item)
                    nothing_to_do = all(other.state == "elsewhere" for other in waiting)
                if nothing_to_do:
                    stopping.wait(5)

    pool = [threading.Thread(target=work, args=(slot,), daemon=True) for slot in range(workers)]
    for thread in pool:
        thread.start()
    try:
        while any(thread.is_alive() for thread in pool):
            on_change(board)
            time.sleep(0.5)
    except KeyboardInterrupt:
        stopping.set()
        for thread in pool:
            thread.join(timeout=30)
        raise
    on_change(board)
    return board


def train_one(out: Path, item: Progress, threads: int, device: str | None, stopping: threading.Event) -> None:
    """Train one run to its end, in a process of its own; returns with its state set.

    Args:
        out: Folder of the comparison.
        item: The run; kept up to date meanwhile.
        threads: Threads of the processor.
        device: Number of the GPU; None for the CPU.
        stopping: Set from another thread, it ends the training, whose folder stays resumable.
    """
    folder = folder_of(out, item.run)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    try:
        code = 0
        if not take_up(folder, item) and not stopping.is_set():
            write_order(folder, item, threads)
            item.state, start = "elsewhere" if item.state == "elsewhere" else "running", time.monotonic()
            process = start_worker(folder, environment)
            while process.poll() is None:
                if stopping.wait(0.5):
                    process.terminate()
                    process.wait()
                item.epochs, item.seconds = len(read_curve(folder)), time.monotonic() - start
                if item.seconds > LOCKED_OUT:
                    item.state = "running"
            code = process.returncode
        judge(folder, item, code, stopped=stopping.is_set())
    except OSError as error:  # a full disk, say: this run failed, the others go on
        item.state, item.note = "failed", f"{type(error).__name__}: {error}"


def take_up(folder: Path, item: Progress) -> bool:
    """Make the run's folder, note what is there already, and return whether the run is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    item.before, item.seconds = len(read_curve(folder)), 0.0
    return is_finished(folder)


def write_order(folder: Path, item: Progress, threads: int) -> None:
    """Write what the worker is to train, and with how many threads."""
    arguments = dict(item.run.arguments)
    tuples = [key for key, value in arguments.items() if isinstance(value, tuple)]  # JSON has lists only
    order = {**vars(item.run), "arguments": arguments, "threads": threads, **({"tuples": tuples} if tuples else {})}
    atomic_write(folder / ORDER, json.dumps(order, indent=1))


def start_worker(folder: Path, environment: Mapping[str, str], directory: str | None = None) -> subprocess.Popen[bytes]:
    """Start the training of a folder; what it prints goes to the folder's log."""
    with (folder / LOG).open("a", encoding="utf-8") as log:
        # A session of its own: Ctrl-C reaches this process alone, which then ends its trainings in order.
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        else:
            apart = {"start_new_session": True}
        return subprocess.Popen(
            [sys.executable, "-m", "yolo_sophia.runs.worker", str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            cwd=directory,
            **apart,
        )


def judge(folder: Path, item: Progress, code: int, *, stopped: bool = False, why: str = "") -> None:
    """Set the run's state when its worker has ended.

    Args:
        folder: The run's folder.
        item: The run.
        code: The worker's exit code, negative where a signal ended it.
        stopped: Whether it was ended by us.
        why: What is known of the failure beyond the log.
    """
    item.epochs = len(read_curve(folder))
    if is_finished(folder):
        item.state = "finished"
        (folder / FAILURE).unlink(missing_ok=True)
    elif code == BUSY:
        item.state, item.seconds = "elsewhere", 0.0
    elif stopped:
        item.state = "waiting"
    else:
        killed = f"ended by {signal.Signals(-code).name}" if code < 0 else ""
        item.state, item.note = "failed", "\n".join(part for part in (last_lines(folder / LOG), killed, why) if part)
        atomic_write(folder / FAILURE, item.note)


def last_lines(log: Path) -> str:
    """The last lines of a log, progress bars left out."""
    text = log.read_bytes().decode("utf-8", errors="replace") if log.is_file() else ""
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]  # \r: a progress bar, as it was last
    return "\n".join([line for line in lines if line][-LAST_LINES:])

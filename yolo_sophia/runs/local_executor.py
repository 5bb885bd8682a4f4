"""Runs workers side by side on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from yolo_sophia.runs.scheduler import Job
from yolo_sophia.runs.worker import LOG


class LocalExecutor:
    """Processes of this machine; each gets its share of the processor's threads.

    Args:
        places: Workers side by side.
        devices: GPU numbers, given to the workers in turn; none for the CPU.
    """

    def __init__(self, places: int = 1, devices: tuple[str, ...] = ()):
        self.places, self._devices = places, devices
        self.threads = max(1, (os.cpu_count() or 1) // places)
        self._jobs: list[LocalJob | None] = [None] * places

    def start(self, folder: Path) -> LocalJob:
        """Start the worker of a folder on the device of a place that is free."""
        place = next(i for i, job in enumerate(self._jobs) if job is None or job.poll() is not None)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[place % len(self._devices)]
        self._jobs[place] = job = LocalJob(start_worker(folder, environment))
        return job


class LocalJob(Job):
    """A worker process."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self._process = process

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()

    def explain(self) -> str:
        """The signal that ended the process, if one did."""
        code = self._process.returncode or 0
        return f"ended by {signal.Signals(-code).name}" if code < 0 else ""


def start_worker(folder: Path, environment: Mapping[str, str], directory: str | None = None) -> subprocess.Popen[bytes]:
    """Start the training of a folder; its output goes to the folder's log."""
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

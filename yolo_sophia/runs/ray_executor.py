"""Runs workers on an existing Ray cluster (`pip install "yolo-sophia[ray]"`, `ray start`).

A task only starts the worker of a folder on its node and waits for it. The folder of results has to be on storage that
all nodes see, under the same path and with locks (NFS 4, for example).
"""

from __future__ import annotations

import math
import os
import platform
import socket
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from yolo_sophia.runs.local_executor import start_worker
from yolo_sophia.runs.scheduler import Job, is_finished
from yolo_sophia.runs.worker import LOG, ORDER

PATIENCE = 60.0
"""Seconds that a file written on one node may take to be seen on another (NFS: `acdirmax`)."""


class RayExecutor:
    """Tasks of a Ray cluster.

    Runs have the environment of their node, and this process's working directory where the node has it.

    Args:
        cpus: Processors that Ray reserves for a run, and its threads.
        gpus: GPUs that Ray reserves for a run; with 0 it sees none.
        queue_all: Whether all runs are handed to Ray at once, so that nodes which join later get some.
        address: The cluster; "auto" takes `RAY_ADDRESS`, else the one on this machine.

    Raises:
        ValueError: Ray is not installed, or no node has room for a run.
        ConnectionError: No cluster is running.
    """

    def __init__(self, cpus: int = 1, gpus: float = 0.0, *, queue_all: bool = True, address: str = "auto"):
        self._ray = _connected(address)
        self.room = _room(self._ray, cpus, gpus)
        self.places: float = math.inf if queue_all else self.room
        self.threads = cpus
        self._remote = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_work)

    def start(self, folder: Path) -> RayJob:
        """Submit the worker of a folder."""
        return RayJob(self._ray, self._remote, folder.resolve(), self.threads)


class RayJob(Job):
    """A task that runs a worker."""

    def __init__(self, ray: Any, remote: Any, folder: Path, threads: int):
        self._ray, self._folder, self._mark = ray, folder, uuid.uuid4().hex
        log = folder / LOG
        self._log_size = log.stat().st_size if log.is_file() else 0
        self._started, self._ended, self._why = False, None, ""
        self._reference = remote.remote(str(folder), os.getcwd(), self._mark, threads)

    def started(self) -> bool:
        """Whether the task has begun: it writes its mark into the log."""
        if not self._started:
            log = self._folder / LOG
            self._started = log.is_file() and self._mark.encode() in log.read_bytes()[self._log_size :]
        return self._started

    def poll(self) -> int | None:
        """The exit code; None while the task waits or runs, or its receipt is still on its way from the node."""
        if not self._ray.wait([self._reference], timeout=0)[0]:
            return None
        code = 1
        try:
            code, self._why = self._ray.get(self._reference)
        except self._ray.exceptions.RayError as error:  # the node went away, the package is not there, ...
            self._why = f"{type(error).__name__}: {error}"
        self._ended = self._ended or time.monotonic()
        late = code == 0 and not is_finished(self._folder)
        return None if late and time.monotonic() - self._ended < PATIENCE else code

    def stop(self) -> None:
        """Cancel the task: a KeyboardInterrupt in it, which ends its worker."""
        self._ray.cancel(self._reference)

    def explain(self) -> str:
        """What went wrong outside the worker."""
        return self._why


def _room(ray: Any, cpus: int, gpus: float) -> int:
    """Number of runs that the cluster can take side by side, at least one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = [min(has.get("CPU", 0) // cpus, has.get("GPU", 0) // gpus if gpus else float("inf")) for has in nodes]
    if not sum(room):
        found = ", ".join(f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs" for has in nodes)
        raise ValueError(f"cpus={cpus} gpus={gpus:g}: no node of the Ray cluster has as much; found {found}.")
    return int(sum(room))


def _connected(address: str) -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError('engine=ray: Ray is not installed: pip install "yolo-sophia[ray]".') from None
    if not ray.is_initialized():
        where = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
        left = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
        known = left.read_text().strip() if where == "auto" and left.is_file() else where  # may be of an ended cluster
        host, _, port = known.rpartition("://")[2].rpartition(":")
        try:
            if port.isdigit():  # Ray itself waits for minutes where nobody answers, and then ends the process
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=where, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            raise ConnectionError(
                f"engine=ray: no Ray cluster at {where!r}: start one with `ray start --head` here and `ray start "
                f"--address=...` on the other nodes, or set RAY_ADDRESS ({' '.join(str(error).split())[:200]})."
            ) from None
    return ray


def _work(folder: str, directory: str, mark: str, threads: int) -> tuple[int, str]:
    """The task: run the worker of a folder on this node; returns its exit code, and what went wrong before it."""
    import ray

    context = ray.get_runtime_context()
    node = f"node {context.get_node_id()} ({platform.node()})"
    if not (Path(folder) / ORDER).is_file():
        return 1, f"{node} of the Ray cluster does not see {folder}: choose project=... on storage that all nodes see."
    with (Path(folder) / LOG).open("a", encoding="utf-8") as log:
        log.write(f"{node}, task {mark}\n")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = start_worker(Path(folder), environment, directory if os.path.isdir(directory) else None)
    try:
        while process.poll() is None:  # not wait(): a cancelled task is interrupted between two lines of Python
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    return process.returncode, ""

"""Spreads the trainings of a plan over an existing Ray cluster (`pip install "yolo-sophia[ray]"`, `ray start`).

The rule of `execute.py` holds: the folders are the only memory. A task only starts the worker of a folder on its node
and waits for it, so `out` has to be on storage that all nodes see, under the same path and with locks (NFS 4, say).
"""

from __future__ import annotations

import os
import platform
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_sophia.runs.run import Run
from yolo_sophia.runs.scheduler import (
    LOCKED_OUT,
    LOG,
    Progress,
    folder_of,
    is_finished,
    judge,
    start_worker,
    take_up,
    write_order,
)
from yolo_sophia.runs.worker import ORDER, read_curve

RETRY = 5.0
"""Seconds until a run that another process trains is looked at again."""
PATIENCE = 60.0
"""Seconds that a file written on one node may take to be seen on another (NFS: `acdirmax`)."""


@dataclass
class _Task:
    item: Progress
    folder: Path
    mark: str  # the task writes it into the log when it starts
    log_size: int
    started: float | None = None
    ended: float | None = None

    def look(self) -> None:
        """Bring the board up to date from the folder."""
        if self.started is None:
            log = self.folder / LOG
            if not log.is_file() or self.mark not in log.read_bytes()[self.log_size :].decode(errors="replace"):
                return  # waits for its place
            self.started = time.monotonic()
        item = self.item
        item.epochs, item.seconds = len(read_curve(self.folder)), time.monotonic() - self.started
        if item.state != "elsewhere" or item.seconds > LOCKED_OUT:
            item.state = "running"


def places(*, address: str = "auto", cpus: int = 1, gpus: float = 0.0) -> int:
    """Number of runs that the cluster can take side by side; connects to it and stays connected.

    Raises:
        ValueError: Ray is not installed, or no node has room for a run.
        ConnectionError: No cluster is running.
    """
    ray = _connected(address)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = [min(has.get("CPU", 0) // cpus, has.get("GPU", 0) // gpus if gpus else float("inf")) for has in nodes]
    if not sum(room):
        found = ", ".join(f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs" for has in nodes)
        raise ValueError(f"cpus={cpus} gpus={gpus:g}: no node of the Ray cluster has as much; found {found}.")
    return int(sum(room))


def execute_on_ray(
    out: Path,
    runs: Iterable[Run],
    *,
    address: str = "auto",
    cpus: int = 1,
    gpus: float = 0.0,
    on_change: Callable[[list[Progress]], None] = lambda _: None,
) -> list[Progress]:
    """Train what is missing, as many at a time as the cluster has room for.

    Runs have the environment of their node, and this process's working directory where the node has it.

    Args:
        out: Folder of the comparison, on storage that all nodes see.
        runs: The runs.
        address: The cluster; "auto" takes `RAY_ADDRESS`, else the one on this machine.
        cpus: Processors that Ray sets apart for a run, and its threads.
        gpus: GPUs that Ray sets apart for a run; with 0 it sees none.
        on_change: Called about twice a second with the state of all runs.

    Returns:
        The state of all runs at the end. On KeyboardInterrupt the trainings are stopped, their folders stay resumable,
        and the interrupt goes on to the caller.

    Raises:
        ValueError: Ray is not installed, or no node has room for a run.
        ConnectionError: No cluster is running.
    """
    places(address=address, cpus=cpus, gpus=gpus)
    ray = _connected(address)
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_work)
    board = [Progress(run) for run in runs]
    tasks: dict[Any, _Task] = {}
    parked: list[tuple[float, Progress]] = []

    def submit(item: Progress) -> None:
        folder, mark = folder_of(out.resolve(), item.run), uuid.uuid4().hex
        try:
            if take_up(folder, item):
                return judge(folder, item, 0)
            write_order(folder, item, cpus)
            log = folder / LOG
            task = _Task(item, folder, mark, log.stat().st_size if log.is_file() else 0)
            tasks[remote.remote(str(folder), os.getcwd(), mark, cpus)] = task
        except OSError as error:  # a full disk, say: this run failed, the others go on
            item.state, item.note = "failed", f"{type(error).__name__}: {error}"

    try:
        for item in board:
            submit(item)
        while tasks or parked:
            while parked and parked[0][0] <= time.monotonic():  # they came in this order
                submit(parked.pop(0)[1])
            ended = ray.wait(list(tasks), num_returns=len(tasks), timeout=0)[0] if tasks else []
            for reference in ended:
                if _settled(ray, reference, tasks[reference]):
                    item = tasks.pop(reference).item
                    if item.state == "elsewhere":
                        parked.append((time.monotonic() + RETRY, item))
            for task in tasks.values():
                task.look()
            on_change(board)
            time.sleep(0.5)
    except BaseException:
        for reference in tasks:
            ray.cancel(reference)  # a KeyboardInterrupt in the task, which ends its worker
        if tasks:
            ray.wait(list(tasks), num_returns=len(tasks), timeout=30)
        raise
    on_change(board)
    return board


def _connected(address: str) -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError('engine=ray: Ray is not installed: pip install "yolo-sophia[ray]".') from None
    if not ray.is_initialized():
        where = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
        left = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
        known = left.read_text().strip() if where == "auto" and left.is_file() else where  # also of one that has ended
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


def _settled(ray: Any, reference: Any, task: _Task) -> bool:
    """Judge a task that has ended; not yet where its receipt is still on its way from the node."""
    code, why = 1, ""
    try:
        code, why = ray.get(reference)
    except ray.exceptions.RayError as error:  # the node went away, the package is not there, ...
        why = f"{type(error).__name__}: {error}"
    task.ended = task.ended or time.monotonic()
    if code == 0 and not is_finished(task.folder) and time.monotonic() - task.ended < PATIENCE:
        return False
    try:
        judge(task.folder, task.item, code, why=why)
    except OSError as error:
        task.item.state, task.item.note = "failed", f"{type(error).__name__}: {error}"
    return True


def _work(folder: str, directory: str, mark: str, threads: int) -> tuple[int, str]:
    """The task: run the worker of a folder on this node; returns its exit code, and what went wrong before it."""
    import ray

    context = ray.get_runtime_context()
    node = f"node {context.get_node_id()} ({platform.node()})"
    if not (Path(folder) / ORDER).is_file():
        return 1, f"{node} of the Ray cluster does not see {folder}: put out=... on storage that all nodes see."
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

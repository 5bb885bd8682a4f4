"""The executor of a plan: this machine, or a Ray cluster."""

from __future__ import annotations

from yolo_sophia.runs.local_executor import LocalExecutor
from yolo_sophia.runs.plan import BasePlan
from yolo_sophia.runs.scheduler import Executor


def make_executor(plan: BasePlan, *, queue_all: bool = True) -> tuple[Executor, int]:
    """The executor of a plan, and how many trainings it runs side by side.

    With `queue_all`, a Ray cluster gets all trainings at once.

    Raises:
        ValueError: Ray is not installed, or no node has room for a training.
        ConnectionError: No Ray cluster is running.
    """
    if plan.engine == "ray":
        from yolo_sophia.runs.ray_executor import RayExecutor

        made = RayExecutor(plan.cpus or 1, plan.gpus or 0.0, queue_all=queue_all)
        return made, made.room
    return LocalExecutor(plan.local_workers, plan.devices), plan.local_workers

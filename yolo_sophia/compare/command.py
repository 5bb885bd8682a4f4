"""`yolo-sophia compare`: plan -> tune -> run -> report."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from yolo_sophia.atomic import atomic_write
from yolo_sophia.compare.plan import KEYS, Plan, parse, plan_yaml, runs
from yolo_sophia.compare.preflight import examine_plan
from yolo_sophia.compare.tuning import Search, check_tuning, tune
from yolo_sophia.runs.executors import make_executor
from yolo_sophia.runs.plan import check_data, describe_keys
from yolo_sophia.runs.progress import showing
from yolo_sophia.runs.results import load
from yolo_sophia.runs.run import Run
from yolo_sophia.runs.scheduler import Progress, RunQueue
from yolo_sophia.runs.scheduler import train as train_queue


def help_text() -> str:
    """The keys of a plan, one line each."""
    example = "yolo-sophia compare data=my.yaml model=yolov8n.pt epochs=50 optimizers=SophiaG,AdamW seeds=3"
    return describe_keys(example, KEYS, "Every Ultralytics argument is passed on to every arm.")


def main(words: Sequence[str]) -> int:
    """Run a comparison; 0 when all runs finished, 1 when some failed.

    Raises:
        ValueError: The plan is not valid.
        KeyboardInterrupt: Interrupted by the user; the same command resumes.
    """
    plan = parse(words)
    if plan.dry_run:
        return dry_run(plan)
    return finish(plan, *train(plan))


def dry_run(plan: Plan) -> int:
    """Print the plan and what it would cost; returns 0."""
    from yolo_sophia.compare.estimate import estimate

    print(estimate(plan))
    return 0


def train(plan: Plan) -> tuple[list[Run], list[Progress], list[Search]]:
    """Save the plan, tune, and train what is missing; returns the runs, their states, and the record of the tuning.

    Raises:
        ValueError: A data set or a package is missing.
    """
    check_data(plan)
    check_tuning(plan)
    plan.out.mkdir(parents=True, exist_ok=True)
    atomic_write(plan.out / "plan.yaml", plan_yaml(plan))
    examine_plan(plan)
    searches, tuned = tune(plan)
    ordered = runs(plan, tuned)
    queue = RunQueue(ordered)
    executor, places = make_executor(plan)
    with showing("compare", places) as show:
        train_queue(plan.out, queue, executor, show)
    return ordered, queue.progress(), searches


def finish(
    plan: Plan,
    ordered: Sequence[Run],
    progress: Sequence[Progress],
    searches: Sequence[Search],
    coco: Mapping[str, Mapping[str, float]] | None = None,
) -> int:
    """Write the report and name the runs that did not finish; 0 when all did, else 1.

    `ordered`, `progress` and `searches` are what `train` returns; `coco` has COCO metrics by run key.
    """
    from yolo_sophia.compare.report import write_report

    page = write_report(plan, load(plan.out, ordered), plan.out, searches=searches, coco=coco)
    failed = [item for item in progress if item.state != "finished"]
    for item in failed:
        print(f"{item.run.key} {item.state}:\n{item.note}", file=sys.stderr)
    print(f"report: {page}")
    return 1 if failed else 0

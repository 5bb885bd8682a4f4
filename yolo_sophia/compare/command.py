"""`yolo-sophia compare`: plan -> tune -> run -> report."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from yolo_sophia.atomic import atomic_write
from yolo_sophia.compare.plan import KEYS, Plan, parse, plan_yaml, runs
from yolo_sophia.compare.tuning import Search, choose, trial_runs
from yolo_sophia.runs.plan import check_data
from yolo_sophia.runs.progress import showing
from yolo_sophia.runs.results import load
from yolo_sophia.runs.run import Run
from yolo_sophia.runs.scheduler import Progress, execute


def help_text() -> str:
    """The keys of a plan, one line each."""
    lines = ["yolo-sophia compare data=my.yaml model=yolov8n.pt epochs=50 optimizers=SophiaG,AdamW seeds=3", ""]
    lines += [f"  {key:<15} {spec.meaning}" for key, spec in KEYS.items()]
    return "\n".join([*lines, "", "Any Ultralytics argument passes through to every arm."])


def main(words: Sequence[str]) -> int:
    """Run a comparison; 0 when all runs finished, 1 when some failed.

    Raises:
        ValueError: The plan is not valid.
        KeyboardInterrupt: Stopped by the user; running the same command again goes on.
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
    """Keep the plan, tune, and train what is missing; returns the runs, their states, and the record of the tuning.

    Raises:
        ValueError: A data set is not there.
    """
    check_data(plan)
    plan.out.mkdir(parents=True, exist_ok=True)
    atomic_write(plan.out / "plan.yaml", plan_yaml(plan))
    searches, tuned = tune(plan)
    ordered = runs(plan, tuned)
    return ordered, _run(plan, ordered, "compare"), searches


def finish(
    plan: Plan,
    ordered: Sequence[Run],
    board: Sequence[Progress],
    searches: Sequence[Search],
    coco: Mapping[str, Mapping[str, float]] | None = None,
) -> int:
    """Write the report and name the runs that did not finish; 0 when all did, else 1.

    Args:
        plan: The plan.
        ordered: Its runs.
        board: Their states.
        searches: The record of the tuning.
        coco: COCO metrics by run key, for the report.
    """
    from yolo_sophia.compare.report import write_report

    page = write_report(plan, load(plan.out, ordered), plan.out, searches=searches, coco=coco)
    failed = [item for item in board if item.state != "finished"]
    for item in failed:
        print(f"{item.run.key} {item.state}:\n{item.note}", file=sys.stderr)
    print(f"report: {page}")
    return 1 if failed else 0


def tune(plan: Plan) -> tuple[list[Search], dict[tuple[str, str], dict[str, float]]]:
    """Spend the tuning budget; returns the record, and the settings chosen by arm and data set."""
    if not plan.tune_trials:
        return [], {}
    trials = trial_runs(plan)
    _run(plan, [run for group in trials.values() for _, run in group], "tune")
    searches, tuned = [], {}
    for (arm, data), group in trials.items():
        results = load(plan.out, [run for _, run in group])
        search = choose(arm, data, [(changed, result) for (changed, _), result in zip(group, results)])
        searches.append(search)
        tuned[arm, data] = dict(search.chosen)
    return searches, tuned


def _run(plan: Plan, ordered: list[Run], title: str) -> list[Progress]:
    if plan.engine == "ray":
        from yolo_sophia.runs.ray_executor import execute_on_ray, places

        share = {"cpus": plan.cpus or 1, "gpus": plan.gpus or 0.0}
        with showing(title, places(**share)) as show:
            return execute_on_ray(plan.out, ordered, **share, on_change=show)
    workers = plan.local_workers
    with showing(title, workers) as show:
        return execute(plan.out, ordered, workers=workers, devices=plan.devices, on_change=show)

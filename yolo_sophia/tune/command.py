"""`yolo-sophia tune`: plan -> trials -> best settings and report."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from yolo_sophia.atomic import atomic_write
from yolo_sophia.runs.plan import check_data
from yolo_sophia.runs.progress import showing
from yolo_sophia.runs.scheduler import Progress
from yolo_sophia.search_space import FORMS
from yolo_sophia.tune.plan import KEYS, TunePlan, parse, plan_yaml
from yolo_sophia.tune.progress import REFRESH, Board

if TYPE_CHECKING:
    from yolo_sophia.tune.attempt import Attempt
    from yolo_sophia.tune.study import SharedStudy


def help_text() -> str:
    """The keys of a plan, one line each."""
    lines = ["yolo-sophia tune data=my.yaml model=yolov8n.pt epochs=20 optimizer=SophiaG trials=30", ""]
    lines += [f"  {key:<15} {spec.meaning}" for key, spec in KEYS.items()]
    lines += ["", f"An entry of `space` is {FORMS}.", "Any Ultralytics argument passes through to every trial."]
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    """Run a study; 0 when a trial finished, 1 when none did.

    Raises:
        ValueError: The plan is not valid, or a package or a data set is missing.
        OSError: The storage cannot be written to any more.
        KeyboardInterrupt: Stopped by the user; running the same command again goes on.
    """
    plan = parse(words)
    if plan.dry_run:
        from yolo_sophia.tune.estimate import estimate

        print(estimate(plan))
        return 0
    check_packages(plan)
    check_data(plan)
    from yolo_sophia.tune.study import SharedStudy, StorageError  # Optuna is imported from here on

    study = SharedStudy(plan)
    atomic_write(plan.out / "plan.yaml", plan_yaml(plan))
    try:
        with showing("tune", plan.local_workers) as show:
            run(study, show)
    except KeyboardInterrupt:
        finish(study)
        raise
    except StorageError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise OSError(f"storage={plan.storage}: {reason}. The same command goes on from what is there.") from None
    return finish(study)


def check_packages(plan: TunePlan) -> None:
    """Refuse a study whose packages are not installed.

    Raises:
        ValueError: One is missing.
    """
    for package in ("optuna", *["cmaes"] * (plan.sampler == "cmaes")):
        if find_spec(package) is None:
            raise ValueError(f'tune needs the package {package}, which is missing: pip install "yolo-sophia[tune]".')


def run(study: SharedStudy, show: Callable[[list[Progress]], None]) -> None:
    """Train trials, as many side by side as the plan has workers, until none is left to begin.

    Args:
        study: The study; other processes may be at it too.
        show: Called about twice a second with the state of all trials.
    """
    from yolo_sophia.tune.attempt import Attempt

    plan, devices = study.plan, study.plan.devices
    threads = max(1, (os.cpu_count() or 1) // plan.local_workers)
    slots: list[Attempt | None] = [None] * plan.local_workers
    board, refused = Board(study), -REFRESH
    try:
        while True:
            study.beat()
            for slot, attempt in enumerate(slots):
                waited = time.monotonic() - refused >= REFRESH
                if attempt is None and (waited or not any(slots)):
                    if (claim := study.claim()) is None:
                        refused = time.monotonic()
                        continue
                    slots[slot] = Attempt(plan, claim, threads, devices[slot % len(devices)] if devices else None)
                    board.hold(claim.trial.number, slots[slot].shown)
            if not any(slots):
                break
            time.sleep(0.5)
            for slot, attempt in enumerate(slots):
                if attempt and (state := attempt.look()) is not None:
                    study.end(attempt.claim, state, attempt.value, attempt.failure)
                    slots[slot] = None
            show(board.lines())
    except BaseException:
        for attempt in filter(None, slots):
            attempt.stop()
        raise


def finish(study: SharedStudy) -> int:
    """Write the report and the best settings, and say where they are; 0 when a trial finished, else 1."""
    from yolo_sophia.tune.report import write_report
    from yolo_sophia.tune.view import View

    view = View.of(study)
    page = write_report(view)
    for trial in view.having("failed"):
        print(f"trial {trial.number} failed:\n{trial.note}", file=sys.stderr)
    if view.best is None:
        print(f"no trial has finished yet; report: {page}")
        return 1
    print(f"best: trial {view.best.number}, mAP50-95 {view.best.value:.4f}; use it: {view.outcome.command}")
    print(f"report: {page}")
    return 0

"""`yolo-sophia tune`: plan -> trials -> best settings and report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

from yolo_sophia.atomic import atomic_write
from yolo_sophia.runs.executors import make_executor
from yolo_sophia.runs.plan import check_data, describe_keys
from yolo_sophia.runs.progress import showing
from yolo_sophia.runs.scheduler import Executor, Progress, train
from yolo_sophia.search_space import FORMS
from yolo_sophia.tune.plan import KEYS, TunePlan, parse, plan_yaml

if TYPE_CHECKING:
    from yolo_sophia.tune.study import SharedStudy
    from yolo_sophia.tune.view import View

OLDEST_OPTUNA = (4, 9)


def help_text() -> str:
    """The keys of a plan, one line each."""
    example = "yolo-sophia tune data=my.yaml model=yolov8n.pt epochs=20 optimizer=SophiaG trials=30"
    rest = f"An entry of `space` is {FORMS}.\nEvery Ultralytics argument is passed on to every trial."
    return describe_keys(example, KEYS, rest)


def main(words: Sequence[str]) -> int:
    """Run a study; 0 when a trial finished, 1 when none did.

    Raises:
        ValueError: The plan is not valid, or a package or a data set is missing.
        OSError: The storage cannot be written to any more.
        KeyboardInterrupt: Interrupted by the user; the same command resumes.
    """
    plan = parse(words)
    if plan.dry_run:
        from yolo_sophia.tune.estimate import estimate

        print(estimate(plan))
        return 0
    check_packages(plan.sampler)
    check_data(plan)
    return finish(run_study(plan, standalone=True))


def check_packages(sampler: str, what: str = "tune", extra: str = "tune") -> None:
    """Refuse a study whose packages are not installed; `what` needs them, and the extra `extra` installs them.

    Raises:
        ValueError: One is missing, or too old.
    """
    for package in ("optuna", *["cmaes"] * (sampler == "cmaes")):
        if find_spec(package) is None:
            raise ValueError(
                f'{what} needs the package {package}, which is missing: pip install "yolo-sophia[{extra}]".'
            )
    found = metadata.version("optuna")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_OPTUNA:
        oldest = ".".join(map(str, OLDEST_OPTUNA))
        raise ValueError(f'{what} needs optuna>={oldest}, found {found}: pip install "yolo-sophia[{extra}]".')


def run_study(plan: TunePlan, title: str = "tune", *, standalone: bool = False) -> View:
    """Train the trials of a study that are missing; returns the study as it stands then.

    A `standalone` study saves its plan, and writes a report after an interrupt. Any other is part of a comparison, and
    returns when the trials of other processes have ended as well.

    Raises:
        ValueError: The storage cannot be opened, or it holds another study under this name.
        OSError: The storage cannot be written to any more.
        KeyboardInterrupt: Interrupted by the user.
    """
    from yolo_sophia.tune.study import SharedStudy, StorageError  # Optuna is imported from here on
    from yolo_sophia.tune.view import View

    study = SharedStudy(plan)
    if standalone:
        atomic_write(plan.out / "plan.yaml", plan_yaml(plan))
    executor, places = make_executor(plan, queue_all=False)
    try:
        with showing(title, places) as show:
            train_trials(study, executor, show, wait=not standalone)
        return View.of(study)
    except KeyboardInterrupt:
        if standalone:
            finish(View.of(study))
        raise
    except StorageError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise OSError(f"storage={plan.storage}: {reason}. Rerun the command to resume.") from None


def train_trials(
    study: SharedStudy, executor: Executor, show: Callable[[list[Progress]], None], *, wait: bool = False
) -> None:
    """Train trials until none is left to begin; other processes may take part in the study.

    `show` is called about twice a second with the state of all trials. With `wait`, the trials of other processes have
    ended as well on return.
    """
    from yolo_sophia.tune.objective import TrialQueue

    queue = TrialQueue(study, wait=wait)
    try:
        train(study.plan.out, queue, executor, show)
    finally:
        queue.release()


def finish(view: View) -> int:
    """Write the report and the best settings, and say where they are; 0 when a trial finished, else 1."""
    from yolo_sophia.tune.report import write_report

    page = write_report(view)
    for trial in view.having("failed"):
        print(f"trial {trial.number} failed:\n{trial.note}", file=sys.stderr)
    if view.best is None:
        print(f"no trial has finished yet; report: {page}")
        return 1
    print(f"best: trial {view.best.number}, mAP50-95 {view.best.value:.4f}; use it: {view.best_settings.command}")
    print(f"report: {page}")
    return 0

"""The study in Optuna's storage, as several processes share it.

A trial belongs to the process that has its lock. A running trial of this folder whose lock is free was interrupted, and
is resumed under its own number. Trials of other folders (of machines that share only the storage) are watched through
Optuna's heartbeats: without one for `GRACE` seconds a trial fails, and Optuna queues it again.
"""

from __future__ import annotations

import json
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from yolo_sophia.atomic import atomic_write
from yolo_sophia.runs.plan import TRIAL_SEED
from yolo_sophia.search_space import Choice, Dimension
from yolo_sophia.tune.plan import TunePlan

BEAT, GRACE = 60, 600
"""Seconds between two heartbeats, and after which a trial without one has failed."""
RETRIES = 3
"""How often a trial that failed for lack of heartbeats is tried again."""
ENOUGH = 4
"""Finished trials from which on importances are computed."""
IDENTITY, FOLDER, AS_GIVEN, SETTINGS, NOTE = "identity", "folder", "as given", "settings", "note"
"""User attributes: the plan of a study; the folder of a trial, whether it changes nothing, what it searched (as it was
trained), and why it failed."""
STATES = {"RUNNING": "elsewhere", "COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
"""Optuna's states as a comparison names them."""
StorageError = (SQLAlchemyError, optuna.exceptions.StorageInternalError)
"""What a storage that is full, locked or gone raises during a study."""
LOCKS, FOLDER_ID = ".locks", ".folder"


@dataclass
class Claim:
    """A trial that this process holds.

    Attributes:
        trial: The trial.
        settings: What it searches, as it is trained.
        lock: Free again when the process ends, however it ends.
    """

    trial: optuna.Trial
    settings: dict[str, Any]
    lock: FileLock = field(repr=False)


class SharedStudy:
    """A study as this process sees it; `study` is Optuna's.

    Raises:
        ValueError: The storage cannot be opened, or it holds another study under this name.
    """

    def __init__(self, plan: TunePlan):
        self.plan, self._beaten = plan, 0.0
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")  # `beat` records them
        found = self._open(create=False)
        if found is not None:
            self._check_same(found)
        self._locks = plan.out / LOCKS / plan.study
        self._locks.mkdir(parents=True, exist_ok=True)
        with self._queue():
            folder = self._locks.parent / FOLDER_ID
            if not folder.is_file():
                atomic_write(folder, uuid.uuid4().hex)
            self.folder = folder.read_text(encoding="utf-8")
            self.study = found or self._open(create=True)
            self._check_same(self.study)
            if not self.study.get_trials(deepcopy=False):
                self.study.set_user_attr(IDENTITY, plan.identity())
            self._plan_ahead()

    def _open(self, *, create: bool) -> optuna.Study | None:
        url, name = self.plan.storage, self.plan.study
        file = Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None
        if file is not None and not file.is_file() and not create:
            return None
        try:
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
            patience = {"connect_args": {"timeout": 60}} if file is not None else {}
            self.storage = optuna.storages.RDBStorage(
                url, patience, heartbeat_interval=BEAT, grace_period=GRACE, heartbeat_stale_trial_callback=_retry
            )
            if not create and name not in optuna.get_all_study_names(self.storage):
                return None
            pruner = make_pruner(self.plan)
            return optuna.create_study(
                storage=self.storage, study_name=name, direction="maximize", load_if_exists=True, pruner=pruner
            )
        except (SQLAlchemyError, ImportError, RuntimeError, optuna.exceptions.OptunaError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(f"storage={url} cannot be opened: {reason}") from None

    def _check_same(self, study: optuna.Study) -> None:
        there, mine = study.user_attrs.get(IDENTITY), json.loads(json.dumps(self.plan.identity()))
        if there is None and not study.get_trials(deepcopy=False):
            return
        if there is None:
            raise ValueError(f"study={self.plan.study}: the storage has one that is not yolo-sophia's; name another.")
        if differing := [key for key in {**mine, **there} if mine.get(key) != there.get(key)]:
            shown = "; ".join(f"{key}: {there.get(key)!r} there, {mine.get(key)!r} here" for key in differing)
            raise ValueError(
                f"study={self.plan.study} in {self.plan.storage} has other arguments ({shown}). Use the same "
                "arguments to resume it, or another name= or study= to start a new study."
            )

    def _plan_ahead(self) -> None:
        """Queue the trials that no sampler proposes: the optimizer's own settings, or every point of the grid."""
        if self.plan.sampler == "grid":
            for point in self.plan.grid():
                self.study.enqueue_trial(point, skip_if_exists=True)
        elif not self.study.get_trials(deepcopy=False) and (self.plan.start or self.plan.first_as_given):
            self.study.enqueue_trial(dict(self.plan.start), user_attrs={AS_GIVEN: self.plan.first_as_given})

    @contextmanager
    def _queue(self) -> Iterator[None]:
        """Let one process at a time choose its trial, through a lock of the database or beside its file."""
        url = make_url(self.plan.storage)
        if url.get_backend_name() == "sqlite":
            folder = Path(url.database or "").parent / LOCKS / self.plan.study
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "queue"):
                yield
            return
        engine, name = create_engine(url, poolclass=NullPool), {"name": f"yolo-sophia {self.plan.study}"}
        with engine.begin() as connection:  # a lock ends with its connection
            if engine.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), name)
            elif engine.dialect.name in {"mysql", "mariadb"}:
                connection.execute(text("SELECT GET_LOCK(SHA1(:name), -1)"), name)
            with FileLock(self._locks / "queue"):
                yield

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials that were begun, retries included, by number."""
        return [t for t in self.study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]

    def claim(self) -> Claim | None:
        """Resume a trial that was interrupted, or begin one; None where nothing is left to begin."""
        with self._queue():
            trials = self.study.get_trials(deepcopy=False)
            begun = [trial for trial in trials if trial.state != TrialState.WAITING]
            self.study.sampler = make_sampler(self.plan, len(begun))
            for trial in begun:  # without a folder: its process was killed before it noted the folder
                mine = trial.user_attrs.get(FOLDER, self.folder) == self.folder
                if trial.state == TrialState.RUNNING and mine and (lock := self._lock(trial.number)):
                    return self._claimed(optuna.Trial(self.study, trial._trial_id), lock)
            for trial in trials:
                if trial.state == TrialState.WAITING and _is_retry(trial):
                    if self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                        return self._claimed(optuna.Trial(self.study, trial._trial_id), self._lock(trial.number))
            if sum(not _is_retry(trial) for trial in begun) >= self.plan.trials:
                return None
            trial = self.study.ask()
            return self._claimed(trial, self._lock(trial.number))

    def _lock(self, number: int) -> FileLock | None:
        lock = FileLock(self._locks / f"trial-{number}", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def _claimed(self, trial: optuna.Trial, lock: FileLock | None) -> Claim:
        if lock is None:
            raise RuntimeError(f"trial {trial.number} is new, and locked in {self._locks}")
        trial.set_user_attr(FOLDER, self.folder)
        as_given = trial.user_attrs.get(AS_GIVEN, False)
        space = {key: dimension for key, dimension in self.plan.space.items() if not as_given or key in self.plan.start}
        settings = {key: dimension.rounded(_suggest(trial, key, dimension)) for key, dimension in space.items()}
        settings = {} if as_given else settings
        trial.set_user_attr(SETTINGS, settings)
        self.storage.record_heartbeat(trial._trial_id)
        return Claim(trial, settings, lock)

    def end(self, claim: Claim, state: TrialState, value: float | None = None, note: str = "") -> None:
        """Close a trial; one that has failed for lack of heartbeats stays so."""
        if note:
            claim.trial.set_user_attr(NOTE, note)
        self.study.tell(claim.trial, value, state if value is None else None, skip_if_finished=True)
        claim.lock.release()

    def beat(self) -> None:
        """Once a minute, record Optuna's heartbeat for the trials of this folder, and fail those without one.

        Optuna records heartbeats in `Study.optimize` only. Interrupted trials of this folder get one too: they are
        resumed here under their own numbers.
        """
        if self._beaten and time.monotonic() - self._beaten < BEAT:
            return
        self._beaten = time.monotonic()
        for trial in self.trials:
            if trial.state == TrialState.RUNNING and trial.user_attrs.get(FOLDER) == self.folder:
                self.storage.record_heartbeat(trial._trial_id)
        optuna.storages.fail_stale_trials(self.study)

    def importance(self) -> Mapping[str, float]:
        """PED-ANOVA importances, the largest first, of sum 1; empty for too few finished trials or equal values."""
        finished = [t for t in self.trials if t.state == TrialState.COMPLETE]
        if len(finished) < ENOUGH or len({t.value for t in finished}) < 2:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return optuna.importance.get_param_importances(self.study, evaluator=evaluator)


def _retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial again whose process is gone; it belongs to the folder that takes it."""
    trial.user_attrs.pop(FOLDER, None)
    optuna.storages.RetryHeartbeatStaleTrialCallback(RETRIES, inherit_intermediate_values=True)(study, trial)


def _is_retry(trial: FrozenTrial) -> bool:
    return bool(optuna.storages.RetryHeartbeatStaleTrialCallback.retry_history(trial))


def _suggest(trial: optuna.Trial, key: str, dimension: Dimension) -> Any:
    if isinstance(dimension, Choice):
        return trial.suggest_categorical(key, dimension.values)
    suggest = trial.suggest_int if dimension.is_int else trial.suggest_float
    return suggest(key, dimension.low, dimension.high, log=dimension.log)


def make_sampler(plan: TunePlan, number: int) -> optuna.samplers.BaseSampler:
    """A sampler for one trial, seeded by its number: an interrupted study continues as if it had not been.

    Raises:
        ValueError: sampler=cmaes without the package cmaes.
    """
    seed = TRIAL_SEED + number
    if plan.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    if plan.sampler == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    return optuna.samplers.RandomSampler(seed=seed)  # a grid's points are queued: nothing is left to sample


def make_pruner(plan: TunePlan) -> optuna.pruners.BasePruner:
    """The pruner; its steps are the epochs of a trial."""
    if plan.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=plan.prune_after)
    if plan.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=plan.prune_after, max_resource=plan.trial_epochs)
    return optuna.pruners.NopPruner()

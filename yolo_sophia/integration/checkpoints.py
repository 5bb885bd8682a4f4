"""Atomic checkpoints: whenever a process is killed, a checkpoint has its old or its new content.

Files are written into a staging folder beside the checkpoints, which is never read, and each is moved to its name in
one rename. A staging folder has a lock that its process holds; one with a free lock was left by a killed process.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ultralytics.utils import LOGGER

from yolo_sophia.atomic import flush_to_disk, replace_with_retry

KEEP_FLOAT32 = "keep_float32"
"""Key of the parameter groups of optimizers built here: their state is saved as it is."""

SOPHIA_STATE = {"step", "exp_avg", "hessian", "hessian_updates"}
"""State that the optimizers of this package keep for a parameter, and no other optimizer does."""

STAGING = ".partial"
"""How the names of staging folders begin."""

_STRIP_ATOMICALLY: ContextVar[bool] = ContextVar("strip_atomically", default=False)


@contextlib.contextmanager
def staged(weights: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; its files then replace those of the same names in `weights`.

    last.pt is moved last: a training that is killed before that repeats its epoch, and writes best.pt again.
    """
    remove_stale(weights)
    folder = weights / f"{STAGING}-{uuid.uuid4().hex[:12]}"
    weights.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(NotImplementedError):  # without locks nothing is considered stale
            stack.enter_context(_lock_of(folder))  # before the folder exists: an unlocked folder is a stale one
        try:
            folder.mkdir()
            yield folder
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "last.pt"):
                flush_to_disk(path)
                replace_with_retry(path, weights / path.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_stale(weights: Path) -> None:
    """Remove the staging folders of processes that were killed."""
    for folder in weights.glob(f"{STAGING}*"):
        if folder.is_dir():
            with contextlib.suppress(Timeout, NotImplementedError), _lock_of(folder):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock_of(folder: Path) -> Iterator[None]:
    """Hold the lock of a staging folder, a file beside it; `filelock.Timeout` if another process or thread holds it."""
    path = folder.with_name(f"{folder.name}.lock")
    with FileLock(path, timeout=0):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows: it is open, and removed on release
                path.unlink()


def save_atomically(trainer: Any, save: Callable[[], Any]) -> Any:
    """Call `save`, the trainer's `save_model`, with the trainer's paths in a staging folder; return its result."""
    paths = {name: getattr(trainer, name) for name in ("wdir", "last", "best")}
    with staged(paths["wdir"]) as folder:
        try:
            vars(trainer).update(wdir=folder, last=folder / paths["last"].name, best=folder / paths["best"].name)
            return save()
        finally:
            vars(trainer).update(paths)


def convert_others(convert: Callable[[dict], dict], state_dict: dict[str, Any]) -> dict[str, Any]:
    """Call Ultralytics' `convert_optimizer_state_dict_to_fp16` on all state except that of our optimizers.

    Most values of h are below the range of float16. Our optimizers are recognized by their state, also if other code
    built or wrapped them. Other optimizers that this package built are marked in their groups.
    """
    if any(KEEP_FLOAT32 in group for group in state_dict["param_groups"]):
        return state_dict
    states = state_dict["state"].items()
    others = {key: s for key, s in states if not (isinstance(s, dict) and s.keys() >= SOPHIA_STATE)}
    if len(others) < len(states):
        convert({**state_dict, "state": others})  # in place
        return state_dict
    return convert(state_dict)


def final_eval_atomically(final_eval: Callable[[], Any]) -> Any:
    """Call the trainer's `final_eval`; meanwhile `strip_atomically` is in effect in this thread."""
    token = _STRIP_ATOMICALLY.set(True)
    try:
        return final_eval()
    finally:
        _STRIP_ATOMICALLY.reset(token)


def strip_atomically(
    strip_optimizer: Callable, f: str | Path = "best.pt", s: str = "", *rest: Any, **kwargs: Any
) -> Any:
    """Ultralytics' `strip_optimizer` with its arguments; in `final_eval_atomically` it writes into a staging folder."""
    if not _STRIP_ATOMICALLY.get():
        return strip_optimizer(f, s, *rest, **kwargs)
    target = Path(s or f)
    with staged(target.parent) as folder, reworded(f" saved as {folder / target.name},", ""):
        return strip_optimizer(f, str(folder / target.name), *rest, **kwargs)


@contextlib.contextmanager
def reworded(old: str, new: str) -> Iterator[None]:
    """Replace words in what Ultralytics logs meanwhile."""

    def reword(record: logging.LogRecord) -> bool:
        record.msg = str(record.msg).replace(old, new)
        return True

    LOGGER.addFilter(reword)
    try:
        yield
    finally:
        LOGGER.removeFilter(reword)

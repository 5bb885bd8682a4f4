"""Checkpoints that are whole: whenever the process is killed, a file is the old one or the new one.

Ultralytics writes last.pt, best.pt and epochN.pt in place (BaseTrainer.save_model), and takes the optimizer out of two
of them in place at the end (strip_optimizer in BaseTrainer.final_eval). The rule: for a trainer that asked for Sophia
both write into a folder beside the checkpoints, and each file takes its name in one rename. What is in that folder is
never read.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER

from yolo_sophia.atomic import flush_to_disk, replace_with_retry

PARTIAL = ".partial"
"""Name of the folder beside the checkpoints; one that a killed process left is replaced by the next to write."""

_STRIPS_WHOLE: ContextVar[bool] = ContextVar("strips_whole", default=False)


@contextlib.contextmanager
def folder_beside(weights: Path) -> Iterator[Path]:
    """An empty folder to write into; what is in it at the end replaces the files of these names in `weights`.

    last.pt is moved last: killed before that, a training repeats its epoch, and best.pt with it.
    """
    partial = weights / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "last.pt"):
            flush_to_disk(path)
            replace_with_retry(path, weights / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_whole(trainer: Any, save: Callable[[], Any]) -> Any:
    """Call `save`, which is the trainer's `save_model`, with its paths in a folder beside; returns what it does."""
    paths = {name: getattr(trainer, name) for name in ("wdir", "last", "best")}
    with folder_beside(paths["wdir"]) as partial:
        try:
            vars(trainer).update(wdir=partial, last=partial / paths["last"].name, best=partial / paths["best"].name)
            return save()
        finally:
            vars(trainer).update(paths)


def final_eval_whole(final_eval: Callable[[], Any]) -> Any:
    """Call the trainer's `final_eval`; while it runs, in this thread, `strip_whole` is what its name says."""
    token = _STRIPS_WHOLE.set(True)
    try:
        return final_eval()
    finally:
        _STRIPS_WHOLE.reset(token)


def strip_whole(strip_optimizer: Callable, f: str | Path = "best.pt", s: str = "", *rest: Any, **kwargs: Any) -> Any:
    """Ultralytics' `strip_optimizer` with its arguments; in a `final_eval_whole` it writes into a folder beside."""
    if not _STRIPS_WHOLE.get():
        return strip_optimizer(f, s, *rest, **kwargs)
    target = Path(s or f)
    with folder_beside(target.parent) as partial, reworded(f" saved as {partial / target.name},", ""):
        return strip_optimizer(f, str(partial / target.name), *rest, **kwargs)


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

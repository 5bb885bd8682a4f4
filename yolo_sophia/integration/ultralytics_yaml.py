"""Ultralytics' own reader and writer of YAML, under one name in every version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(path: str | Path) -> dict[str, Any]:
    """Read a file as Ultralytics reads it: any of its encodings, unusual characters removed."""
    return _function("load")(path)


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write a file as Ultralytics writes it: values that YAML does not have become text."""
    _function("save")(path, content)


def _function(name: str) -> Callable:
    from ultralytics import utils

    return getattr(utils.YAML, name) if hasattr(utils, "YAML") else getattr(utils, f"yaml_{name}")  # before 8.3.130

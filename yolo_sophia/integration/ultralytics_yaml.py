"""Ultralytics' own reader and writer of YAML, under one name in every version."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(path: str | Path) -> dict[str, Any]:
    """Read a file as Ultralytics reads it: any of its encodings, unusual characters removed."""
    try:
        from ultralytics.utils import YAML
    except ImportError:  # before 8.3.130
        from ultralytics.utils import yaml_load

        return yaml_load(path)
    return YAML.load(path)


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write a file as Ultralytics writes it: values that YAML does not have become text."""
    try:
        from ultralytics.utils import YAML
    except ImportError:
        from ultralytics.utils import yaml_save

        yaml_save(path, content)
    else:
        YAML.save(path, content)

"""Shipped presets: every origin names a source, and the files that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from yolo_sophia.presets import load_preset, preset_names

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"\b(?:docs|scripts|tests|configs|patches|yolo_sophia)/[\w./-]*\w")
SOURCE = re.compile(rf"{NAMED.pattern}|arXiv|official|the paper|Ultralytics'")
DELETED = re.compile(r"\bcommit [0-9a-f]{7,40}\b")


def missing_files(origin: str) -> list[str]:
    """Paths in an origin that do not exist; an origin that names a commit may refer to deleted files."""
    if DELETED.search(origin):
        return []
    return [path for path in NAMED.findall(origin) if not (ROOT / path).exists()]


@pytest.mark.parametrize("name", preset_names())
def test_origins_resolve(name):
    origins = load_preset(name).origins
    assert [key for key, origin in origins.items() if not SOURCE.search(origin)] == []
    missing = {key: missing_files(origin) for key, origin in origins.items()}
    assert not {key: paths for key, paths in missing.items() if paths}


def test_what_counts_as_missing():
    assert missing_files("docs/studies/2026-11-26-gone: level; see tests/test_presets.py") == [
        "docs/studies/2026-11-26-gone"
    ]
    assert missing_files("scripts/gone.py (commit 8dc99d9): level") == []
    assert missing_files("arXiv 2305.14342") == []

"""The state of a trial for showing, as a comparison shows its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from yolo_sophia.runs.scheduler import Progress
from yolo_sophia.tune.plan import TunePlan

SETTINGS, NOTE = "settings", "note"
"""User attributes of a trial: what it searched, as it was trained, and why it failed."""
STATES = {"RUNNING": "elsewhere", "COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
"""Optuna's states as a comparison names them."""


def trial_progress(plan: TunePlan, number: int, settings: Mapping[str, Any] | None = None) -> Progress:
    """The state of a trial; one that has not begun has no settings."""
    words = ", ".join(f"{key}={value}" for key, value in (settings or {}).items())
    run = plan.runs({})[0]
    arguments = {**run.arguments, "epochs": plan.trial_epochs}
    return Progress(replace(run, key=f"trial {number}" + (f": {words}" if words else ""), arguments=arguments))

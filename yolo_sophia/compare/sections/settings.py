"""The arguments of the arms, the differing ones first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yolo_sophia.compare.plan import Arm
from yolo_sophia.compare.statistics import ComparisonResult
from yolo_sophia.report.document import Block, Cell, Fold, Section, Table, Text
from yolo_sophia.report.formatting import DASH, scalar
from yolo_sophia.runs.run import data_name

OF_A_RUN = {"seed", "data", "epochs", "name", "project", "save_dir", "resume", "sophia_new_rows"}
"""Arguments that do not characterize an arm."""


def sections(result: ComparisonResult) -> list[Section]:
    """Arguments as recorded in finished runs, or as planned if none has finished."""
    arms = result.plan.arms
    values: dict[str, dict[str, str]] = {}
    names: list[Cell] = []
    for arm in arms:
        recorded, finished = _recorded(result, arm)
        names.append(arm.name if finished else (arm.name, "as planned, no run finished"))
        for key in {key for _, arguments in recorded for key in arguments} - OF_A_RUN:
            values.setdefault(key, {})[arm.name] = _value(recorded, key)
    rows = {key: [by_arm.get(arm.name, DASH) for arm in arms] for key, by_arm in values.items()}
    order = sorted(rows, key=lambda key: (key != "optimizer", key != "lr0", key))
    differing = [[key, *rows[key]] for key in order if len(set(rows[key])) > 1]
    same = [[key, rows[key][0]] for key in order if len(set(rows[key])) == 1]
    blocks: list[Block] = []
    if differing:
        blocks.append(Table("Arguments that differ between the arms", ["argument", *names], differing, False))
    if any(str(arm.arguments.get("optimizer")) == "auto" for arm in arms):
        text = "optimizer=auto: Ultralytics chooses optimizer, lr0 and momentum itself and ignores those listed here."
        blocks.append(Text(text, "note"))
    if same:
        table = Table("The same in all arms", ["argument", "value"], same, False)
        blocks.append(Fold(f"{len(same)} arguments that are the same in all arms", [table]))
    return [Section("settings", "Settings", blocks)]


def _recorded(result: ComparisonResult, arm: Arm) -> tuple[list[tuple[str, Mapping[str, Any]]], bool]:
    """Data set and arguments of the runs of an arm, and whether they are those of finished runs."""
    finished = [run for run in result.ended(arm.name) if run.receipt and run.receipt.get("args")]
    if finished:
        # A resumed run has recorded its checkpoint as the model.
        arguments = [{**run.receipt["args"], "model": run.run.arguments.get("model")} for run in finished]
        return [(data_name(run.run.data), recorded) for run, recorded in zip(finished, arguments)], True
    runs = [record.result.run for record in result.records if record.result.run.arm == arm.name]
    planned = [("", {**result.plan.common, **arm.arguments})]
    return [(data_name(run.data), run.arguments) for run in runs] or planned, False


def _value(recorded: Sequence[tuple[str, Mapping[str, Any]]], key: str) -> str:
    """The value of an argument, or each value with its data sets if tuning found different ones."""
    found: dict[str, list[str]] = {}
    for data, arguments in recorded:
        names = found.setdefault(scalar(arguments[key]) if key in arguments else DASH, [])
        if data not in names:
            names.append(data)
    return next(iter(found)) if len(found) == 1 else "; ".join(f"{v} ({', '.join(d)})" for v, d in found.items())

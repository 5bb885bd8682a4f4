"""What became of every run."""

from __future__ import annotations

import math

from yolo_sophia.compare.score import FULL
from yolo_sophia.compare.statistics import ComparisonResult, Record, RunName
from yolo_sophia.report.document import Block, Cell, Code, Fold, Section, Table, Text
from yolo_sophia.report.formatting import DASH, count, decimal, duration

HEAD: list[Cell] = [
    "run", "state", "epochs", ("final", "mAP50-95"), ("steps", "to target"), ("time", "training"), ("time", "in all"),
]  # fmt: skip


def listed(names: list[RunName] | tuple[RunName, ...]) -> str:
    """Names of runs."""
    return "; ".join(f"{arm} on {data}, seed {seed}" + f", {h:g} T" * (h != FULL) for arm, data, seed, h in names)


def sections(result: ComparisonResult) -> list[Section]:
    """Runs that did not end, diverged or failed, with their logs, and a table of all."""
    blocks: list[Block] = []
    failed = [record for record in result.records if record.state == "failed"]
    diverged = [record.name for record in result.records if record.curve and record.curve.diverged]
    if result.not_ended:
        blocks.append(Text(f"Not ended: {listed(result.not_ended)}."))
    if diverged:
        text = "Diverged (an mAP not finite, or the last under a tenth of the best)"
        blocks.append(Text(f"{text}: {listed(diverged)}."))
    for record in failed:
        epochs = count(len(record.result.rows), "epoch")
        label = f"Failed after {epochs}: {listed([record.name])}. Last lines of its log"
        blocks.append(Code(record.result.failure or "", label))
    if not blocks:
        blocks.append(Text(f"All {count(result.planned, 'run')} finished, none diverged."))
    table = Table("Every run of the plan that has a record", HEAD, [_row(record) for record in result.records])
    return [Section("runs", "Runs", [*blocks, Fold("Every run", [table])])]


def _row(record: Record) -> list[str]:
    rows, steps = record.result.rows, record.steps_to_target
    return [
        record.result.run.key,
        record.state,
        str(len(rows)),
        decimal(record.final),
        DASH if steps is None else "missed" if math.isinf(steps) else f"{steps:,.0f}",
        duration(rows[-1].get("seconds") if rows else None),
        duration((record.result.receipt or {}).get("wall_seconds")),
    ]

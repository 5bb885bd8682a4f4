"""What was known of the trainings before they began: the facts of `yolo-sophia doctor`."""

from __future__ import annotations

from collections.abc import Sequence

from yolo_sophia.compare.preflight import Preflight
from yolo_sophia.compare.statistics import ComparisonResult
from yolo_sophia.report.document import Block, Section, Table, Text
from yolo_sophia.runs.run import data_name


def sections(result: ComparisonResult) -> list[Section]:
    """A table for each data set; a fact that arms share is one row."""
    blocks: list[Block] = []
    for data in dict.fromkeys(preflight.data for preflight in result.preflight):
        preflights = [preflight for preflight in result.preflight if preflight.data == data]
        if rows := _rows(preflights):
            head = ["fact", "arms", "verdict", "figure", "to type or to change"]
            blocks.append(
                Table(f"{data_name(data)}: the full trainings as planned, before any tuning", head, rows, False)
            )
        for preflight in preflights:
            if preflight.error:
                blocks.append(Text(f"{preflight.arm} on {data_name(data)} was not examined: {preflight.error}", "note"))
    return [Section("doctor", "Before the training", blocks)]


def _rows(preflights: Sequence[Preflight]) -> list[list[str]]:
    """Rows in the order of the facts, the arms with the same row together."""
    names = list(dict.fromkeys(fact["fact"] for preflight in preflights for fact in preflight.facts))
    arms: dict[tuple[str, ...], list[str]] = {}
    for preflight in preflights:
        for fact in preflight.facts:
            arms.setdefault((fact["fact"], fact["verdict"], fact["figure"], fact["argument"]), []).append(preflight.arm)
    examined = sum(bool(preflight.facts) for preflight in preflights)
    ordered = sorted(arms, key=lambda row: names.index(row[0]))
    return [[row[0], "all" if len(arms[row]) == examined else ", ".join(arms[row]), *row[1:]] for row in ordered]

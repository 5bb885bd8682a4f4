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
    for data in dict.fromkeys(own.data for own in result.preflight):
        found = [own for own in result.preflight if own.data == data]
        if rows := _rows(found):
            head = ["fact", "arms", "verdict", "figure", "to type or to change"]
            blocks.append(
                Table(f"{data_name(data)}: the full trainings as planned, before any tuning", head, rows, False)
            )
        for own in found:
            if own.error:
                blocks.append(Text(f"{own.arm} on {data_name(data)} was not examined: {own.error}", "note"))
    return [Section("doctor", "Before the training", blocks)]


def _rows(found: Sequence[Preflight]) -> list[list[str]]:
    """Rows in the order of the facts, the arms with the same row together."""
    names = list(dict.fromkeys(fact["fact"] for own in found for fact in own.facts))
    arms: dict[tuple[str, ...], list[str]] = {}
    for own in found:
        for fact in own.facts:
            arms.setdefault((fact["fact"], fact["verdict"], fact["figure"], fact["argument"]), []).append(own.arm)
    examined = sum(bool(own.facts) for own in found)
    ordered = sorted(arms, key=lambda row: names.index(row[0]))
    return [[row[0], "all" if len(arms[row]) == examined else ", ".join(arms[row]), *row[1:]] for row in ordered]

"""COCO metrics of the final weights."""

from __future__ import annotations

from yolo_sophia.compare.score import mean
from yolo_sophia.compare.statistics import ComparisonResult
from yolo_sophia.report.document import Section, Table
from yolo_sophia.report.formatting import count, mean_cell


def sections(result: ComparisonResult) -> list[Section]:
    """Means over seeds; a negative metric means that there was no such object and is excluded."""
    metrics = list(dict.fromkeys(name for found in result.coco.values() for name in found))
    rows = []
    for arm in (arm for data in result.data for arm in data.arms):
        found = [result.coco[r.result.run.key] for r in arm.records if r.result.run.key in result.coco]
        if found:
            means = (mean(m[name] for m in found if m.get(name, -1) >= 0) for name in metrics)
            rows.append(
                [(arm.name, f"{arm.data}, {count(len(found), 'run')}"), *(mean_cell(m.value, m.half) for m in means)]
            )
    table = Table("COCO metrics at the end of full runs", ["arm", *metrics], rows)
    return [Section("coco", "COCO metrics", [table] if result.coco else [])]

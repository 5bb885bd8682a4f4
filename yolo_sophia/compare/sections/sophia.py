"""What Sophia did: clip fraction, rho and Hessian updates."""

from __future__ import annotations

from statistics import median

from yolo_sophia.compare.figures import curve_picture
from yolo_sophia.compare.statistics import ComparisonResult
from yolo_sophia.report.document import Block, Gallery, Section, Table

CLIP_FRACTION, RHO, UPDATES, DROPPED = (f"sophia/{key}" for key in ("clip_fraction", "rho", "refreshes", "dropped"))
CAPTION = "Clip fraction: share of the coordinates whose update is clipped to the learning rate, sampled in an epoch."


def sections(result: ComparisonResult) -> list[Section]:
    """Curves per data set and a table of the arms that record Hessian updates."""
    pictures = []
    for data in result.data:
        arms = [
            arm for arm in data.arms if any(CLIP_FRACTION in r.result.rows[-1] for r in arm.records if r.result.rows)
        ]
        for column, label in ((CLIP_FRACTION, "clip fraction"), (RHO, "rho")) if arms else ():
            pictures.append(curve_picture(result, data, column, label, "steps", arms=arms))
    blocks: list[Block] = [Gallery(pictures, CAPTION)] if pictures else []
    rows = []
    for arm in result.arms:
        last = [run.rows[-1] for run in result.ended(arm) if run.rows and UPDATES in run.rows[-1]]
        if last:
            updates, dropped = ([row.get(key) or 0 for row in last] for key in (UPDATES, DROPPED))
            rows.append([arm, str(len(last)), f"{median(updates):,.0f}", f"{sum(dropped):,.0f}"])
    if rows:
        head = ["arm", "runs", ("Hessian updates", "median of a run"), ("dropped", "not finite, all runs")]
        blocks.append(Table("Hessian updates", head, rows))
    return [Section("sophia", "Inside Sophia", blocks)]

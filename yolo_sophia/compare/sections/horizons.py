"""Full schedules planned for a fraction of the epochs."""

from __future__ import annotations

import math

from matplotlib.ticker import FixedLocator, FuncFormatter

from yolo_sophia.compare.figures import Series, curves, style_of
from yolo_sophia.compare.plan import Plan
from yolo_sophia.compare.statistics import ArmResult, ComparisonResult, DataResult
from yolo_sophia.report.document import Block, Cell, Gallery, Picture, Section, Table
from yolo_sophia.report.figure_style import picture, short
from yolo_sophia.report.formatting import DASH, count, decimal


def sections(result: ComparisonResult) -> list[Section]:
    """Median final mAP of every planned schedule."""
    blocks: list[Block] = []
    for data in result.data if len(result.plan.horizons) > 1 else ():
        blocks.append(_table(result.plan, data))
        if any(arm.horizons for arm in data.arms):
            blocks.append(Gallery([_picture(data)]))
    return [Section("horizons", "Planned horizons", blocks)]


def _table(plan: Plan, data: DataResult) -> Table:
    head: list[Cell] = [(f"{h:g} T", f"{max(1, round(data.epochs * h))} epochs") for h in plan.horizons]
    rows = [_row(plan, arm) for arm in data.arms]
    caption = f"{data.name}: median final mAP50-95 of full schedules over a fraction of T"
    return Table(caption, ["arm", *head, ("shortest", "to reach the target")], rows)


def _row(plan: Plan, arm: ArmResult) -> list[Cell]:
    score = arm.horizons
    medians = {horizon: (value, seeds) for horizon, value, seeds in score.medians} if score else {}
    cells: list[Cell] = []
    for horizon in plan.horizons:
        value, seeds = medians.get(horizon, (None, 0))
        cells.append(("failed" if value == -math.inf else decimal(value), count(seeds, "seed")))
    shortest = DASH if score is None else "none" if score.shortest is None else f"{score.shortest:g} T"
    return [arm.name, *cells, shortest]


def _picture(data: DataResult) -> Picture:
    lines, words = [], []
    for arm in data.arms:
        if arm.horizons:
            x = tuple(horizon for horizon, *_ in arm.horizons.medians)
            middle = tuple(max(value, 0.0) for _, value, _ in arm.horizons.medians)
            lines.append(Series(style_of(arm), x, middle, *zip(*arm.horizons.ranges)))
            words.append(f"{arm.name} " + ", ".join(f"{value:.3f} at {h:g} T" for h, value in zip(x, middle)))
    title = f"{short(data.name)}: final mAP50-95 of full schedules"
    figure = curves(title, "final mAP50-95", "steps", lines, [data.target] if data.target else [])
    axes = figure.axes[0]
    lengths = sorted({x for line in lines for x in line.x})
    axes.set_xlim(lengths[0] - 0.03, lengths[-1] + 0.03)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} T"))
    axes.set_xlabel("length of the schedule")
    return picture(f"{data.name}-horizons", figure, f"{title}: {'; '.join(words)}.")

"""The results on a data set: the main table, curves of mAP and losses, and cost to the target."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from yolo_sophia.compare.figures import AXIS_LABELS, AXIS_NOUNS, axis_unit, curve_picture, style_of
from yolo_sophia.compare.pairwise import Ratio
from yolo_sophia.compare.score import AXES
from yolo_sophia.compare.statistics import NEAR, ArmResult, ComparisonResult, DataResult
from yolo_sophia.report.document import Block, Cell, Fold, Gallery, Picture, Section, Table, Text
from yolo_sophia.report.figure_style import INK, MUTED, picture, row_panel, short
from yolo_sophia.report.formatting import DASH, PLUS_MINUS, TIMES, duration, mean_cell, ratio_number, size
from yolo_sophia.runs.results import MAP50_95

CURVES = (
    "Lines: median over seeds, aligned by epoch. Bands: from the lowest to the highest seed; a band may leave the "
    "picture. Thin lines that end in a cross: runs that crashed."
)
HEAD: list[Cell] = [
    "arm", ("final", "mAP50-95"), ("best", "mAP50-95"), ("final", "mAP50"),
    *((f"{AXIS_NOUNS[axis]} to target", "ratio, 95 % interval") for axis in AXES),
    ("step", "median time"), ("Hessian", "share of time"), ("memory", "peak"), "runs",
]  # fmt: skip


def sections(result: ComparisonResult) -> list[Section]:
    """One section per data set."""
    made = []
    for number, data in enumerate(result.data, 1):
        name = f"results-{number}" if len(result.data) > 1 else "results"
        blocks = _blocks(result, data) if any(arm.records for arm in data.arms) else None
        made.append(Section(name, f"Results on {data.name}", blocks or [Text("No full run has ended here yet.")]))
    return made


def _blocks(result: ComparisonResult, data: DataResult) -> list[Block]:
    lines = [value for value in (data.target, data.near) if value]
    curves = [curve_picture(result, data, MAP50_95, "mAP50-95", axis, targets=lines, empty=0.0) for axis in AXES]
    blocks: list[Block] = [_table(result, data), Gallery(curves, CURVES)]
    if data.target is not None:
        blocks.append(Gallery([_cost_picture(data, axis) for axis in AXES], "Bars: median over seeds. Marks: seeds."))
    losses = [name for name in result.columns if name.startswith("train/")]
    for axis in AXES if losses else ():
        labels = {name: name.removeprefix("train/").replace("_", " ") for name in losses}
        drawn = [curve_picture(result, data, name, label, axis) for name, label in labels.items()]
        blocks.append(Fold(f"Training losses over {AXIS_NOUNS[axis]}", [Gallery(drawn)], opened=axis == "steps"))
    return blocks


def _table(result: ComparisonResult, data: DataResult) -> Table:
    times = [arm.summary.cost["seconds"] for arm in data.arms if arm.summary and data.target]
    longest = max(filter(math.isfinite, times), default=0.0)
    target = f"target: mAP50-95 {data.target:.3f}" if data.target else "no target"
    target += f", {NEAR:.0%} of it {data.near:.3f}" if data.near else ""
    caption = f"{data.name}: {target}; mean {PLUS_MINUS} half of the 95 % interval, medians over seeds"
    rows = [_row(arm, len(result.plan.seeds), longest) for arm in data.arms]
    if data.near is None:
        return Table(caption, HEAD, rows)
    nears = [_cost(arm.near_steps, arm.near) for arm in data.arms]
    head: Cell = (f"steps to {NEAR:.0%}", "ratio, 95 % interval")
    return Table(caption, [*HEAD[:-1], head, HEAD[-1]], [[*row[:-1], near, row[-1]] for row, near in zip(rows, nears)])


def _row(arm: ArmResult, seeds: int, longest: float) -> list[Cell]:
    name: Cell = arm.name if arm.number else (arm.name, "reference")
    summary = arm.summary
    if summary is None:
        return [name, *[DASH] * (len(HEAD) - 2), _states(arm, seeds)]
    share = DASH if arm.hessian_share is None else f"{arm.hessian_share:.1%}"
    return [
        name,
        *(mean_cell(value.value, value.half) for value in (summary.final, summary.best, summary.final50)),
        *(_cost(summary.cost[axis], arm.ratios.get(axis), longest if axis == "seconds" else None) for axis in AXES),
        duration(arm.step_seconds),
        share,
        size(arm.peak_memory),
        _states(arm, seeds),
    ]


def _cost(value: float | None, ratio: Ratio | None, longest: float | None = None) -> Cell:
    """Median cost to a target with the ratio to the reference arm; a time if `longest` is given, in its unit."""
    if value is None:
        return DASH
    text = f"{round(value):,}" if longest is None and math.isfinite(value) else duration(value, longest)
    return "missed" if math.isinf(value) else text, ratio_text(ratio) if ratio else ""


def ratio_text(ratio: Ratio) -> str:
    """A ratio with its interval."""
    if not ratio.informative:
        return "no ratio"
    value = "unknown" if ratio.value is None else f"{ratio_number(ratio.value)}{TIMES}"
    known = ratio.low is not None and not math.isinf(ratio.low)
    return value + (f" ({ratio_number(ratio.low)}{DASH}{ratio_number(ratio.high)})" if known else "")


def _states(arm: ArmResult, seeds: int) -> Cell:
    """How many full runs finished, and what became of the others."""
    found, finished = {}, 0
    if summary := arm.summary:
        finished = len(summary.seeds) - summary.failed
        found = {"failed": summary.failed, "diverged": summary.diverged, "missed the target": summary.missed}
    parts = [f"{number} {state}" for state, number in {**found, "missing": arm.not_ended}.items() if number]
    return f"{finished} of {seeds} finished", ", ".join(parts)


def _cost_picture(data: DataResult, axis: str) -> Picture:
    noun, words = AXIS_NOUNS[axis], []
    for arm in data.arms:
        middle = arm.summary.cost[axis] if arm.summary else None
        shown = f"{middle:,.0f}" if axis != "seconds" and middle is not None else duration(middle)
        words.append(f"{arm.name} " + ("not run" if middle is None else "missed" if math.isinf(middle) else shown))
    title = f"{short(data.name)}: {noun} to mAP50-95 {data.target:.3f}"
    alt = f"{title}, median over seeds: {', '.join(words)}."
    return picture(f"{data.name}-{noun}-to-target", _cost_figure(title, axis, data), alt)


def _cost_figure(title: str, axis: str, data: DataResult) -> Figure:
    """A bar up to the median over seeds, a mark per seed, and the number of seeds that missed the target."""
    figure, axes = row_panel(title, [arm.name for arm in data.arms])
    costs = [arm.summary.costs[axis] if arm.summary else () for arm in data.arms]
    finite = [cost for by_seed in costs for cost in by_seed if math.isfinite(cost)]
    scale, unit = axis_unit(axis, max(finite, default=0))
    room = 1.75 if any(math.isinf(cost) for by_seed in costs for cost in by_seed) else 1.06  # for words beside the bars
    end = room * max(finite, default=scale) / scale or 1.0
    for y, (arm, by_seed) in enumerate(zip(data.arms, costs)):
        style = style_of(arm)
        if not by_seed:
            axes.text(0.02 * end, y, "not run", va="center", color=MUTED, fontsize=8)
            continue
        middle = arm.summary.cost[axis] / scale
        if math.isfinite(middle):
            axes.barh(y, middle, height=0.58, color=style.color, alpha=0.35, linewidth=0)
            axes.plot([middle, middle], [y - 0.29, y + 0.29], color=style.color, linewidth=2.2)
        reached = [cost / scale for cost in by_seed if math.isfinite(cost)]
        axes.plot(reached, [y] * len(reached), linestyle="none", marker=style.line["marker"], markersize=4.5,
                  color=style.color)  # fmt: skip
        if missed := len(by_seed) - len(reached):
            text = f"{missed} of {len(by_seed)} missed \N{RIGHTWARDS ARROW}"
            axes.text(0.99 * end, y, text, va="center", ha="right", color=INK, fontsize=8)
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(AXIS_LABELS[axis] + unit)
    return figure

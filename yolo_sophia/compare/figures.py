"""Figures of a comparison, one panel each: a phone shows them below each other, a desktop side by side.

The rule: a value that is not finite is never drawn as if it were; a run that crashed is drawn as far as it went.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from yolo_sophia.compare.score import Ratio
from yolo_sophia.report.figure_style import INK, MUTED, Style, panel, row_panel

AXES_LABELS = {"steps": "optimizer steps", "images": "training images", "seconds": "training time"}


@dataclass(frozen=True)
class Series:
    """The runs of one arm as one line.

    Attributes:
        style: The arm.
        x: Position of each point, the median over the runs.
        middle: Median over the runs; NaN where no run has a finite value.
        low, high: Smallest and largest value of any run.
        broken: Runs that crashed, as they are: positions and values.
    """

    style: Style
    x: tuple[float, ...]
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    broken: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()


def series(
    style: Style,
    finished: Sequence[Sequence[dict[str, Any]]],
    broken: Sequence[Sequence[dict[str, Any]]],
    axis: str,
    column: str,
    *,
    empty: float = math.nan,
    points: int = 120,
) -> Series:
    """Draw runs together epoch by epoch, as far as at least half of the finished ones went.

    Args:
        style: The arm.
        finished: Rows of each finished run.
        broken: Rows of each run that crashed.
        axis: "steps", "images" or "seconds".
        column: Column of the rows.
        empty: Stands for a value that is not finite.
        points: Largest number of points; the first and the last epoch are among them.
    """

    def value(row: dict[str, Any]) -> float:
        found = row.get(column)
        return empty if found is None or not math.isfinite(found) else found

    lengths = sorted((len(rows) for rows in finished), reverse=True)
    count = lengths[(len(lengths) - 1) // 2] if lengths else 0
    made = []
    for epoch in _thinned(count, points):
        there = [rows[epoch] for rows in finished if len(rows) > epoch]
        values = [v for row in there if not math.isnan(v := value(row))] or [math.nan]
        made.append((median(row[axis] for row in there), median(values), min(values), max(values)))
    cut = []
    for rows in broken:
        kept = [rows[epoch] for epoch in _thinned(len(rows), points)]
        cut.append((tuple(row[axis] for row in kept), tuple(map(value, kept))))
    x, middle, low, high = zip(*made) if made else ((), (), (), ())
    return Series(style, x, middle, low, high, tuple(cut))


def _thinned(count: int, points: int) -> list[int]:
    return list(range(count)) if count <= points else [round(i * (count - 1) / (points - 1)) for i in range(points)]


def curves(title: str, label: str, axis: str, lines: Sequence[Series], target: float | None = None) -> Figure:
    """Values over steps, images or seconds: median lines, bands from the lowest to the highest seed."""
    figure, axes = panel(title, [line.style for line in lines])
    scale, unit = _unit(axis, max((line.x[-1] for line in lines if line.x), default=0))
    for line in lines:
        x = [value / scale for value in line.x]
        axes.fill_between(x, line.low, line.high, color=line.style.colour, alpha=0.15, linewidth=0)
        axes.plot(x, line.middle, markevery=_some(len(x), line.style.number), **line.style.line)
        for xs, ys in line.broken:
            axes.plot([v / scale for v in xs], ys, color=line.style.colour, linewidth=0.7, alpha=0.8)
            axes.plot(xs[-1] / scale, ys[-1], "x", color=line.style.colour, markersize=8, markeredgewidth=2.2)
    # A run that diverged stretches its band, not the picture: medians and their surroundings stay readable.
    values = [v for line in lines for v in line.middle if math.isfinite(v)] or [0.0, 1.0]
    low, high = min([*values, target or values[0]]), max([*values, target or values[0]])
    room = (high - low or abs(high) or 1) * 0.12
    axes.set_ylim(low - room if low < 0 or low > room else -0.02 * high, high + room)
    if target is not None:
        axes.axhline(target, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(f"target {target:.3f}", (0.02, target), (0, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", color=MUTED, fontsize=8)  # fmt: skip
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=axis != "seconds"))
    if axis != "seconds":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel=AXES_LABELS[axis] + unit, ylabel=label)
    return figure


def _unit(axis: str, longest: float) -> tuple[float, str]:
    """Length of the axis's unit, and its name."""
    if axis != "seconds":
        return 1, ""
    return (3600, " (h)") if longest > 7200 else (60, " (min)") if longest > 240 else (1, " (s)")


def _some(count: int, offset: int) -> list[int]:
    """Positions of about six markers, not the same in every line."""
    every = max(1, count // 6)
    return list(range((offset * every // 5) % every, count, every))


def bars(title: str, axis: str, rows: Sequence[tuple[Style, Sequence[float], float | None]]) -> Figure:
    """Cost to the target: a bar to the median over seeds, a mark per seed, an arrow at the edge for a miss.

    Args:
        title: Title.
        axis: "steps", "images" or "seconds".
        rows: Arm, costs of its seeds and their median; infinity is a miss, None says that there is nothing to draw.
    """
    figure, axes = row_panel(title, [style.name for style, *_ in rows])
    finite = [cost for _, costs, _ in rows for cost in costs if math.isfinite(cost)]
    scale, unit = _unit(axis, max(finite, default=0))
    beside = any(math.isinf(cost) for _, costs, _ in rows for cost in costs)  # room for words beside the bars
    end = (1.75 if beside else 1.06) * max(finite, default=scale) / scale or 1.0
    for y, (style, costs, middle) in enumerate(rows):
        if middle is None:
            axes.text(0.02 * end, y, "not run", va="center", color=MUTED, fontsize=8)
            continue
        if math.isfinite(middle):
            middle /= scale
            axes.barh(y, middle, height=0.58, color=style.colour, alpha=0.35, linewidth=0)
            axes.plot([middle, middle], [y - 0.29, y + 0.29], color=style.colour, linewidth=2.2)
        reached = [cost / scale for cost in costs if math.isfinite(cost)]
        axes.plot(reached, [y] * len(reached), linestyle="none", marker=style.line["marker"], markersize=4.5,
                  color=style.colour)  # fmt: skip
        if missed := len(costs) - len(reached):
            text = f"{missed} of {len(costs)} missed \N{RIGHTWARDS ARROW}"
            axes.text(0.99 * end, y, text, va="center", ha="right", color=INK, fontsize=8)
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(AXES_LABELS[axis] + unit)
    return figure


def forest(title: str, rows: Sequence[tuple[str, Style, Ratio]]) -> Figure:
    """Ratios to the reference arm with their intervals, a row per name, arm and ratio; left of 1 is cheaper."""
    figure, axes = row_panel(title, [name for name, *_ in rows])
    ends = [v for *_, ratio in rows for v in (ratio.value, ratio.low, ratio.high) if v and math.isfinite(v)]
    reach = min(max([1.25, *(max(v, 1 / v) for v in ends)]) * 1.15, 12.0)
    axes.set_xscale("log")
    axes.axvline(1, color=INK, linewidth=1)
    for y, (_, style, ratio) in enumerate(rows):
        if ratio.low is not None and ratio.high is not None:
            low, high = (min(max(v, 1 / reach), reach) for v in (ratio.low, ratio.high))
            axes.plot([low, high], [y, y], color=style.colour, linewidth=2.2, solid_capstyle="butt")
            for mark, edge, beyond in (("<", 1 / reach, ratio.low < 1 / reach), (">", reach, ratio.high > reach)):
                if beyond:
                    axes.plot(edge, y, mark, color=style.colour, markersize=6, clip_on=False)
        if ratio.value and 1 / reach <= ratio.value <= reach:
            axes.plot(ratio.value, y, style.line["marker"], color=style.colour, markersize=7)
        elif ratio.value is None:
            axes.text(1.02, y + 0.18, "no ratio", va="center", color=MUTED, fontsize=8)
    axes.set_xlim(1 / reach, reach)
    steps = [0.1, 0.2, 0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 5, 10]
    shown = [v for v in steps if 1 / reach <= v <= reach and (reach < 3 or v not in {0.7, 0.85, 1.2, 1.5})]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}\N{MULTIPLICATION SIGN}"))
    gap = 2 * "\N{EM SPACE}"  # the page keeps these, and would join ordinary spaces
    axes.set_xlabel(f"\N{LEFTWARDS ARROW} less{gap}than the reference{gap}more \N{RIGHTWARDS ARROW}")
    return figure


def horizons(title: str, lines: Sequence[Series], target: float | None) -> Figure:
    """Median final mAP50-95 of full schedules planned for a fraction of T."""
    figure = curves(title, "final mAP50-95", "steps", lines, target)
    axes = figure.axes[0]
    lengths = sorted({x for line in lines for x in line.x})
    axes.set_xlim(lengths[0] - 0.03, lengths[-1] + 0.03)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} T"))
    axes.set_xlabel("length of the schedule")
    return figure


def profile(title: str, rows: Sequence[tuple[Style, Sequence[float], Sequence[float]]]) -> Figure:
    """Share of the data sets (second list) solved within a factor (first list) of the best arm's cost."""
    figure, axes = panel(title, [style for style, *_ in rows])
    for style, taus, fractions in rows:
        axes.step(taus, fractions, where="post", markevery=_some(len(taus), style.number), **style.line)
    axes.set(xlabel="factor over the best arm's cost", ylabel="share of the data sets", ylim=(-0.03, 1.05))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}\N{MULTIPLICATION SIGN}"))
    return figure

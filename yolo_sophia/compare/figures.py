"""Curves over steps, images and time, shared by the sections of a report.

Values that are not finite are not drawn; a crashed run is drawn up to its last epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from yolo_sophia.compare.statistics import ArmResult, ComparisonResult, DataResult
from yolo_sophia.report.document import Picture
from yolo_sophia.report.figure_style import MUTED, Style, panel, picture, short

AXIS_LABELS = {"steps": "optimizer steps", "images": "training images", "seconds": "training time"}
AXIS_NOUNS = {"steps": "steps", "images": "images", "seconds": "time"}
POINTS = 25_000
"""Points of all lines of a page together, which keeps the page under 3 MB; a line has 24 to 120."""


@dataclass(frozen=True)
class Series:
    """The runs of one arm as one line.

    Attributes:
        style: Line style of the arm.
        x: Position of each point, the median over the runs.
        middle: Median over the runs; NaN where no run has a finite value.
        low, high: Smallest and largest value of any run.
        broken: Positions and values of each crashed run.
    """

    style: Style
    x: tuple[float, ...]
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    broken: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()


def style_of(arm: ArmResult) -> Style:
    """The line style of an arm."""
    return Style(arm.name, arm.number)


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
    """Summarize runs epoch by epoch, up to the last epoch that at least half of the finished runs reached.

    Args:
        style: Line style of the arm.
        finished: Rows of each finished run.
        broken: Rows of each crashed run.
        axis: "steps", "images" or "seconds".
        column: Column of the rows.
        empty: Replacement for values that are not finite.
        points: Maximum number of points; the first and the last epoch are always included.
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


def curve_picture(
    result: ComparisonResult,
    data: DataResult,
    column: str,
    label: str,
    axis: str,
    *,
    targets: Sequence[float] = (),
    empty: float = math.nan,
    arms: Sequence[ArmResult] | None = None,
) -> Picture:
    """A column of the full runs on a data set over one of the axes; `arms` defaults to all.

    `targets` are horizontal lines, the target first.
    """
    losses = sum(name.startswith("train/") for name in result.columns)
    points = max(24, min(120, POINTS // (len(result.data) * len(result.arms) * 3 * (1 + losses))))
    lines = []
    for arm in data.arms if arms is None else arms:
        rows: dict[str, list] = {"finished": [], "failed": []}
        for record in arm.records:
            if record.result.rows:
                rows[record.state].append(record.result.rows)
        lines.append(series(style_of(arm), rows["finished"], rows["failed"], axis, column, empty=empty, points=points))
    title = f"{short(data.name)}: {label} over {AXIS_LABELS[axis].removeprefix('optimizer ').removeprefix('training ')}"
    ends = [f"{line.style.name} {line.middle[-1]:.3g}" if line.x else f"{line.style.name} no run" for line in lines]
    alt = f"{title}. Median of the runs at the end: {', '.join(ends)}."
    alt += f" Target {targets[0]:.3f}." if targets else ""
    return picture(f"{data.name}-{label}-{axis}", curves(title, label, axis, lines, targets), alt)


def curves(title: str, label: str, axis: str, lines: Sequence[Series], targets: Sequence[float] = ()) -> Figure:
    """Values over steps, images or seconds: median lines, and bands from the lowest to the highest seed."""
    figure, axes = panel(title, [line.style for line in lines])
    scale, unit = axis_unit(axis, max((line.x[-1] for line in lines if line.x), default=0))
    for line in lines:
        x = [value / scale for value in line.x]
        axes.fill_between(x, line.low, line.high, color=line.style.color, alpha=0.15, linewidth=0)
        axes.plot(x, line.middle, markevery=mark_positions(len(x), line.style.number), **line.style.line)
        for xs, ys in line.broken:
            axes.plot([v / scale for v in xs], ys, color=line.style.color, linewidth=0.7, alpha=0.8)
            axes.plot(xs[-1] / scale, ys[-1], "x", color=line.style.color, markersize=8, markeredgewidth=2.2)
    # The limits follow the medians: the band of a diverged run may leave the picture.
    values = [v for line in lines for v in line.middle if math.isfinite(v)] or [0.0, 1.0]
    low, high = min([*values, *targets]), max([*values, *targets])
    room = (high - low or abs(high) or 1) * 0.12
    axes.set_ylim(low - room if low < 0 or low > room else -0.02 * high, high + room)
    for number, target in enumerate(targets):  # the label of a second, lower one is below its line
        axes.axhline(target, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        text = f"{target / targets[0]:.0%} of it: {target:.3f}" if number else f"target {target:.3f}"
        axes.annotate(text, (0.02, target), (0, -3 if number else 3), xycoords=("axes fraction", "data"), color=MUTED,
                      textcoords="offset points", va="top" if number else "bottom", fontsize=8)  # fmt: skip
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=axis != "seconds"))
    if axis != "seconds":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel=AXIS_LABELS[axis] + unit, ylabel=label)
    return figure


def axis_unit(axis: str, longest: float) -> tuple[float, str]:
    """Divisor of the values on an axis, and the suffix of its label."""
    if axis != "seconds":
        return 1, ""
    return (3600, " (h)") if longest > 7200 else (60, " (min)") if longest > 240 else (1, " (s)")


def mark_positions(count: int, number: int) -> list[int]:
    """Positions of about six markers, shifted with the number of the line."""
    every = max(1, count // 6)
    return list(range((number * every // 5) % every, count, every))

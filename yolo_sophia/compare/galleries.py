"""Which figures a report has: a view of the runs in, pictures with text alternatives out.

The rule: a text alternative says what the figure shows and the numbers that its lines end with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from matplotlib.figure import Figure

from yolo_sophia.compare import figures
from yolo_sophia.compare.figures import AXES_LABELS, Series
from yolo_sophia.compare.score import AXES, Curve, cost_to_target
from yolo_sophia.compare.tables import duration, ratio_text
from yolo_sophia.compare.verdict import horizon_score, profiles
from yolo_sophia.compare.view import View
from yolo_sophia.report.document import Picture
from yolo_sophia.report.figure_style import Style, short, to_png, to_svg
from yolo_sophia.runs.results import MAP50_95

CLIP, RHO = "sophia/clip_fraction", "sophia/rho"
POINTS = 25_000
"""Points of all lines of a page together; a line has 24 to 120. Keeps the page well under 3 MB."""


def styles(view: View) -> dict[str, Style]:
    """How each arm is drawn: the reference is number 0."""
    return {arm: Style(arm, number) for number, arm in enumerate(view.arms)}


def map_curves(view: View, data: str) -> list[Picture]:
    """MAP50-95 over steps, images and time."""
    target = view.target(data)
    return [_curves(view, data, MAP50_95, "mAP50-95", axis, target, empty=0.0) for axis in AXES]


def loss_curves(view: View, data: str, axis: str) -> list[Picture]:
    """Every training loss over one of the axes."""
    names = [name for name in view.columns if name.startswith("train/")]
    return [_curves(view, data, name, name.removeprefix("train/").replace("_", " "), axis) for name in names]


def sophia_curves(view: View, data: str) -> list[Picture]:
    """Clip fraction and rho over steps, of the arms that have them."""
    arms = [arm for arm in view.arms if any(CLIP in row for run in view.of_arm(arm, data) for row in run.rows[-1:])]
    names = {CLIP: "clip fraction", RHO: "rho"}
    return [_curves(view, data, column, name, "steps", arms=arms) for column, name in names.items()] if arms else []


def _curves(
    view: View,
    data: str,
    column: str,
    label: str,
    axis: str,
    target: float | None = None,
    *,
    empty: float = math.nan,
    arms: Sequence[str] | None = None,
) -> Picture:
    drawn = styles(view)
    losses = sum(name.startswith("train/") for name in view.columns)
    points = max(24, min(120, POINTS // (len(view.data) * len(view.arms) * 3 * (1 + losses))))
    lines = []
    for arm in view.arms if arms is None else arms:
        own = [result for result in view.of_arm(arm, data) if result.rows]
        finished = [result.rows for result in own if result.receipt is not None]
        broken = [result.rows for result in own if result.receipt is None]
        lines.append(figures.series(drawn[arm], finished, broken, axis, column, empty=empty, points=points))
    title = f"{short(data)}: {label} over {AXES_LABELS[axis].removeprefix('optimizer ').removeprefix('training ')}"
    ends = [f"{line.style.name} {line.middle[-1]:.3g}" if line.x else f"{line.style.name} no run" for line in lines]
    alt = f"{title}. Median of the runs at the end: {', '.join(ends)}."
    alt += "" if target is None else f" Target {target:.3f}."
    return picture(f"{data}-{label}-{axis}", figures.curves(title, label, axis, lines, target), alt)


def target_bars(view: View, data: str) -> list[Picture]:
    """Steps, images and time to the target, a bar per arm; nothing without a target."""
    target = view.target(data)
    if target is None or not any(view.has(arm, data) for arm in view.arms):
        return []
    pictures = []
    for axis in AXES:
        rows: list[tuple[Style, list[float], float | None]] = []
        words = []
        for arm, style in styles(view).items():
            summary = view.summary(arm, data)
            costs = [cost_to_target(Curve.of(result), target, axis) for result in view.of_arm(arm, data)]
            middle = summary.cost[axis] if summary else None
            rows.append((style, costs, middle))
            text = "not run" if middle is None else "missed" if math.isinf(middle) else f"{middle:,.0f}"
            words.append(f"{arm} {duration(middle) if axis == 'seconds' and text[0].isdigit() else text}")
        noun = "time" if axis == "seconds" else axis
        title = f"{short(data)}: {noun} to mAP50-95 {target:.3f}"
        alt = f"{title}, median over seeds: {', '.join(words)}."
        pictures.append(picture(f"{data}-{noun}-to-target", figures.bars(title, axis, rows), alt))
    return pictures


def ratio_forests(view: View) -> list[Picture]:
    """Ratios of steps and of time to the reference arm's on all data sets, with their intervals."""
    pictures, several = [], len(view.data) > 1
    for axis, noun in (("steps", "steps"), ("seconds", "time")):
        rows = []
        for data in view.data:
            for arm, style in styles(view).items():
                if ratio := view.ratio(arm, data, axis):
                    name = data if several and len(view.arms) == 2 else f"{short(arm, 14)}, {data}"
                    rows.append((name if several else arm, style, ratio))
        if any(ratio.informative for *_, ratio in rows):
            title = f"{noun} to the target over {short(view.plan.reference, 20)}'s"
            found = (f"{r.arm}{f' on {r.data}' if several else ''} {ratio_text(r)}" for *_, r in rows)
            alt = f"{title}: {', '.join(found)}."
            pictures.append(picture(f"{noun}-ratio", figures.forest(title[0].upper() + title[1:], rows), alt))
    return pictures


def horizon_curves(view: View, data: str) -> list[Picture]:
    """Median final mAP50-95 over the planned length of the schedule."""
    lines, words = [], []
    for arm, style in styles(view).items():
        if not view.has(arm, data) or not view.has(view.plan.reference, data):
            continue
        medians = horizon_score(view.curves, arm, view.plan.reference, data, view.plan.target).medians
        finals = {
            h: [c.final() or 0.0 for c in view.curves if (c.arm, c.data, c.horizon) == (arm, data, h)]
            for h, *_ in medians
        }
        x, middle = zip(*((h, max(value, 0.0)) for h, value, _ in medians))
        lines.append(Series(style, x, middle, *(tuple(f(finals[h]) for h in x) for f in (min, max))))
        words.append(f"{arm} " + ", ".join(f"{value:.3f} at {h:g} T" for h, value in zip(x, middle)))
    if not lines:
        return []
    title = f"{short(data)}: final mAP50-95 of full schedules"
    figure = figures.horizons(title, lines, view.target(data))
    return [picture(f"{data}-horizons", figure, f"{title}: {'; '.join(words)}.")]


def profile_curves(view: View) -> tuple[list[Picture], dict[str, tuple[float, ...]], list[str]]:
    """Performance profiles over the data sets on which all arms have a cost.

    Returns:
        The pictures, the areas under each arm's profiles, and the names of the data sets that were left out.
    """
    found = {data: {arm: view.summary(arm, data) for arm in view.arms} for data in view.data}
    ready = {d: own for d, own in found.items() if all(s is not None and s.target is not None for s in own.values())}
    pictures, areas = [], {arm: () for arm in view.arms}
    for axis in AXES if len(ready) > 1 else ():
        drawn = profiles({arm: {data: own[arm].cost[axis] for data, own in ready.items()} for arm in view.arms})
        rows = [(style, own.taus, own.fractions) for style, own in zip(styles(view).values(), drawn)]
        noun = "time" if axis == "seconds" else axis
        title = f"Performance profile: {noun} to target"
        alt = f"{title}. Area under the line: {', '.join(f'{own.arm} {own.area:.2f}' for own in drawn)}."
        pictures.append(picture(f"profile-{noun}", figures.profile(title, rows), alt))
        areas = {own.arm: (*areas[own.arm], own.area) for own in drawn}
    return pictures, areas, [data for data in view.data if data not in ready]


def picture(name: str, figure: Figure, alt: str) -> Picture:
    """The figure as a page and a folder take it, under a name that both can use."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
    return Picture(name, alt, to_svg(figure, alt, name.replace(".", "-")), to_png(figure))

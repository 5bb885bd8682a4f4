"""Performance profiles over several data sets."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from yolo_sophia.compare.figures import AXIS_NOUNS, mark_positions
from yolo_sophia.compare.pairwise import Profile
from yolo_sophia.compare.score import AXES
from yolo_sophia.compare.statistics import ComparisonResult
from yolo_sophia.report.document import Block, Gallery, Picture, Section, Table, Text
from yolo_sophia.report.figure_style import Style, panel, picture
from yolo_sophia.report.formatting import TIMES, decimal


def sections(result: ComparisonResult) -> list[Section]:
    """Profiles, the area below them, and the data sets that could not be included."""
    if len(result.data) < 2:
        return []
    blocks: list[Block] = []
    if result.profiles:
        pictures = [_picture(axis, result.profiles[axis]) for axis in AXES]
        text = "Share of the data sets on which an arm's cost to the target is within a factor of the best arm's."
        head = ["arm", *(AXIS_NOUNS[axis] for axis in AXES)]
        rows = [
            [arm, *(decimal(result.profiles[axis][number].area) for axis in AXES)]
            for number, arm in enumerate(result.arms)
        ]
        blocks = [Gallery(pictures, text), Table("Area under the profile; 1 is the best on every data set", head, rows)]
    else:
        blocks.append(Text("Fewer than two data sets have a cost for every arm."))
    if names := ", ".join(result.not_comparable):
        blocks.append(Text(f"Left out, because an arm has no ended runs or there is no target: {names}.", "note"))
    return [Section("profiles", "Over all data sets", blocks)]


def _picture(axis: str, profiles: tuple[Profile, ...]) -> Picture:
    title = f"Performance profile: {AXIS_NOUNS[axis]} to target"
    alt = f"{title}. Area under the line: {', '.join(f'{own.arm} {own.area:.2f}' for own in profiles)}."
    return picture(f"profile-{AXIS_NOUNS[axis]}", _figure(title, profiles), alt)


def _figure(title: str, profiles: tuple[Profile, ...]) -> Figure:
    styles = [Style(own.arm, number) for number, own in enumerate(profiles)]
    figure, axes = panel(title, styles)
    for style, own in zip(styles, profiles):
        marks = mark_positions(len(own.taus), style.number)
        axes.step(own.taus, own.fractions, where="post", markevery=marks, **style.line)
    axes.set(xlabel="factor over the best arm's cost", ylabel="share of the data sets", ylim=(-0.03, 1.05))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}{TIMES}"))
    return figure

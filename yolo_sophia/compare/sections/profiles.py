"""All data sets together: scores, probabilities of improvement, and performance profiles of scores and costs."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from yolo_sophia.compare.aggregate import Aggregate
from yolo_sophia.compare.figures import AXIS_NOUNS, mark_positions
from yolo_sophia.compare.pairwise import Profile
from yolo_sophia.compare.score import AXES
from yolo_sophia.compare.sections.verdict import TOO_FEW, interval_text
from yolo_sophia.compare.statistics import ComparisonResult
from yolo_sophia.report.document import Block, Cell, Gallery, Picture, Section, Table, Text
from yolo_sophia.report.figure_style import MUTED, Style, panel, picture
from yolo_sophia.report.formatting import DASH, TIMES, decimal

SCORE = (
    "Score of a run: its final mAP50-95 over {reference}'s median on the same data set, so that data sets of different "
    "difficulty count alike; 0 for a failed run. Intervals (95 %): bootstrap over the seeds of each data set; they say "
    "nothing about other data sets."
)
COST = "Share of the data sets on which an arm's cost to the target is within a factor of the best arm's."


def sections(result: ComparisonResult) -> list[Section]:
    """Statistics of the scores, profiles, and the data sets that could not be included."""
    if len(result.data) < 2:
        return []
    blocks: list[Block] = []
    if result.profiles:
        pictures = [_picture(axis, result.profiles[axis]) for axis in AXES]
        head = ["arm", *(AXIS_NOUNS[axis] for axis in AXES)]
        rows = [
            [arm, *(decimal(result.profiles[axis][number].area) for axis in AXES)]
            for number, arm in enumerate(result.arms)
        ]
        scores = Gallery([_score_picture(result.aggregates)], "Bands: 95 % interval.")
        blocks = [
            Text(SCORE.format(reference=result.plan.reference)),
            _table(result),
            scores,
            Gallery(pictures, COST),
            Table("Area under the profile; 1 is the best on every data set", head, rows),
        ]
    else:
        blocks.append(Text(TOO_FEW))
    if names := ", ".join(result.not_comparable):
        why = "an arm has no ended runs or the reference detects nothing"
        blocks.append(Text(f"Left out, because {why}: {names}.", "note"))
    return [Section("profiles", "Over all data sets", blocks)]


def _table(result: ComparisonResult) -> Table:
    head: list[Cell] = ["arm", ("score", "interquartile mean"), ("above the reference", "probability for a run")]
    rows: list[list[Cell]] = [
        [one.arm, interval_text(one.iqm), interval_text(one.improvement, 2) if one.improvement else DASH]
        for one in result.aggregates
    ]
    return Table("Scores over all data sets", head, rows)


def _score_picture(aggregates: tuple[Aggregate, ...]) -> Picture:
    """Share of the runs above each score, averaged over the data sets."""
    title = "Share of the runs above a score"
    styles = [Style(one.arm, number) for number, one in enumerate(aggregates)]
    figure, axes = panel(title, styles)
    for style, one in zip(styles, aggregates):
        if one.lows:
            axes.fill_between(one.taus, one.lows, one.highs, color=style.color, alpha=0.15, linewidth=0)
        axes.plot(one.taus, one.shares, markevery=mark_positions(len(one.taus), style.number), **style.line)
    axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    axes.set(xlabel="score; 1: the reference's median", ylabel="share of the runs", ylim=(-0.03, 1.05))
    words = ", ".join(f"{one.arm} {one.iqm.value:.3f}" for one in aggregates)
    return picture("score-profile", figure, f"{title}. Interquartile mean of the score: {words}.")


def _picture(axis: str, profiles: tuple[Profile, ...]) -> Picture:
    title = f"Performance profile: {AXIS_NOUNS[axis]} to target"
    alt = f"{title}. Area under the line: {', '.join(f'{profile.arm} {profile.area:.2f}' for profile in profiles)}."
    return picture(f"profile-{AXIS_NOUNS[axis]}", _figure(title, profiles), alt)


def _figure(title: str, profiles: tuple[Profile, ...]) -> Figure:
    styles = [Style(profile.arm, number) for number, profile in enumerate(profiles)]
    figure, axes = panel(title, styles)
    for style, profile in zip(styles, profiles):
        marks = mark_positions(len(profile.taus), style.number)
        axes.step(profile.taus, profile.fractions, where="post", markevery=marks, **style.line)
    axes.set(xlabel="factor over the best arm's cost", ylabel="share of the data sets", ylim=(-0.03, 1.05))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}{TIMES}"))
    return figure

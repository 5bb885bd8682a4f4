"""Figures of a study, one panel each.

The rule: finished, pruned and failed trials are told apart by their marks, not by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from yolo_sophia.report.figure_style import INK, MUTED, Style, panel, plain, row_panel, short
from yolo_sophia.search_space import Choice, Dimension
from yolo_sophia.tune.view import Trial

SCORE = "mAP50-95"
MARKS = {  # state -> arguments of its marks
    "finished": {"marker": "o", "markersize": 4.5},
    "pruned": {"marker": "x", "markersize": 5},
    "best": {"marker": "*", "markersize": 11},
}
COLORS = {"finished": Style("", 1).color, "pruned": MUTED, "best": Style("", 2).color}


def history(trials: Sequence[Trial], best: Trial) -> Figure:
    """The score of each trial, and the best so far as a line."""
    figure, axes = _marked("Scores of the trials", trials)
    finished = [trial for trial in trials if trial.state == "finished"]
    so_far = [max(t.value for t in finished[: i + 1]) for i in range(len(finished))]
    last = max(trial.number for trial in trials)
    numbers = [*(trial.number for trial in finished), last]
    axes.plot(numbers, [*so_far, so_far[-1]], drawstyle="steps-post", color=INK, linewidth=1)
    _scatter(axes, trials, best, [float(trial.number) for trial in trials])
    axes.set(xlabel="trial; the line: the best so far", ylabel=SCORE, xlim=(-0.5, last + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def curves(trials: Sequence[Trial], best: Trial, start: Trial | None) -> Figure:
    """What the pruner saw: the score after each epoch; the best trial and the one with the own settings stand out."""
    styles = [Style(f"best (trial {best.number})", 2)]
    styles += [Style(f"own settings (trial {start.number})", 0)] if start and start is not best else []
    figure, axes = panel("Scores after each epoch", styles)
    for trial in trials:
        colour = MUTED if trial.state == "pruned" else COLORS["finished"]
        axes.plot(list(trial.curve), list(trial.curve.values()), color=colour, linewidth=0.7, alpha=0.5)
        if trial.state == "pruned" and trial.curve:
            epoch, value = list(trial.curve.items())[-1]
            axes.plot(epoch, value, color=MUTED, linestyle="none", **MARKS["pruned"])
    for style, trial in zip(styles, (best, start)):
        every = max(1, len(trial.curve) // 8)
        axes.plot(list(trial.curve), list(trial.curve.values()), markevery=every, **style.line)
    axes.set(xlabel="epoch of the trial; a cross: stopped here", ylabel=SCORE)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def slices(key: str, dimension: Dimension, trials: Sequence[Trial], best: Trial) -> Figure:
    """Scores over the values of one argument."""
    trials = [trial for trial in trials if key in trial.settings]
    figure, axes = _marked(key, trials)
    if isinstance(dimension, Choice):
        names = list(map(str, dimension.values))
        _scatter(axes, trials, best, [float(names.index(str(trial.settings[key]))) for trial in trials])
        axes.xaxis.set_major_locator(FixedLocator(range(len(names))))
        axes.set_xticklabels([plain(short(name, 14)) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    else:
        _scatter(axes, trials, best, [float(trial.settings[key]) for trial in trials])
        if dimension.log:
            _logarithmic(axes)
    axes.set(xlabel=plain(key), ylabel=SCORE)
    return figure


def _logarithmic(axes: Axes) -> None:
    """A logarithmic x-axis with few and plain numbers: matplotlib's own overlap where a decade is wide."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) < 4 else (1,)
    shown = [x for k in decades for step in steps if low <= (x := float(f"{step}e{k}")) <= high]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def importance(shares: Mapping[str, float]) -> Figure:
    """Share of each argument in what separates good trials from others."""
    figure, axes = row_panel("Importance of the arguments", list(shares))
    for y, share in enumerate(shares.values()):
        axes.barh(y, share, height=0.58, color=COLORS["finished"], alpha=0.35, linewidth=0)
        axes.text(share + 0.015, y, f"{share:.0%}", va="center", color=INK, fontsize=8)
    axes.set(xlim=(0, 1.12), xlabel="share")
    axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    return figure


def score_of(trial: Trial) -> float:
    """The score of a finished trial, or the last that a pruned one had; NaN where there is none."""
    if trial.value is not None:
        return trial.value
    return list(trial.curve.values())[-1] if trial.state == "pruned" and trial.curve else math.nan


def _marked(title: str, trials: Sequence[Trial]) -> tuple[Figure, Axes]:
    """A panel whose legend has the marks that occur."""
    there = {"best", *(trial.state for trial in trials)}
    names = [state for state in MARKS if state in there]
    figure, axes = panel(title, [Style(name, number) for number, name in enumerate(names)])
    for handle, name in zip(figure.legends[0].legend_handles, names):
        handle.set(color=COLORS[name], linestyle="none", **MARKS[name])
    return figure, axes


def _scatter(axes: Axes, trials: Sequence[Trial], best: Trial, places: Sequence[float]) -> None:
    for trial, x in zip(trials, places):
        kind = "best" if trial is best else trial.state
        if kind in MARKS:
            layer = 4 if kind == "best" else 3
            axes.plot(x, score_of(trial), color=COLORS[kind], linestyle="none", zorder=layer, **MARKS[kind])

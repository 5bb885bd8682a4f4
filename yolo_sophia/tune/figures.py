"""Figures of a study: Optuna's plots as panels of a report, and the scores after each epoch.

Finished, pruned and best trials differ in their marks as well as in color.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import optuna.visualization.matplotlib as plots
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from optuna.importance import PedAnovaImportanceEvaluator

from yolo_sophia.report.figure_style import INK, MUTED, Style, panel, plain, row_panel, short
from yolo_sophia.search_space import Choice, Dimension
from yolo_sophia.tune.view import View

SCORE = "mAP50-95"
MARKS = {  # state -> style of its marks
    "finished": {"color": Style("", 1).color, "marker": "o", "markersize": 4.5},
    "pruned": {"color": MUTED, "marker": "x", "markersize": 5},
    "best": {"color": Style("", 2).color, "marker": "*", "markersize": 11},
}


def history(view: View) -> Figure:
    """The score of each trial, and the best so far as a line."""
    axes = _drawn(plots.plot_optimization_history, view)
    axes.lines[0].set(color=INK, linewidth=1, alpha=1, drawstyle="steps-post")
    figure = _marked(axes, "Scores of the trials", view, {trial.number: trial.number for trial in view.trials})
    axes.set(xlabel="trial; the line: the best so far", xlim=(-0.5, view.trials[-1].number + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def slices(view: View, key: str, dimension: Dimension) -> Figure:
    """Scores over the values of one argument."""
    axes = _drawn(plots.plot_slice, view, params=[key])
    choice = isinstance(dimension, Choice)
    places = {t.number: repr(t.settings[key]) if choice else t.settings[key] for t in view.trials if key in t.settings}
    figure = _marked(axes, key, view, places)
    if choice:
        names = [label.get_text().strip("'\"") for label in axes.get_xticklabels()]
        axes.set_xticks(range(len(names)), [plain(short(name, 14)) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
        return figure
    axes.autoscale(axis="x")  # Optuna's limits are those of the finished trials
    if dimension.log:
        _set_log_ticks(axes)
    return figure


def importance(view: View) -> Figure:
    """Share of each argument in what separates good trials from others."""
    axes = _drawn(plots.plot_param_importances, view, evaluator=PedAnovaImportanceEvaluator())
    names = [label.get_text() for label in axes.get_yticklabels()]
    figure, axes = row_panel("Importance of the arguments", names, axes)
    axes.set_ylim(-0.6, len(names) - 0.4)  # Optuna has the largest on top
    for bar in axes.patches:
        bar.set(color=MARKS["finished"]["color"], alpha=0.35, linewidth=0)
    for text in axes.texts:
        text.set(color=INK, fontsize=8, x=text.get_position()[0] + 0.01)
    axes.set(xlabel="share", ylabel="", xlim=(0, 1.15 * max(view.importance.values())))
    return figure


def curves(view: View) -> Figure:
    """The score after each epoch; the best trial and the one with the optimizer's own settings are highlighted."""
    best, start = view.best, view.start
    styles = [Style(f"best (trial {best.number})", 2)]
    styles += [Style(f"own settings (trial {start.number})", 0)] if start and start is not best else []
    figure, axes = panel("Scores after each epoch", styles)
    for trial in view.trials:
        color = MARKS["pruned" if trial.state == "pruned" else "finished"]["color"]
        axes.plot(list(trial.curve), list(trial.curve.values()), color=color, linewidth=0.7, alpha=0.5)
        if trial.state == "pruned" and trial.curve:
            epoch, value = list(trial.curve.items())[-1]
            axes.plot(epoch, value, linestyle="none", **MARKS["pruned"])
    for style, trial in zip(styles, (best, start)):
        every = max(1, len(trial.curve) // 8)
        axes.plot(list(trial.curve), list(trial.curve.values()), markevery=every, **style.line)
    axes.set(xlabel="epoch of the trial; a cross: stopped here", ylabel=SCORE)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def _drawn(plot: Callable[..., Axes], view: View, **options: Any) -> Axes:
    """A plot of Optuna's without title, legend and color bar, its marks in the style of finished trials."""
    backend = plt.get_backend()
    plt.switch_backend("agg")
    try:
        with rc_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to set identical low and high")  # one trial
            axes = plot(view.study, target_name=SCORE, **options)
            plt.close(axes.get_figure())
    finally:
        plt.switch_backend(backend)
    figure = axes.get_figure()
    figure.set_layout_engine("none")
    for artist in (*figure.axes[1:], axes.get_legend()):
        if artist is not None:
            artist.remove()
    for marks in axes.collections:
        marks.set_array(None)
        marks.set(facecolor=MARKS["finished"]["color"], edgecolor="none", sizes=[28])
    for place in ("left", "center"):
        axes.set_title("", loc=place)
    return axes


def _marked(axes: Axes, title: str, view: View, places: dict[int, Any]) -> Figure:
    """A panel from a plot of Optuna's, with marks for pruned trials and the best one; `places` are x by number."""
    there = {"best", *(trial.state for trial in view.trials)}
    names = [state for state in MARKS if state in there]
    figure, axes = panel(title, [Style(name, number) for number, name in enumerate(names)], axes)
    for handle, name in zip(figure.legends[0].legend_handles, names):
        handle.set(linestyle="none", **MARKS[name])
    for trial in view.trials:
        state = "best" if trial is view.best else trial.state
        if state in {"best", "pruned"} and trial.number in places and trial.score is not None:
            axes.plot([places[trial.number]], [trial.score], linestyle="none", zorder=4, **MARKS[state])
    return figure


def _set_log_ticks(axes: Axes) -> None:
    """Few and plain numbers: matplotlib's own labels overlap within a decade."""
    low, high = axes.get_xlim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) < 4 else (1,)
    shown = [x for k in decades for step in steps if low <= (x := float(f"{step}e{k}")) <= high]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))

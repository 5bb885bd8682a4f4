"""The report of a study: the best settings, figures, every trial, and the files to train with.

It is written whatever the state of the trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from yolo_sophia.atomic import atomic_write
from yolo_sophia.report.document import Block, Code, Document, Fold, Gallery, Section, Table, Text
from yolo_sophia.report.figure_style import picture
from yolo_sophia.report.formatting import DASH, count, csv_text, decimal, duration, scalar
from yolo_sophia.report.provenance import facts_table
from yolo_sophia.report.render import write_document
from yolo_sophia.runs.run import data_name
from yolo_sophia.search_space import Range
from yolo_sophia.tune import figures
from yolo_sophia.tune.plan import plan_yaml
from yolo_sophia.tune.view import Trial, View

CSV = "trials.csv"
READING = (
    "Score: the last mAP50-95 of a training, the mean over seeds and data sets where there are several. The best of "
    "many trials is too optimistic, because it was chosen on these validation images and with these seeds. Confirm it "
    "with yolo-sophia compare, whose default seeds are different.",
    "Pruned: stopped because its score fell behind the other trials at the same epoch; its mark is the last score.",
    "Importance (PED-ANOVA): how much an argument alone separates the best tenth of the finished trials from all of "
    "them. It has no direction, and few finished trials give a rough value.",
)


def write_report(view: View) -> Path:
    """Write report.html, report.md, figures/*.png, trials.csv and the best settings into the study's folder.

    Returns:
        Path of report.html.
    """
    out = view.plan.out
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (view.best_settings.files if view.best_settings else {}).items():
        atomic_write(out / name, text)
    atomic_write(out / CSV, rows_csv(view))
    return write_document(compose(view), out)


def compose(view: View) -> Document:
    """Render all sections."""
    plan = view.plan
    names = ", ".join(map(data_name, plan.data))
    parts = [
        Section("best", "Best settings", _best(view)),
        Section("figures", "What the trials show", _figures(view)),
        Section("trials", "Trials", _trials(view)),
        Section("space", "Space and settings", _space(view)),
        Section("setup", "Versions and hardware", [facts_table()]),
        Section("plan", "Plan", [Code(plan_yaml(plan), "Saved as plan.yaml: yolo-sophia tune plan=plan.yaml")]),
        Section("reading", "How to read this", [Text(text) for text in READING]),
    ]
    facts = [f"{len(view.having(state))} {state}" for state in ("pruned", "failed", "running") if view.having(state)]
    badges = [
        f"{len(view.having('finished'))} of {count(plan.trials, 'trial')} finished", *facts,
        f"{plan.epochs} epochs", count(len(plan.seeds), "seed"), f"sampler {plan.sampler}",
        f"pruner {plan.pruner}",
    ]  # fmt: skip
    return Document(f"{plan.arm.name} tuned on {names}", badges, parts)


def _best(view: View) -> list[Block]:
    best, plan = view.best, view.plan
    left = plan.trials - len(view.trials) + len(view.having("running"))
    blocks: list[Block] = []
    if left > 0:
        blocks.append(Text(f"Incomplete: {left} of {count(plan.trials, 'trial')} have not ended.", "warning"))
    if best is None:
        return [*blocks, Text("No trial has finished yet: there is nothing to recommend.", "warning")]
    words = ", ".join(f"{key} {scalar(value)}" for key, value in best.settings.items())
    text = f"Trial {best.number} has the best mAP50-95, {best.value:.4f}: {words}."
    if view.start is best:
        text += " These are the optimizer's own settings; no other trial was better."
    elif view.start is not None:
        text += f" The optimizer's own settings had {view.start.value:.4f} (trial {view.start.number})."
    blocks.append(Text(text))
    if len(plan.seeds) == 1:
        blocks.append(Text("One seed: differences of a few thousandths may be noise.", "note"))
    if edges := _at_an_edge(view, best):
        blocks.append(Text(f"At the edge of the space: {', '.join(edges)}. Better values may lie beyond.", "warning"))
    blocks.append(Code(view.best_settings.command, "Train with it"))
    blocks += [Code(text, name) for name, text in view.best_settings.files.items()]
    return blocks


def _at_an_edge(view: View, best: Trial) -> list[str]:
    """Arguments whose best value lies in the outer twentieth of its range."""
    found = []
    for key, dimension in view.plan.space.items():
        if isinstance(dimension, Range) and not dimension.at(0.05) < best.settings[key] < dimension.at(0.95):
            found.append(f"{key} {scalar(best.settings[key])} in {dimension}")
    return found


def _figures(view: View) -> list[Block]:
    if view.best is None:
        return []
    best = view.best
    words = f"The best is trial {best.number} with {best.value:.4f}."
    shown = [
        picture("history", figures.history(view), f"Scores of {count(len(view.trials), 'trial')}. {words}"),
        picture("curves", figures.curves(view), f"Scores after each epoch. {words}"),
    ]
    if view.importance:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in view.importance.items())
        shown.append(picture("importance", figures.importance(view), f"Importance: {shares}."))
    slices = [
        picture(f"slice-{key}", figures.slices(view, key, dimension), f"Scores over {key}. {words}")
        for key, dimension in view.plan.space.items()
    ]
    blocks: list[Block] = [Gallery(shown), Gallery(slices, "One panel per argument: scores over its values.")]
    if not view.importance:
        blocks.append(Text("No importances: too few finished trials, or all have the same score.", "note"))
    return blocks


def _trials(view: View) -> list[Block]:
    keys = list(view.plan.space)
    rows = []
    for trial in sorted(view.trials, key=lambda t: (t.value is None, -(t.value or 0), t.number)):
        cells = [scalar(trial.settings[key]) if key in trial.settings else DASH for key in keys]
        state = ("finished", "best") if trial is view.best else trial.state
        epochs = f"{max(trial.curve, default=0)} of {view.plan.trial_epochs}"
        rows.append([str(trial.number), state, decimal(trial.score, 4), *cells, epochs, duration(trial.seconds)])
    head = ["trial", "state", "mAP50-95", *keys, "epochs", "time"]
    blocks: list[Block] = [
        Text(f"{len(trials)} {state}.") for state in ("failed", "running") if (trials := view.having(state))
    ]
    blocks += [Code(t.note, f"Trial {t.number} failed. Last lines of its log") for t in view.having("failed")]
    return [*blocks, Table("Every trial, the best first; for a pruned trial the last score", head, rows)]


def _space(view: View) -> list[Block]:
    plan = view.plan
    rows = [
        [key, str(dimension), scalar(plan.start[key]) if key in plan.start else DASH]
        for key, dimension in plan.space.items()
    ]
    space = Table("What was searched", ["argument", "values", "the optimizer's own"], rows, numbers=False)
    fixed = [[key, scalar(value)] for key, value in plan.fixed.items()]
    return [
        space,
        Fold("What every trial has in common", [Table("Given", ["argument", "value"], fixed, numbers=False)]),
    ]


def rows_csv(view: View) -> str:
    """One line per trial."""
    keys = list(view.plan.space)
    rows: list[Sequence[object]] = [["trial", "state", "mAP50-95", *keys, "epochs", "seconds", "note"]]
    for trial in view.trials:
        settings = (trial.settings.get(key) for key in keys)
        last = max(trial.curve, default=0)
        rows.append([trial.number, trial.state, trial.value, *settings, last, trial.seconds, trial.note])
    return csv_text(rows)

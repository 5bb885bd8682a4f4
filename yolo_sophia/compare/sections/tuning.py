"""The tuning before the comparison."""

from __future__ import annotations

from yolo_sophia.compare.statistics import ComparisonResult
from yolo_sophia.compare.tuning import Search
from yolo_sophia.report.document import Block, Cell, Fold, Section, Table, Text
from yolo_sophia.report.formatting import DASH, count, scalar
from yolo_sophia.runs.run import data_name

MEASURED = ("mAP50-95", "state")
"""Keys of a trial that are not settings."""


def sections(result: ComparisonResult) -> list[Section]:
    """The budget, and every search in full."""
    return [Section("tuning", "Tuning", [*_budget(result), *map(_search, result.searches)])]


def _budget(result: ComparisonResult) -> list[Block]:
    trials, epochs, searches = result.plan.tune_trials, result.plan.tune_epochs, result.searches
    if not trials:
        return [Text("Untuned (tune_trials=0): every arm ran with its preset or defaults.")]
    length = count(epochs, "epoch") if epochs else "a third of the epochs"
    text = f"The budget of every arm: {count(trials, 'trial')} of {length} each, on the data set itself."
    if other := [f"{s.arm} on {data_name(s.data)}: {len(s.trials)}" for s in searches if len(s.trials) != trials]:
        text += f" Another number of trials: {', '.join(other)}."
    known = {(search.arm, data_name(search.data)) for search in searches}
    arms = [arm for data in result.data for arm in data.arms]
    lacking = [f"{arm.name} on {arm.data}" for arm in arms if (arm.name, arm.data) not in known]
    warning = f"No record of the search of {', '.join(lacking)}."
    return [Text(text), *([Text(warning, "warning")] if lacking else [])]


def _search(search: Search) -> Fold:
    keys = dict.fromkeys(key for trial in (*search.trials, search.chosen) for key in trial)
    order = sorted(keys, key=MEASURED.__contains__)
    rows: list[list[Cell]] = []
    for number, trial in enumerate(search.trials):
        chosen = {key: value for key, value in trial.items() if key not in MEASURED} == dict(search.chosen)
        cells = [DASH if trial.get(key) is None else scalar(trial[key]) for key in order]
        rows.append([(str(number), "chosen" if chosen else ""), *cells])
    name = f"{search.arm} on {data_name(search.data)}"
    best = ", ".join(f"{key}={scalar(value)}" for key, value in search.chosen.items()) or "as planned"
    table = Table(f"{name}; a dash: as planned", ["trial", *order], rows)
    return Fold(f"{name}: {count(len(rows), 'trial')}, chosen: {best}", [table])

"""The sections of a report, each a function of the view that returns blocks.

The rule: nothing is hidden. What is missing, failed, diverged, untuned or shown by too few seeds is said before the
numbers that it bears on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

from yolo_sophia.compare import galleries, headline, tables
from yolo_sophia.compare.score import AXES, FULL, Curve, cost_to_target
from yolo_sophia.compare.tables import DASH, count, duration, scalar
from yolo_sophia.compare.tuning import Search
from yolo_sophia.compare.view import View
from yolo_sophia.report.document import Block, Cell, Code, Fold, Gallery, Split, Table, Text
from yolo_sophia.runs import environment as machine
from yolo_sophia.runs.run import data_name

BATCH_NORM = {
    True: "BatchNorm: running statistics were recalibrated on training images before each validation, in every arm.",
    False: "BatchNorm: running statistics as Ultralytics keeps them, in every arm (bn_recalibrate=False). Validation "
    "early in a run measures how far they lag behind as much as the optimizer.",
}
MEASURED = ("score", "mAP50-95", "status", "state")
"""Keys of a trial that are no settings."""


def verdict(view: View) -> list[Block]:
    """What was shown, and what to know before believing it."""
    blocks: list[Block] = []
    if view.missing:
        text = f"{len(view.missing)} of {count(view.planned, 'run')} not ended: {_listed(view.missing[:6])}"
        text += f" and {len(view.missing) - 6} more (see Runs)" if len(view.missing) > 6 else ""
        blocks.append(Text(f"Incomplete. {text}. All that follows rests on the others and may change.", "warning"))
    if not any(result.receipt is not None for result in view.results):
        blocks.append(Text("No run has finished yet: there is nothing to compare.", "warning"))
        return blocks
    if len(view.arms) == 1:
        blocks.append(Text(f"{view.arms[0]} is the only arm: there is nothing to compare it with."))
    said: list[Block] = [verdict for data in view.data for verdict in headline.verdicts(view, data)]
    said += headline.control_verdicts(view)
    if not view.plan.tune_trials and len(view.arms) > 1:
        text = "Untuned: every arm ran with its preset or defaults, so this compares settings as much as optimizers."
        said.append(Text(text, "note"))
    said.append(Text(BATCH_NORM[view.plan.bn_recalibrate], "note"))
    drawn = galleries.ratio_forests(view)
    caption = "Marks: median over seeds. Lines: 95 % interval, an arrow where it goes on."
    return [*blocks, *([Split(said, [Gallery(drawn, caption)])] if drawn else said)]


def results(view: View, data: str) -> list[Block]:
    """The main table of a data set, its curves, and time to the target."""
    if not any(view.has(arm, data) for arm in view.arms):
        return [Text("No full run has ended here yet.")]
    caption = (
        "Lines: median over seeds, aligned by epoch. Bands: from the lowest to the highest seed; a band may leave the "
        "picture. Thin lines that end in a cross: runs that crashed."
    )
    blocks: list[Block] = [tables.results_table(view, data), Gallery(galleries.map_curves(view, data), caption)]
    if bars := galleries.target_bars(view, data):
        blocks.append(Gallery(bars, "Bars: median over seeds. Marks: seeds."))
    for axis, noun in zip(AXES, ("steps", "images", "time")):
        if losses := galleries.loss_curves(view, data, axis):
            blocks.append(Fold(f"Training losses over {noun}", [Gallery(losses)], opened=axis == "steps"))
    return blocks


def profiles(view: View) -> list[Block]:
    """Performance profiles."""
    drawn, areas, left_out = galleries.profile_curves(view)
    text = "Share of the data sets on which an arm's cost to the target is within a factor of the best arm's."
    blocks: list[Block] = (
        [Gallery(drawn, text)] if drawn else [Text("Fewer than two data sets have a cost for every arm.")]
    )
    if drawn:
        rows = [[arm, *(f"{area:.3f}" for area in own)] for arm, own in areas.items()]
        head = ["arm", *("time" if axis == "seconds" else axis for axis in AXES)]
        blocks.append(Table("Area under the profile; 1 is the best on every data set", head, rows))
    if left_out:
        blocks.append(
            Text(f"Left out, as not every arm has ended runs or there is no target: {', '.join(left_out)}.", "note")
        )
    return blocks


def horizons(view: View) -> list[Block]:
    """Full schedules over fractions of T."""
    blocks: list[Block] = []
    for data in view.data:
        blocks.append(tables.horizon_table(view, data))
        blocks += [Gallery(drawn)] if (drawn := galleries.horizon_curves(view, data)) else []
    return blocks


def sophia(view: View) -> list[Block]:
    """Clip fraction, rho and Hessian updates."""
    drawn = [picture for data in view.data for picture in galleries.sophia_curves(view, data)]
    caption = (
        "Clip fraction: share of the coordinates whose update is cut to the learning rate, as sampled in an epoch."
    )
    found = tables.sophia_table(view)
    return ([Gallery(drawn, caption)] if drawn else []) + ([found] if found else [])


def runs(view: View) -> list[Block]:
    """What became of every run."""
    blocks: list[Block] = []
    failed = [result for result in view.results if result.failure is not None and result.receipt is None]
    diverged = [(c.arm, c.data, c.seed, c.horizon) for c in view.curves if c.diverged]
    if view.missing:
        blocks.append(Text(f"Not ended: {_listed(view.missing)}."))
    if diverged:
        blocks.append(
            Text(f"Diverged (an mAP not finite, or the last under a tenth of the best): {_listed(diverged)}.")
        )
    for result in failed:
        run = result.run
        where = _listed([(run.arm, data_name(run.data), run.seed, run.horizon)])
        label = f"Failed after {count(len(result.rows), 'epoch')}: {where}. Last lines of its log"
        blocks.append(Code(result.failure or "", label))
    if not (view.missing or diverged or failed):
        blocks.append(Text(f"All {count(view.planned, 'run')} finished, none diverged."))
    rows = []
    for result in view.results:
        curve, run, target = (
            Curve.of(result) if result.ended else None,
            result.run,
            view.target(data_name(result.run.data)),
        )
        final = curve.final() if curve else None
        cost = cost_to_target(curve, target, "steps") if curve and target and run.horizon == FULL else None
        state = "finished" if result.receipt is not None else "failed" if result.ended else "not ended"
        rows.append([
            run.key, state, str(len(result.rows)), DASH if final is None else f"{final:.3f}",
            DASH if cost is None else "missed" if math.isinf(cost) else f"{cost:,.0f}",
            duration(result.rows[-1].get("seconds") if result.rows else None),
            duration((result.receipt or {}).get("wall_seconds")),
        ])  # fmt: skip
    head = [
        "run",
        "state",
        "epochs",
        ("final", "mAP50-95"),
        ("steps", "to target"),
        ("time", "training"),
        ("time", "in all"),
    ]
    blocks.append(Fold("Every run", [Table("Every run of the plan that has a record", head, rows)]))
    return blocks


def settings(view: View) -> list[Block]:
    """The arms' arguments, the differing ones first."""
    differing, same = tables.settings_tables(view)
    blocks: list[Block] = [differing] if differing else []
    if any(str(arm.arguments.get("optimizer")) == "auto" for arm in view.plan.arms):
        text = "optimizer=auto: Ultralytics chooses optimizer, lr0 and momentum itself and ignores those listed here."
        blocks.append(Text(text, "note"))
    return blocks + ([Fold(f"{len(same.rows)} arguments that are the same in all arms", [same])] if same else [])


def tuning(view: View, searches: Sequence[Search]) -> list[Block]:
    """Each search in full."""
    trials, blocks = view.plan.tune_trials, []
    if not trials:
        blocks.append(Text("Untuned (tune_trials=0): every arm ran with its preset or defaults."))
    else:
        epochs = view.plan.tune_epochs
        length = count(epochs, "epoch") if epochs else "a third of the epochs"
        text = f"The budget of every arm: {count(trials, 'trial')} of {length} each, on the data set itself."
        if other := [f"{s.arm} on {data_name(s.data)}: {len(s.trials)}" for s in searches if len(s.trials) != trials]:
            text += f" Another number of trials: {', '.join(other)}."
        blocks.append(Text(text))
        known = {(search.arm, data_name(search.data)) for search in searches}
        lacking = [f"{arm} on {data}" for data in view.data for arm in view.arms if (arm, data) not in known]
        if lacking:
            blocks.append(Text(f"No record of the search of {', '.join(lacking)}.", "warning"))
    for search in searches:
        keys = [key for trial in (*search.trials, search.chosen) for key in trial]
        keys = sorted(dict.fromkeys(keys), key=MEASURED.__contains__)
        rows: list[list[Cell]] = []
        for number, trial in enumerate(search.trials):
            settings = {key: value for key, value in trial.items() if key not in MEASURED}
            cells = [DASH if trial.get(key) is None else scalar(trial[key]) for key in keys]
            rows.append([(str(number), "chosen" if settings == dict(search.chosen) else ""), *cells])
        name = f"{search.arm} on {data_name(search.data)}"
        chosen = ", ".join(f"{key}={scalar(value)}" for key, value in search.chosen.items()) or "as planned"
        table = Table(f"{name}; a dash: as planned", ["trial", *keys], rows)
        blocks.append(Fold(f"{name}: {count(len(rows), 'trial')}, chosen: {chosen}", [table]))
    return blocks


def setup(view: View) -> list[Block]:
    """Versions, hardware, date, commit, and how BatchNorm was treated."""
    receipts = [result.receipt for result in view.results if result.receipt is not None]
    facts: dict[str, str] = {"report written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")}
    facts |= {f"commit of {name}": commit for name, commit in machine.commits().items()}
    versions: dict[str, list[str]] = {}
    for receipt in receipts:
        for name, version in {**(receipt.get("versions") or {}), "device": receipt.get("device")}.items():
            if version and str(version) not in versions.setdefault(name, []):
                versions[name].append(str(version))
    facts |= {name: ", ".join(found) for name, found in versions.items()}
    facts |= {f"this machine's {name}": value for name, value in machine.hardware().items()}
    local = str(view.plan.workers or "one per device, else 1")
    facts["runs side by side"] = local if view.plan.engine == "local" else "as the Ray cluster has room"
    if receipts:
        total = sum(float(receipt.get("wall_seconds") or 0) for receipt in receipts)
        facts["wall time of all finished runs"] = duration(total)
    blocks: list[Block] = []
    if mixed := [name for name, found in versions.items() if len(found) > 1]:
        blocks.append(Text(f"Not the same in all runs: {', '.join(mixed)}.", "warning"))
    blocks.append(Table("Versions, hardware and date", ["fact", "value"], list(map(list, facts.items())), False))
    text = "Runs side by side compete for the machine: times, and ratios of times, are rougher than steps."
    return [
        *blocks,
        *([Text(text, "note")] if (view.plan.workers or 1) > 1 else []),
        Text(BATCH_NORM[view.plan.bn_recalibrate]),
    ]


def _listed(runs: Sequence[tuple[str, str, int, float]]) -> str:
    return "; ".join(f"{arm} on {data}, seed {seed}" + f", {h:g} T" * (h != FULL) for arm, data, seed, h in runs)

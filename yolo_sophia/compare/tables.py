"""A report's tables; pure functions of a plan and its results.

The rule: a number that is not there is a dash, a target that was not reached is "missed", never an empty cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from yolo_sophia.compare.score import AXES, FULL, Mean, Ratio, Summary, mean
from yolo_sophia.compare.verdict import horizon_score
from yolo_sophia.compare.view import View
from yolo_sophia.report.document import PLUS_MINUS, Cell, Table
from yolo_sophia.runs.results import RunResult
from yolo_sophia.runs.run import data_name

DASH, TIMES, INFINITY = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}", "\N{INFINITY}"
OF_A_RUN = ("seed", "data", "epochs", "name", "project", "save_dir", "resume")  # arguments that say nothing of an arm


def results_table(view: View, data: str) -> Table:
    """The main table of a data set."""
    target = view.target(data)
    head: list[Cell] = ["arm", ("final", "mAP50-95"), ("best", "mAP50-95"), ("final", "mAP50")]
    head += [(f"{axis if axis != 'seconds' else 'time'} to target", "ratio, 95 % interval") for axis in AXES]
    head += [("step", "median time"), ("refreshes", "share of time"), ("memory", "peak"), "runs"]
    rows = []
    summaries = {arm: view.summary(arm, data) for arm in view.arms}
    times_taken = [s.cost["seconds"] for s in summaries.values() if s and s.cost["seconds"] is not None]
    longest = max((seconds for seconds in times_taken if math.isfinite(seconds)), default=0.0)
    for arm, summary in summaries.items():
        named: Cell = (arm, "reference") if arm == view.plan.reference else arm
        if summary is None:
            rows.append([named, *[DASH] * (len(head) - 2), states(view, arm, data, None)])
            continue
        row: list[Cell] = [named, *(spread(value) for value in (summary.final, summary.best, summary.final50))]
        row += [cost(summary, axis, view.ratio(arm, data, axis), longest) for axis in AXES]
        step, share, memory = burden(view.of_arm(arm, data))
        row += [duration(step), DASH if share is None else f"{share:.1%}", size(memory)]
        rows.append([*row, states(view, arm, data, summary)])
    aim = f"target: mAP50-95 {target:.3f}" if target else "no target"
    return Table(f"{data}: {aim}; mean {PLUS_MINUS} half of the 95 % interval, medians over seeds", head, rows)


def cost(summary: Summary, axis: str, ratio: Ratio | None, longest: float) -> Cell:
    """Median cost to the target, with the ratio to the reference arm's; times in the unit of the longest."""
    value = summary.cost[axis]
    if value is None:
        return DASH
    text = "missed" if math.isinf(value) else duration(value, longest) if axis == "seconds" else f"{round(value):,}"
    return text, "" if ratio is None else ratio_text(ratio)


def ratio_text(ratio: Ratio) -> str:
    """A ratio with its interval."""
    if not ratio.informative:
        return "no ratio"
    value = "unknown" if ratio.value is None else f"{times(ratio.value)}{TIMES}"
    known = ratio.low is not None and not math.isinf(ratio.low)
    return value + (f" ({times(ratio.low)}{DASH}{times(ratio.high)})" if known else "")


def states(view: View, arm: str, data: str, summary: Summary | None) -> Cell:
    """How many full runs finished, and what became of the others."""
    missing = sum((a, d, h) == (arm, data, FULL) for a, d, _, h in view.missing)
    ended = len(summary.seeds) if summary else 0
    others = {"failed": summary.failed, "diverged": summary.diverged} if summary else {}
    others |= {"missed the target": summary.missed} if summary and summary.missed else {}
    parts = [f"{number} {what}" for what, number in {**others, "missing": missing}.items() if number]
    finished = ended - (summary.failed if summary else 0)
    return f"{finished} of {len(view.plan.seeds)} finished", ", ".join(parts)


def burden(results: Sequence[RunResult]) -> tuple[float | None, float | None, int | None]:
    """What an arm costs: seconds per optimizer step, share of the time in refreshes, largest peak memory in bytes.

    The first is the median over all epochs of finished runs, the second the median over them, None without refreshes.
    """
    done = [result for result in results if result.receipt is not None and result.rows]
    steps, shares = [], []
    for result in done:
        for before, row in pairwise(({"steps": 0, "seconds": 0.0}, *result.rows)):
            if taken := row["steps"] - before["steps"]:
                steps.append((row["seconds"] - before["seconds"]) / taken)
        refreshes = [
            row["sophia/refresh_seconds"] for row in result.rows if row.get("sophia/refresh_seconds") is not None
        ]
        if refreshes and result.rows[-1]["seconds"]:
            shares.append(sum(refreshes) / result.rows[-1]["seconds"])
    memory = max((int(result.receipt.get("peak_memory_bytes") or 0) for result in done), default=0)
    return median(steps) if steps else None, median(shares) if shares else None, memory or None


def horizon_table(view: View, data: str) -> Table:
    """Median final mAP50-95 of every planned schedule."""
    head: list[Cell] = [
        "arm",
        *((f"{h:g} T", f"{max(1, round(view.plan.epochs * h))} epochs") for h in view.plan.horizons),
    ]
    rows: list[list[Cell]] = []
    for arm in view.arms:
        row: list[Cell] = [arm]
        score = None
        if view.has(arm, data) and view.has(view.plan.reference, data):
            score = horizon_score(view.curves, arm, view.plan.reference, data, view.plan.target)
        found = {} if score is None else {horizon: (value, seeds) for horizon, value, seeds in score.medians}
        for horizon in view.plan.horizons:
            value, seeds = found.get(horizon, (None, 0))
            text = DASH if value is None else "failed" if math.isinf(value) else f"{value:.3f}"
            row.append((text, count(seeds, "seed")))
        rows.append([*row, DASH if score is None else "none" if score.shortest is None else f"{score.shortest:g} T"])
    head.append(("shortest", "to reach the target"))
    return Table(f"{data}: median final mAP50-95 of full schedules over a fraction of T", head, rows)


def sophia_table(view: View) -> Table | None:
    """Hessian updates of the arms that have any."""
    rows = []
    for arm in view.arms:
        last = [r.rows[-1] for r in view.of_arm(arm, horizon=None) if r.rows and "sophia/refreshes" in r.rows[-1]]
        if last:
            refreshes, dropped = ([row.get(f"sophia/{key}") or 0 for row in last] for key in ("refreshes", "dropped"))
            rows.append([arm, str(len(last)), f"{median(refreshes):,.0f}", f"{sum(dropped):,.0f}"])
    head = ["arm", "runs", ("Hessian updates", "median of a run"), ("dropped", "not finite, all runs")]
    return Table("Hessian updates", head, rows) if rows else None


def settings_tables(view: View) -> tuple[Table | None, Table | None]:
    """Arguments as recorded in finished runs, or as planned: those that differ between arms, and the others."""
    values: dict[str, dict[str, str]] = {}
    names: list[Cell] = []
    for arm in view.plan.arms:
        done = [r for r in view.of_arm(arm.name, horizon=None) if r.receipt is not None and r.receipt.get("args")]
        names.append(arm.name if done else (arm.name, "as planned, no run finished"))
        # A resumed run has recorded its checkpoint as the model.
        recorded = [(data_name(r.run.data), {**r.receipt["args"], "model": r.run.arguments.get("model")}) for r in done]
        if not done:
            runs = [result.run for result in view.results if result.run.arm == arm.name]
            recorded = [(data_name(run.data), run.arguments) for run in runs] or [
                ("", {**view.plan.common, **arm.arguments})
            ]
        for key in sorted({key for _, arguments in recorded for key in arguments} - set(OF_A_RUN)):
            values.setdefault(key, {})[arm.name] = _where(recorded, key)
    arms = [arm.name for arm in view.plan.arms]
    rows = {key: [own.get(arm, DASH) for arm in arms] for key, own in values.items()}
    order = [key for key in ("optimizer", "lr0") if key in rows]
    order += sorted(rows.keys() - set(order))
    differing = [[key, *rows[key]] for key in order if len(set(rows[key])) > 1]
    same = [[key, rows[key][0]] for key in order if len(set(rows[key])) == 1]
    return (
        Table("Arguments that differ between the arms", ["argument", *names], differing, False) if differing else None,
        Table("The same in all arms", ["argument", "value"], same, False) if same else None,
    )


def _where(recorded: Sequence[tuple[str, Mapping[str, Any]]], key: str) -> str:
    """One value, or each with its data sets where tuning found others."""
    found: dict[str, list[str]] = {}
    for data, arguments in recorded:
        text = scalar(arguments[key]) if key in arguments else DASH
        found.setdefault(text, [])
        if data not in found[text]:
            found[text].append(data)
    return next(iter(found)) if len(found) == 1 else "; ".join(f"{v} ({', '.join(d)})" for v, d in found.items())


def coco_table(view: View, coco: Mapping[str, Mapping[str, float]]) -> Table:
    """COCO metrics of full runs, averaged over seeds; a negative one says that there was no such object."""
    metrics = list(dict.fromkeys(name for own in coco.values() for name in own))
    rows = []
    for data in view.data:
        for arm in view.arms:
            own = [coco[r.run.key] for r in view.of_arm(arm, data) if r.run.key in coco]
            if own:
                cells = [spread(mean(m[name] for m in own if m.get(name, -1) >= 0)) for name in metrics]
                rows.append([(arm, f"{data}, {count(len(own), 'run')}"), *cells])
    return Table("COCO metrics at the end of full runs", ["arm", *metrics], rows)


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}" + "s" * (number != 1)


def times(value: float) -> str:
    """A ratio's number."""
    return INFINITY if math.isinf(value) else f"{value:.2f}"


def spread(value: Mean) -> Cell:
    """A mean with half of its interval."""
    if value.value is None:
        return DASH
    return (
        f"{value.value:.3f}",
        "1 run" if value.high is None else f"{PLUS_MINUS} {value.high - value.value:.3f}",
    )


def duration(seconds: float | None, longest: float | None = None) -> str:
    """Seconds in a unit that suits them, or the longest time beside them."""
    if seconds is None:
        return DASH
    for unit, length in (("h", 3600), ("min", 60)):
        if (longest or seconds) >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def size(number: int | None) -> str:
    """Bytes in a unit that suits them."""
    if number is None:
        return DASH
    return f"{number / 2**30:.2f} GiB" if number >= 2**29 else f"{number / 2**20:.0f} MiB"


def scalar(value: Any) -> str:
    """A setting as text; a float in full, and 3.0 as 3."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)

"""The report of a comparison: report.html, report.md, results.csv and figures/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from yolo_sophia.atomic import atomic_write
from yolo_sophia.compare.plan import Plan
from yolo_sophia.compare.preflight import load_preflight
from yolo_sophia.compare.sections import SECTIONS
from yolo_sophia.compare.statistics import ComparisonResult, compute
from yolo_sophia.compare.tuning import Search
from yolo_sophia.report.document import Document
from yolo_sophia.report.formatting import count, csv_text, enumerated
from yolo_sophia.report.render import write_document
from yolo_sophia.runs.results import RunResult

CSV = "results.csv"


def write_report(
    plan: Plan,
    results: Sequence[RunResult],
    out: Path,
    *,
    searches: Sequence[Search] = (),
    coco: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write report.html, report.md, results.csv and figures/*.png atomically, whatever the state of the runs.

    Args:
        plan: The plan.
        results: Its runs; planned runs without a result are reported as not ended.
        out: Folder to write to; created if necessary.
        searches: What tuning tried.
        coco: COCO metrics (fractions) by the key of their run.

    Returns:
        Path of report.html.

    Raises:
        ValueError: A result belongs to an arm or a data set that the plan lacks.
    """
    out = Path(out)
    result = compute(plan, results, searches, coco, load_preflight(out))
    document = compose(result)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / CSV, rows_csv(result))
    return write_document(document, out)


def compose(result: ComparisonResult) -> Document:
    """Render all sections."""
    return Document(title(result), badges(result), [one for module in SECTIONS for one in module.sections(result)])


def title(result: ComparisonResult) -> str:
    """Arms, reference, data sets, and whether anything was tuned."""
    first, *others = (arm for arm in result.arms if arm not in result.repeated)
    text = f"{first} alone"
    if others:
        text = f"{enumerated(others) if len(others) < 5 else f'{len(others)} arms'} against {first}"
    text += f" on {result.data[0].name}" if len(result.data) == 1 else f" on {len(result.data)} data sets"
    trials = result.plan.tune_trials
    return text + (f" (tuned, {count(trials, 'trial')} per arm)" if trials else " (untuned)")


def badges(result: ComparisonResult) -> list[str]:
    """Short facts that a reader should know before the verdict."""
    plan, states = result.plan, [record.state for record in result.records]
    failed = states.count("failed")
    lengths = sorted({data.epochs for data in result.data})
    return [
        count(len(plan.seeds), "seed"),
        f"{lengths[0]} to {lengths[-1]} epochs" if len(lengths) > 1 else f"{lengths[0]} epochs",
        f"{states.count('finished')} of {count(result.planned, 'run')} finished",
        *([f"{failed} failed"] if failed else []),
        *([] if plan.tune_trials else ["untuned: presets and defaults"]),
        f"BatchNorm {'recalibrated before each validation' if plan.bn_recalibrate else 'as Ultralytics keeps it'}",
    ]


def rows_csv(result: ComparisonResult) -> str:
    """One line per run and epoch; "nan" for a value that was not finite, empty for a column that the run lacks."""
    first = ["epoch", "steps", "images", "seconds"]
    columns = [*first, *(name for name in result.columns if name not in first)]
    rows = [["data", "arm", "seed", "horizon", "state", "key", *columns]]
    for record in result.records:
        run = record.result.run
        for row in record.result.rows:
            values = ["nan" if key in row and row[key] is None else row.get(key) for key in columns]
            rows.append([record.data, run.arm, run.seed, f"{run.horizon:g}", record.state, run.key, *values])
    return csv_text(rows)

"""The report of a comparison: verdict on top, then tables, curves, settings and everything needed to run it again.

The rule: a report is written whatever the state of the runs, and each of its files is whole or the old one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from yolo_sophia.atomic import atomic_write
from yolo_sophia.compare import headline, sections, tables
from yolo_sophia.compare.plan import Plan, plan_yaml
from yolo_sophia.compare.tuning import Search
from yolo_sophia.compare.view import View
from yolo_sophia.report.document import Code, Document, Section, Text, pictures, to_html
from yolo_sophia.report.markdown import to_markdown
from yolo_sophia.runs.results import RunResult
from yolo_sophia.runs.run import data_name

HTML, MARKDOWN, CSV, FIGURES = "report.html", "report.md", "results.csv", "figures"
READING = (
    "Cost to the target: optimizer steps, images or training time (without validation) up to the end of the first "
    "epoch that reaches the target; the median over seeds, where a run that missed it or crashed counts as infinite.",
    "Ratio: the median over seeds of the arm's cost over the reference arm's with the same seed, which shares initial "
    "weights, data order and augmentation; under 1 is cheaper. The interval is a bootstrap over seeds.",
    "A run can touch its own final mAP early by luck, and a long schedule passes late through values that a short one "
    "would have reached sooner: where horizons were run, they are the fairer score.",
    "Best mAP is chosen on the validation images themselves and flatters every arm.",
)


def write_report(
    plan: Plan,
    results: Sequence[RunResult],
    out: Path,
    *,
    searches: Sequence[Search] = (),
    coco: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write report.html, report.md, results.csv and figures/*.png, each file whole or not at all.

    Args:
        plan: The plan.
        results: Its runs as they stand; those that have not ended are listed as missing.
        out: Folder to write into; made if need be.
        searches: What tuning tried: per trial its settings, and what came of it under keys of
            `sections.MEASURED`.
        coco: COCO metrics (fractions) by the key of their run.

    Returns:
        Path of report.html.

    Raises:
        ValueError: A result belongs to an arm or a data set that the plan lacks.
    """
    out = Path(out)
    view = View.of(plan, results)
    document = compose(view, searches, coco or {})
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / CSV, rows_csv(view))
    return write_document(document, out)


def write_document(document: Document, out: Path) -> Path:
    """Write a document as report.html, report.md and figures/*.png; returns the path of the first."""
    (out / FIGURES).mkdir(parents=True, exist_ok=True)
    for picture in pictures(document.sections):
        atomic_write(out / FIGURES / f"{picture.name}.png", picture.png)
    atomic_write(out / MARKDOWN, to_markdown(document, FIGURES))
    atomic_write(out / HTML, to_html(document))
    return out / HTML


def compose(view: View, searches: Sequence[Search], coco: Mapping[str, Mapping[str, float]]) -> Document:
    """Put the report together."""
    several = len(view.data) > 1
    parts = [Section("verdict", "Verdict", sections.verdict(view))]
    for number, data in enumerate(view.data, 1):
        name = f"results-{number}" if several else "results"
        parts.append(Section(name, f"Results on {data}", sections.results(view, data)))
    parts += [
        Section("profiles", "Over all data sets", sections.profiles(view) if several else []),
        Section("horizons", "Planned horizons", sections.horizons(view) if len(view.plan.horizons) > 1 else []),
        Section("coco", "COCO metrics", [tables.coco_table(view, coco)] if coco else []),
        Section("sophia", "Inside Sophia", sections.sophia(view)),
        Section("runs", "Runs", sections.runs(view)),
        Section("settings", "Settings", sections.settings(view)),
        Section("tuning", "Tuning", sections.tuning(view, searches)),
        Section("setup", "Versions and hardware", sections.setup(view)),
        Section("plan", "Plan", [Code(plan_yaml(view.plan), "Saved as plan.yaml: yolo-sophia compare plan=plan.yaml")]),
        Section("reading", "How to read this", [Text(text) for text in READING]),
    ]  # fmt: skip
    return Document(headline.title(view), headline.badges(view), parts)


def rows_csv(view: View) -> str:
    """One line per run and epoch; "nan" is a value that was not finite, and nothing a column that the run lacks."""
    first = ["epoch", "steps", "images", "seconds"]
    others = [name for name in view.columns if name not in first]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["data", "arm", "seed", "horizon", "state", "key", *first, *others])
    for result in view.results:
        run, state = result.run, "finished" if result.receipt is not None else "failed" if result.ended else "not ended"
        for row in result.rows:
            values = ["nan" if key in row and row[key] is None else row.get(key, "") for key in (*first, *others)]
            writer.writerow([data_name(run.data), run.arm, run.seed, f"{run.horizon:g}", state, run.key, *values])
    return buffer.getvalue()

"""How to read the report."""

from __future__ import annotations

from yolo_sophia.compare.statistics import ComparisonResult
from yolo_sophia.report.document import Section, Text

TEXTS = (
    "Cost to the target: optimizer steps, images or training time (without validation) up to the end of the first "
    "epoch that reaches the target. The tables show the median over seeds; a run that missed the target or crashed has "
    "infinite cost.",
    "Ratio: the median over seeds of the arm's cost divided by the reference arm's with the same seed, which shares "
    "initial weights, data order and augmentation. Below 1 is cheaper. The interval is a bootstrap over seeds.",
    "Target: unless the plan has one, the reference arm's median final mAP50-95. Half of its own runs miss it "
    "by construction, so 97 % of it is a second target.",
    "A run can exceed its own final mAP early by chance, and a long schedule is slow to pass values that a short one "
    "reaches sooner. Where horizons were run, they are the fairer score.",
    "Best mAP is chosen on the validation images themselves, so it is too high for every arm.",
)


def sections(result: ComparisonResult) -> list[Section]:
    """Definitions and cautions."""
    return [Section("reading", "How to read this", [Text(text) for text in TEXTS])]

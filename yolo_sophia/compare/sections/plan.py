"""The plan, as the file that repeats the comparison."""

from __future__ import annotations

from yolo_sophia.compare.plan import plan_yaml
from yolo_sophia.compare.statistics import ComparisonResult
from yolo_sophia.report.document import Code, Section


def sections(result: ComparisonResult) -> list[Section]:
    """The plan as YAML."""
    label = "Saved as plan.yaml: yolo-sophia compare plan=plan.yaml"
    return [Section("plan", "Plan", [Code(plan_yaml(result.plan), label)])]

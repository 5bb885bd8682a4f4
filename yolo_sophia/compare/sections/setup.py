"""Versions, hardware, date and commit."""

from __future__ import annotations

from yolo_sophia.compare.sections.verdict import BATCH_NORM
from yolo_sophia.compare.statistics import ComparisonResult
from yolo_sophia.report.document import Block, Section, Text
from yolo_sophia.report.formatting import duration
from yolo_sophia.report.provenance import facts_table


def sections(result: ComparisonResult) -> list[Section]:
    """Facts recorded by the runs and about this machine."""
    plan, blocks = result.plan, []
    receipts = [record.result.receipt for record in result.records if record.result.receipt is not None]
    versions: dict[str, list[str]] = {}
    for receipt in receipts:
        for name, version in {**(receipt.get("versions") or {}), "device": receipt.get("device")}.items():
            if version and str(version) not in versions.setdefault(name, []):
                versions[name].append(str(version))
    workers = str(plan.workers or "one per device, else 1")
    facts = {"runs side by side": workers if plan.engine == "local" else "as the Ray cluster has room"}
    if receipts:
        total = sum(float(receipt.get("wall_seconds") or 0) for receipt in receipts)
        facts["wall time of all finished runs"] = duration(total)
    blocks: list[Block] = []
    if mixed := [name for name, found in versions.items() if len(found) > 1]:
        blocks.append(Text(f"Not the same in all runs: {', '.join(mixed)}.", "warning"))
    blocks.append(facts_table({name: ", ".join(found) for name, found in versions.items()}, facts))
    if (plan.workers or 1) > 1:
        text = "Runs side by side compete for the machine: times, and ratios of times, are less exact than steps."
        blocks.append(Text(text, "note"))
    return [Section("setup", "Versions and hardware", [*blocks, Text(BATCH_NORM[plan.bn_recalibrate])])]

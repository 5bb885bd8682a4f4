"""Where and when a report was made."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from yolo_sophia.report.document import Table
from yolo_sophia.runs import environment


def facts_table(versions: Mapping[str, str] | None = None, others: Mapping[str, str] | None = None) -> Table:
    """Date, commits, versions, this machine's hardware and other facts, in this order."""
    facts = {"report written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")}
    facts |= {f"commit of {name}": commit for name, commit in environment.commits().items()}
    facts |= versions or {}
    facts |= {f"this machine's {name}": value for name, value in environment.hardware().items()}
    facts |= others or {}
    return Table("Versions, hardware and date", ["fact", "value"], list(map(list, facts.items())), numbers=False)

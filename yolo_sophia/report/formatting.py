"""Numbers as text: counts, durations, sizes, ratios, means and settings."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from yolo_sophia.report.document import Cell

DASH, TIMES, INFINITY, PLUS_MINUS = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}", "\N{INFINITY}", "\N{PLUS-MINUS SIGN}"


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def enumerated(names: list[str]) -> str:
    """Names as an English list."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with a fixed number of decimals; a dash for None."""
    return DASH if value is None else f"{value:.{digits}f}"


def ratio_number(value: float) -> str:
    """A ratio to two decimals."""
    return INFINITY if math.isinf(value) else f"{value:.2f}"


def mean_cell(value: float | None, half: float | None) -> Cell:
    """A mean with half the width of its interval; None for the latter stands for a single run."""
    if value is None:
        return DASH
    return f"{value:.3f}", "1 run" if half is None else f"{PLUS_MINUS} {half:.3f}"


def duration(seconds: float | None, longest: float | None = None) -> str:
    """Seconds in a suitable unit, or in the unit that suits `longest`."""
    if seconds is None:
        return DASH
    for unit, length in (("h", 3600), ("min", 60)):
        if (longest or seconds) >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def size(number: int | None) -> str:
    """Bytes in a suitable unit."""
    if number is None:
        return DASH
    return f"{number / 2**30:.2f} GiB" if number >= 2**29 else f"{number / 2**20:.0f} MiB"


def scalar(value: Any) -> str:
    """A setting as text: a float in full precision, and 3.0 as 3."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV; None is an empty cell."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()

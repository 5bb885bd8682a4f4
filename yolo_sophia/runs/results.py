"""What a comparison's folders hold, read into values for scoring and reporting; nothing is written here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_sophia.runs.run import Run
from yolo_sophia.runs.scheduler import folder_of
from yolo_sophia.runs.worker import FAILURE, RECEIPT, read_curve

MAP50_95, MAP50 = "metrics/mAP50-95(B)", "metrics/mAP50(B)"


@dataclass(frozen=True)
class RunResult:
    """One run as it stands on disk.

    Attributes:
        run: The run.
        rows: One mapping per finished epoch: epoch, steps, images, seconds (training only, cumulative) and every column
            of results.csv; None stands for a value that was not finite.
        receipt: Of a finished run: wall_seconds, peak_memory_bytes, args (as recorded), versions, device.
        failure: Last lines of the log of a failed run.
    """

    run: Run
    rows: tuple[dict[str, Any], ...]
    receipt: dict[str, Any] | None
    failure: str | None

    @property
    def ended(self) -> bool:
        """Whether the run finished or failed."""
        return self.receipt is not None or self.failure is not None


def load(out: Path, runs: Iterable[Run]) -> list[RunResult]:
    """Read the folders of these runs."""
    results = []
    for run in runs:
        folder = folder_of(out, run)
        receipt, failure = folder / RECEIPT, folder / FAILURE
        results.append(
            RunResult(
                run,
                tuple(read_curve(folder)),
                json.loads(receipt.read_text(encoding="utf-8")) if receipt.is_file() else None,
                failure.read_text(encoding="utf-8") if failure.is_file() and not receipt.is_file() else None,
            )
        )
    return results

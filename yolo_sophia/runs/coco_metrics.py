"""COCO metrics of a comparison's finished runs, each measured once and kept in its folder.

The final weights (last.pt) are scored, because a comparison is of the final mAP; best.pt was chosen on the images that
it would be scored on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from yolo_sophia.atomic import atomic_write
from yolo_sophia.runs.coco import Image, evaluate, evaluator, from_file, from_labels
from yolo_sophia.runs.results import RunResult
from yolo_sophia.runs.scheduler import folder_of
from yolo_sophia.runs.worker import TRAINING

RECORD, WEIGHTS = "coco.json", "last.pt"


def coco_metrics(
    out: Path,
    results: Iterable[RunResult],
    *,
    annotations: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, float]]:
    """COCO metrics by run key, of every finished run that has its final weights; those of absent sizes are left out.

    Args:
        out: Folder of the comparison.
        results: Its runs as they stand.
        annotations: COCO annotations file of the validation images; by default COCO's own where the images are COCO's
            and the file lies where Ultralytics expects it, and the YOLO labels elsewhere.
        tell: Called with a line on each run that is measured, or that cannot be.

    Raises:
        ModuleNotFoundError: No evaluator is installed.
        ValueError: The runs are not of detection with all classes, or annotations and images do not fit.
    """
    asked = None if annotations is None else str(Path(annotations).resolve())
    found = {}
    for result in results:
        if result.receipt is None:
            continue
        folder = folder_of(out, result.run)
        weights = folder / TRAINING / "weights" / WEIGHTS
        record = _read(folder / RECORD)
        if record is None or record["asked"] != asked:
            if not weights.is_file():
                tell(f"{result.run.key}: no COCO metrics, {weights} is not there (save=False?)")
                continue
            tell(f"{result.run.key}: COCO metrics of {WEIGHTS}")
            record = {"asked": asked, **_measure(weights, result, annotations)}
            atomic_write(folder / RECORD, json.dumps(record, indent=1))
        found[result.run.key] = {name: value for name, value in record["metrics"].items() if value is not None}
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if {"asked", "metrics"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _measure(weights: Path, result: RunResult, annotations: Path | None) -> dict[str, Any]:
    from yolo_sophia.integration.predictions import predict

    package, *_ = evaluator()  # says what to install before any work is done
    with tempfile.TemporaryDirectory() as folder:  # COCO's predictions take some 200 MB
        made = predict(weights, result.run.data, Path(folder), result.run.arguments)
        images = [Image(*image) for image in made.images]
        if annotations := annotations or made.annotations:
            truth = from_file(annotations, images, made.names, made.categories)
        else:
            truth = from_labels(images, made.names, made.categories)
        metrics = evaluate(truth, made.path or [])
    return {
        "metrics": metrics,
        "weights": WEIGHTS,
        "annotations": str(annotations) if annotations else "YOLO labels",
        "images": len(images),
        "boxes": len(truth["annotations"]),
        "evaluator": package,
        "ultralytics": dict(made.own),
    }

"""Predictions of trained weights on validation images, saved by Ultralytics' own validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIKE_TRAINING = ("imgsz", "conf", "iou", "max_det", "agnostic_nms", "device", "workers")
"""Arguments of a training that its validations follow as well, and its predictions with them."""


@dataclass(frozen=True)
class Predictions:
    """What a validation saved, and what is needed to score it.

    Attributes:
        path: predictions.json; None where there was no prediction.
        images: Path, height and width in pixels, and boxes of every validated image, which are those that Ultralytics
            could read. A box has its class, and center x, center y, width and height as fractions of the image.
        names: Class names by class number.
        categories: Category id in predictions.json by class number: COCO's own for COCO's validation images.
        annotations: COCO's own annotations of these images, where they are COCO's and the file is there.
        own: Ultralytics' own mAP50-95 and mAP50 of the same predictions.
    """

    path: Path | None
    images: tuple[tuple[Path, int, int, list[tuple[int, float, float, float, float]]], ...]
    names: tuple[str, ...]
    categories: tuple[int, ...]
    annotations: Path | None
    own: Mapping[str, float]


def predict(weights: Path, data: str, folder: Path, arguments: Mapping[str, Any]) -> Predictions:
    """Validate weights on the val split and save the predictions.

    Args:
        weights: Checkpoint of a detection model.
        data: Data YAML.
        folder: Folder to write into.
        arguments: Arguments of the training; those of `LIKE_TRAINING` are used.

    Raises:
        ValueError: The task is not detection, classes were merged or left out, or the data is LVIS.
    """
    from ultralytics import YOLO

    for key in ("single_cls", "classes"):
        if arguments.get(key):
            raise ValueError(f"COCO metrics score the classes as labelled; found {key}={arguments[key]!r}.")
    model = YOLO(str(weights))
    if model.task != "detect":
        raise ValueError(f"COCO metrics here are those of detection; {weights} is a model of task {model.task!r}.")
    made: list[Any] = []
    sizes: dict[str, tuple[int, int]] = {}

    class Saving(model.task_map["detect"]["validator"]):
        """Ultralytics' validator without its own COCO evaluation, which would install packages and replace the mAP."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            made.append(self)

        def update_metrics(self, preds: Any, batch: dict[str, Any]) -> None:
            """Note what was validated, in the size that predictions are scaled back to."""
            sizes.update(zip(batch["im_file"], batch["ori_shape"]))
            super().update_metrics(preds, batch)

        def eval_json(self, stats: dict[str, Any]) -> dict[str, Any]:
            """Leave the statistics as they are."""
            return stats

    like = {key: arguments[key] for key in LIKE_TRAINING if arguments.get(key) is not None}
    batch = arguments.get("batch")  # Ultralytics validates with twice that: images of a batch are padded to one shape
    is_count = isinstance(batch, int) and not isinstance(batch, bool) and batch > 0
    like |= {"data": data, "split": "val", "batch": 2 * batch if is_count else 32}
    place = {"project": str(folder.resolve()), "name": "val", "exist_ok": True}
    metrics = model.val(Saving, **like, **place, save_json=True, plots=False, verbose=False)
    (validator,) = made
    if validator.is_lvis:
        raise ValueError(f"data={data}: LVIS labels part of each image's objects and has metrics of its own.")
    path = validator.save_dir / "predictions.json"
    annotations = Path(validator.data.get("path") or "", "annotations", "instances_val2017.json")
    is_coco = validator.is_coco and validator.data.get("path") and annotations.is_file()
    boxes = {label["im_file"]: _boxes(label) for label in validator.dataloader.dataset.labels}
    names = validator.names.values() if isinstance(validator.names, dict) else validator.names
    return Predictions(
        path=path if path.is_file() else None,
        images=tuple((Path(file), int(h), int(w), boxes[file]) for file, (h, w) in sizes.items()),
        names=tuple(map(str, names)),
        categories=tuple(map(int, validator.class_map)),
        annotations=annotations if is_coco else None,
        own={"mAP50-95": float(metrics.box.map), "mAP50": float(metrics.box.map50)},
    )


def _boxes(label: Mapping[str, Any]) -> list[tuple[int, float, float, float, float]]:
    return [(int(number), *map(float, box)) for number, box in zip(label["cls"].reshape(-1), label["bboxes"])]

"""COCO metrics of saved predictions: AP over IoU .50:.95, AP50, AP75, AP by size, and AR with 100 detections.

Sizes are COCO's: small under 32 x 32 pixels of the original image, large from 96 x 96. From YOLO labels the area is the
box's; COCO's own annotations have the area of the outline, so APs, APm and APl of the two do not compare.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

METRICS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR100": 8}
"""Our names, and their places in the evaluators' list."""


class Image(NamedTuple):
    """An image with its labels.

    Attributes:
        path: The image's file; it need not be there.
        height: Pixels.
        width: Pixels.
        boxes: Class, and center x, center y, width and height as fractions of the image.
    """

    path: Path
    height: int
    width: int
    boxes: Sequence[tuple[int, float, float, float, float]] = ()


def image_id(path: Path) -> int | str:
    """The id that Ultralytics gives an image in its predictions: the name without suffix, as a number if it is one."""
    return int(path.stem) if path.stem.isnumeric() else path.stem


def from_labels(
    images: Sequence[Image], names: Sequence[str], categories: Sequence[int] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """COCO annotations from the images' own labels.

    Args:
        images: The images to evaluate on.
        names: Class names by class number.
        categories: Category id by class number, as the predictions have them; 1, 2, 3... by default.

    Returns:
        COCO's `images`, `annotations` and `categories`, with image ids as `image_id` gives them.

    Raises:
        ValueError: Two images have the same id.
    """
    made = _without_boxes(images, names, categories)
    ids, boxes = [category["id"] for category in made["categories"]], made["annotations"]
    for image in images:
        for number, x, y, width, height in image.boxes:
            width, height = width * image.width, height * image.height
            corner = (x * image.width - width / 2, y * image.height - height / 2)
            boxes.append(_box(len(boxes) + 1, image_id(image.path), ids[number], [*corner, width, height]))
    return made


def from_file(
    path: Path, images: Sequence[Image], names: Sequence[str], categories: Sequence[int] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Read COCO annotations of these images, with ids of images and categories as the predictions have them.

    Images are found by file name and categories by class name, whatever ids the file gives them.

    Args:
        path: COCO annotations file.
        images: The images to evaluate on; others in the file are left out.
        names: As in `from_labels`.
        categories: As in `from_labels`.

    Raises:
        ValueError: The file is no COCO annotations file, or lacks an image, or has boxes of an unknown class.
    """
    made = _without_boxes(images, names, categories)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {Path(entry["file_name"]).stem: entry["id"] for entry in content["images"]}
        titles = {entry["id"]: entry["name"] for entry in content["categories"]}
        annotations = content["annotations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no COCO annotations file: {type(error).__name__} {error}") from None
    if lacking := [image.path.name for image in images if image.path.stem not in known]:
        raise ValueError(f"{path} lacks {len(lacking)} of {len(images)} images, {lacking[0]} among them.")
    images_by_id = {known[image.path.stem]: image_id(image.path) for image in images}
    categories_by_name = {category["name"]: category["id"] for category in made["categories"]}
    for number, box in enumerate((a for a in annotations if a["image_id"] in images_by_id), 1):
        if (name := titles.get(box["category_id"])) not in categories_by_name:
            raise ValueError(f"{path} has boxes of {name!r}, which is not a class of the model: {list(names)}.")
        converted = _box(number, images_by_id[box["image_id"]], categories_by_name[name], box["bbox"])
        made["annotations"].append(converted | {key: box[key] for key in ("area", "iscrowd") if key in box})
    return made


def _without_boxes(
    images: Sequence[Image], names: Sequence[str], categories: Sequence[int] | None
) -> dict[str, list[dict[str, Any]]]:
    """Annotations of these images that have no boxes yet; two images with one id are refused."""
    seen: dict[int | str, Path] = {}
    for image in images:
        if (other := seen.setdefault(image_id(image.path), image.path)) is not image.path:
            raise ValueError(
                f"{other} and {image.path} have the same id {image_id(image.path)!r} in Ultralytics' predictions, "
                "which leave folder and suffix out. Rename one of them."
            )
    entries = [{"id": image_id(i.path), "file_name": i.path.name, "height": i.height, "width": i.width} for i in images]
    numbers = categories or range(1, len(names) + 1)
    return {
        "images": entries,
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in zip(numbers, names)],
    }


def _box(number: int, image: int | str, category: int, bbox: Sequence[float]) -> dict[str, Any]:
    """A box for the evaluators; its number is not 0, which they take for "no match"."""
    left, top, width, height = bbox
    entry = {"id": number, "image_id": image, "category_id": category}
    return {**entry, "bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}


def evaluate(
    annotations: Mapping[str, Sequence[Mapping[str, Any]]], predictions: Path | Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """Score predictions.

    Args:
        annotations: As `from_labels` and `from_file` return them; every image of theirs counts, predicted or not.
        predictions: Mappings with image_id, category_id, bbox (left, top, width, height in pixels) and score, or the
            JSON file that holds them.

    Returns:
        `METRICS`, as fractions; None where no annotated box is of that size.

    Raises:
        ModuleNotFoundError: No evaluator is installed; the message says which to install.
        ValueError: A prediction is of an image or a category that the annotations lack, or has no box.
    """
    _, make_index, make_evaluation = evaluator()
    if isinstance(predictions, (str, Path)):
        predictions = json.loads(Path(predictions).read_text(encoding="utf-8"))
    # Numbers for names: an evaluator may sort ids, which a mixture of 7 and "cat" is not for.
    numbers = {image["id"]: number for number, image in enumerate(annotations["images"], 1)}
    common = {
        "info": {},
        "images": [{**image, "id": numbers[image["id"]]} for image in annotations["images"]],
        "categories": [dict(category) for category in annotations["categories"]],
    }
    truth = [{**box, "image_id": numbers[box["image_id"]]} for box in annotations["annotations"]]
    found = _detections(predictions, numbers, {category["id"] for category in annotations["categories"]})
    with redirect_stdout(io.StringIO()):
        evaluation = make_evaluation(
            _index(make_index, {**common, "annotations": truth}), _index(make_index, {**common, "annotations": found})
        )
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            step()
    values = {name: float(evaluation.stats[place]) for name, place in METRICS.items()}
    return {name: value if math.isfinite(value) and value >= 0 else None for name, value in values.items()}


def _detections(predictions: Sequence[Mapping[str, Any]], numbers: Mapping, categories: set) -> list[dict[str, Any]]:
    for kind, known in (("image_id", numbers), ("category_id", categories)):
        if unknown := Counter(p[kind] for p in predictions if p[kind] not in known):
            value, _ = unknown.most_common(1)[0]
            raise ValueError(
                f"{unknown.total()} of {len(predictions)} predictions have {kind}s that the annotations lack, such as "
                f"{value!r}; expected {', '.join(map(repr, list(known)[:3]))}...: of another data set?"
            )
    found = []
    for number, prediction in enumerate(predictions, 1):
        if len(prediction.get("bbox", ())) != 4:
            raise ValueError(f"found the prediction {dict(prediction)}, expected a bbox of 4 numbers: detection only.")
        box = _box(number, numbers[prediction["image_id"]], prediction["category_id"], prediction["bbox"])
        found.append({**box, "score": prediction["score"]})
    return found


def _index(make: Callable[[], Any], dataset: dict[str, Any]) -> Any:
    index = make()
    index.dataset = dataset
    index.createIndex()
    return index


def evaluator() -> tuple[str, Callable[[], Any], Callable[[Any, Any], Any]]:
    """Name of the evaluator's package, and what makes its index of a data set and its evaluation of boxes.

    Raises:
        ModuleNotFoundError: None is installed; the message says which to install.
    """
    with suppress(ImportError):
        from faster_coco_eval import COCO, COCOeval_faster

        silent = {"print_function": lambda *_: None}
        return "faster-coco-eval", partial(COCO, **silent), partial(COCOeval_faster, iouType="bbox", **silent)
    with suppress(ImportError):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return "pycocotools", COCO, partial(COCOeval, iouType="bbox")
    raise ModuleNotFoundError(
        'COCO metrics need faster-coco-eval or pycocotools; neither is installed: pip install "yolo-sophia[compare]"'
    )

"""What the label files of a data set hold, as the installed Ultralytics reads them; nothing is written beside them."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

MOST = 10_000
"""Label files that are read; of more, a sample."""

TASKS = ("detect", "segment", "pose", "obb")
"""Tasks with label files in YOLO's format."""


@dataclass(frozen=True)
class LabelCounts:
    """Objects and files of one split.

    Attributes:
        images: Images of the split.
        read: Images whose labels were read.
        boxes: Objects by class index, in the files that were read.
        backgrounds: Images without an object: the label file is missing or empty.
        corrupt: Label files that Ultralytics drops with their images, or cannot train with, each with its reason.
    """

    images: int
    read: int
    boxes: Counter[int] = field(default_factory=Counter)
    backgrounds: int = 0
    corrupt: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """Images for each one that was read."""
        return self.images / self.read if self.read else 1.0


@lru_cache(maxsize=8)
def count_labels(files: tuple[str, ...], task: str, names: int, points: tuple[int, ...], single: bool) -> LabelCounts:
    """Read the labels of images.

    Ultralytics' own check decides what a valid label file is. It is given a stand-in image: images are not opened, and
    one that is damaged is not found.

    Args:
        files: Paths of the images.
        task: One of `TASKS`, or "classify": the name of an image's folder is its class.
        names: Number of classes.
        points: Number of keypoints and of values for each, for "pose".
        single: Whether all classes are one, `single_cls=True`.
    """
    chosen = files if len(files) <= MOST else random.Random(0).sample(files, MOST)
    if task == "classify":
        folders = sorted({Path(file).parent.name for file in files})
        found = Counter(folders.index(Path(file).parent.name) for file in chosen)
        return LabelCounts(len(files), len(chosen), found)
    boxes: Counter[int] = Counter()
    backgrounds, corrupt = 0, []
    for labels, missing, empty, problem in _verified(chosen, task, names, points, single):
        if labels is None:
            corrupt.append(problem)
            continue
        if len(labels) and not single and labels[:, 0].max() >= names:  # 8.3 lets one class too many pass
            corrupt.append(f"{problem}class {labels[:, 0].max():.0f}, the data has classes 0 to {names - 1}")
            continue
        backgrounds += bool(missing or empty)
        boxes.update(map(int, labels[:, 0]))
    if single:
        boxes = Counter({0: sum(boxes.values())})
    return LabelCounts(len(files), len(chosen), boxes, backgrounds, tuple(corrupt))


def _verified(
    files: Sequence[str], task: str, names: int, points: tuple[int, ...], single: bool
) -> Iterator[tuple[Any, int, int, str]]:
    """Labels, missing, empty and the problem of each image's label file."""
    import cv2
    import numpy as np
    from ultralytics.data.utils import img2label_paths, verify_image_label

    kind = (task == "pose", names, *(points or (0, 0)), single)
    with tempfile.TemporaryDirectory() as folder:
        image = str(Path(folder) / "image.png")
        cv2.imwrite(image, np.zeros((16, 16, 3), np.uint8))
        for label in img2label_paths(list(files)):
            found = verify_image_label((image, label, "", *kind[: _inputs() - 3]))
            reason = str(found[9]).rpartition("ignoring corrupt image/label: ")[2]
            yield found[1], found[5], found[7], f"{label}: {reason}"


@lru_cache(maxsize=1)
def _inputs() -> int:
    """Values that `verify_image_label` unpacks from its argument: `single_cls` is the last one in newer versions."""
    from ultralytics.data.utils import verify_image_label

    return 8 if "single_cls" in verify_image_label.__code__.co_varnames else 7

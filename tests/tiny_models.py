"""One tiny model, batch and data set for every task: real heads and losses on a backbone of four convolutions."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from torch import Generator, nn
from ultralytics.nn import tasks
from ultralytics.utils import DEFAULT_CFG_DICT

CLASSES, KEYPOINTS, OBJECTS = 3, 4, 3
MODELS = {  # task and head: class of the model, name of the head, its arguments
    "detect": ("DetectionModel", "Detect", ["nc"]),
    "segment": ("SegmentationModel", "Segment", ["nc", 4, 8]),
    "pose": ("PoseModel", "Pose", ["nc", [KEYPOINTS, 3]]),
    "obb": ("OBBModel", "OBB", ["nc", 1]),
    "classify": ("ClassificationModel", "Classify", ["nc"]),
}
GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5, "pose": 12.0, "kobj": 2.0, "angle": 1.3, "rle": 0.7}


def build(task: str, two_heads: bool = False, seed: int = 0) -> nn.Module:
    """A model in train mode with its criterion, of the default dtype.

    Args:
        task: Key of `MODELS`.
        two_heads: The head and loss of YOLO26: one bin, two heads.
        seed: Of the weights.
    """
    kind, head, arguments = MODELS[task]
    head += "26" * (two_heads and task != "detect")
    layout: dict[str, Any] = {"nc": CLASSES, "backbone": [[-1, 1, "Conv", [8, 3, 2]]] * 4}
    layout |= {"reg_max": 1, "end2end": True} if two_heads else {}
    layout |= {"kpt_shape": [KEYPOINTS, 3]} if task == "pose" else {}
    layout["head"] = [[-1 if task == "classify" else [2, 3], 1, head, list(arguments)]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(tasks, kind)(copy.deepcopy(layout), verbose=False)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    if task != "classify":
        model.args = SimpleNamespace(**DEFAULT_CFG_DICT | GAINS)
    return with_criterion(model.to(torch.get_default_dtype()).train())


def with_criterion(model: nn.Module) -> nn.Module:
    """The model with its criterion, as after the first batch."""
    model.criterion = model.init_criterion()
    return model


def batch_of(task: str, images: int = 2, size: int = 48, seed: int = 0) -> dict[str, Any]:
    """A batch as the data loader gives it, after preprocessing, with `OBJECTS` objects on every image."""
    g = Generator().manual_seed(seed)
    n = images * OBJECTS
    if task == "classify":
        return {"img": torch.rand(images, 3, size, size, generator=g), "cls": torch.arange(images) % CLASSES}
    centre, extent = 0.3 + 0.4 * torch.rand(n, 2, generator=g), 0.25 + 0.3 * torch.rand(n, 2, generator=g)
    angle = torch.rand(n, 1, generator=g)[:, : task == "obb"]
    points = centre[:, None] + 0.1 * torch.randn(n, KEYPOINTS, 2, generator=g)
    visible = (torch.rand(n, KEYPOINTS, 1, generator=g) > 0.3).to(points.dtype)
    side = size // 4
    return {
        "img": torch.rand(images, 3, size, size, generator=g),
        "batch_idx": torch.arange(images).repeat_interleave(OBJECTS).to(centre.dtype),
        "cls": torch.randint(CLASSES, (n, 1), generator=g).to(centre.dtype),
        "bboxes": torch.cat([centre, extent, angle], 1),
        "keypoints": torch.cat([points, visible], -1),
        "masks": torch.randint(OBJECTS + 1, (images, side, side), generator=g).to(centre.dtype),
        "sem_masks": torch.randint(CLASSES, (images, side, side), generator=g),
        "resized_shape": [(size, size)] * images,  # 8.4.0 takes the image's size from here
    }


def write_data(detection: Path, task: str, folder: Path) -> Path:
    """The data of a task made from a detection set, for what `data=` takes.

    Args:
        detection: data.yaml of the set, its images and labels in the layout of Ultralytics.
        task: segment (a box's corners as polygon), pose (points on the box), obb (its corners), classify, or depth (the
            brightness).
        folder: Folder to write into.
    """
    source = Path(yaml.safe_load(detection.read_text())["path"])
    for split in ("train", "val"):
        for i, image in enumerate(sorted((source / "images" / split).iterdir())):
            if task == "classify":
                target = folder / split / f"c{i % CLASSES}" / image.name
            else:
                target = folder / "images" / split / image.name
                if task == "depth":
                    (folder / "depth" / split).mkdir(parents=True, exist_ok=True)
                    millimetres = cv2.imread(str(image), cv2.IMREAD_GRAYSCALE).astype(np.uint16) * 20 + 500
                    cv2.imwrite(str(folder / "depth" / split / f"{image.stem}.png"), millimetres)
                label = folder / "labels" / split / f"{image.stem}.txt"
                label.parent.mkdir(parents=True, exist_ok=True)
                rows = np.loadtxt(source / "labels" / split / label.name, ndmin=2)
                label.write_text("\n".join(" ".join(f"{v:g}" for v in row) for row in _rows(rows, task)))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, target)
    if task == "classify":
        return folder
    content = {"path": str(folder), "train": "images/train", "val": "images/val", "names": dict(enumerate("abcdef"))}
    content |= {"kpt_shape": [KEYPOINTS, 3]} if task == "pose" else {}
    content |= {"names": {0: "depth"}} if task == "depth" else {}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def _rows(boxes: np.ndarray, task: str) -> np.ndarray:
    """Label rows of a task from rows of class, centre and size."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2
    points = boxes[:, None, 1:3] + corners * boxes[:, None, 3:5]
    if task == "pose":
        visible = np.broadcast_to([[[2], [2], [2], [0]]], (len(boxes), KEYPOINTS, 1))
        return np.concatenate([boxes, np.concatenate([points, visible], 2).reshape(len(boxes), -1)], 1)
    return np.concatenate([boxes[:, :1], points.clip(0, 1).reshape(len(boxes), -1)], 1)

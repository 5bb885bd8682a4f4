"""A generated detection data set: six kinds of flat shapes on cluttered backgrounds, drawn with OpenCV, offline.

Examples, tests and tuning runs use it without a download: `configs/data/shapes.yaml` calls `generate` when Ultralytics
needs the images for the first time.

- An image depends only on (seed, split, index), so splits of different lengths share their common images.
- A box encloses the whole outline of its object, including parts that a later object hides.
- At least `MIN_VISIBLE` of every object's pixels are visible, and no two boxes overlap by more than `MAX_IOU`.

A folder with `shapes.json` is complete: the data set is written into a folder beside it, which is renamed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

NAMES = ("circle", "square", "triangle", "star", "ring", "cross")
FORMAT = 1  # raise it whenever the same arguments draw other pixels, so that an old folder is not taken for a new one
SPEC_FILE = "shapes.json"
MIN_SIDE = 10.0  # px, longer side of the smallest box; smaller stars and circles look the same
MIN_OBJECTS, MAX_OBJECTS = 2, 8
MIN_VISIBLE, MAX_IOU = 0.5, 0.4


def _polygon(*radii: float) -> np.ndarray:
    """The vertices (n, 2) that lie at the given radii, at equal angles around the origin."""
    angles = np.arange(len(radii)) * (2 * np.pi / len(radii))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.asarray(radii)[:, None]


_ROUND, _ARM = _polygon(*[1.0] * 64), [(1.0, -0.3), (1.0, 0.3), (0.3, 0.3)]
# Contours of each class; the first one is the outer one, and OpenCV's even-odd filling makes the second one a hole.
_OUTLINES = (
    [_ROUND],
    [_polygon(*[1.0] * 4)],
    [_polygon(*[1.0] * 3)],
    [_polygon(*[1.0, 0.42] * 5)],
    [_ROUND, 0.58 * _ROUND],
    [np.concatenate([np.asarray(_ARM) @ np.array([[c, s], [-s, c]]) for c, s in [(1, 0), (0, 1), (-1, 0), (0, -1)]])],
)


@dataclass(frozen=True)
class Shape:
    """One drawn object.

    Attributes:
        kind: Class index into `NAMES`.
        contours: Vertex arrays (n, 2) in px; pixel (row 0, column 0) covers [0, 1] x [0, 1].
        box: Left, top, right and bottom of the full outline, in px.
    """

    kind: int
    contours: list[np.ndarray]
    box: np.ndarray

    def draw(self, image: np.ndarray, color: tuple[int, ...], line: int = cv2.LINE_AA) -> None:
        """Fill the outline on `image` (height, width[, 3], uint8) in place."""
        # OpenCV puts integer coordinates at pixel centres, hence -0.5; `shift=4` reads them in 1/16 px.
        points = [np.rint((contour - 0.5) * 16).astype(np.int32) for contour in self.contours]
        cv2.fillPoly(image, points, color, line, shift=4)


def _place(rng: np.random.Generator, size: int) -> Shape:
    """A random shape that lies inside the image; its box's longer side is log-uniform up to half the image."""
    kind = int(rng.integers(len(NAMES)))
    side = MIN_SIDE * (size / 2 / MIN_SIDE) ** rng.random()
    angle, stretch = 2 * np.pi * rng.random(), rng.uniform(0.85, 1.0)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    contours = [contour * (1.0, stretch) @ turn for contour in _OUTLINES[kind]]
    low, high = contours[0].min(axis=0), contours[0].max(axis=0)
    scale = side / (high - low).max()
    extent = (high - low) * scale
    corner = 1 + rng.random(2) * (size - 2 - extent)  # 1 px of margin keeps the smoothed edge inside the image
    return Shape(kind, [(contour - low) * scale + corner for contour in contours], np.append(corner, corner + extent))


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    """The intersection over union of two left-top-right-bottom boxes."""
    shared = float(np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)))
    return shared / float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


def _arrange(rng: np.random.Generator, size: int) -> list[Shape]:
    """Shapes in drawing order that keep to `MIN_VISIBLE` and `MAX_IOU`."""
    count = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    shapes: list[Shape] = []
    visible: list[np.ndarray] = []  # one boolean mask (size, size) per shape
    areas: list[int] = []
    for _ in range(50 * count):  # 2 to 8 shapes fit after a few tries each; the bound only excludes an endless loop
        shape, mask = _place(rng, size), np.zeros((size, size), np.uint8)
        shape.draw(mask, (1,), cv2.LINE_8)
        left = [seen & (mask == 0) for seen in visible]
        if any(seen.sum() < MIN_VISIBLE * area for seen, area in zip(left, areas, strict=True)):
            continue
        if any(_iou(shape.box, other.box) > MAX_IOU for other in shapes):
            continue
        shapes.append(shape)
        visible = [*left, mask > 0]
        areas.append(int(mask.sum()))
        if len(shapes) == count:
            break
    return shapes


def _color(rng: np.random.Generator, saturation: tuple[int, int], value: tuple[int, int]) -> tuple[int, ...]:
    """A BGR colour of any hue, with saturation and value from the given ranges (0-255)."""
    hsv = np.array([[[rng.integers(180), rng.integers(*saturation), rng.integers(*value)]]], np.uint8)
    return tuple(int(c) for c in cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0])


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A muted gradient with soft blotches and clutter lines, (size, size, 3) uint8 BGR."""
    ends = np.array([_color(rng, (20, 120), (30, 190)) for _ in range(2)], np.float64)
    angle, ramp = 2 * np.pi * rng.random(), np.linspace(-0.5, 0.5, size)
    mix = np.clip(0.5 + np.cos(angle) * ramp[:, None] + np.sin(angle) * ramp, 0, 1)[..., None]
    coarse = rng.integers(0, 50, (int(rng.integers(4, 13)),) * 2 + (3,), dtype=np.uint8)
    blotches = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR_EXACT)  # same bits on every processor
    image = np.clip(ends[0] * (1 - mix) + ends[1] * mix + blotches - 25.0, 0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(3, 9))):
        start, end = (tuple(int(v) for v in rng.integers(0, size, 2)) for _ in range(2))
        cv2.line(image, start, end, _color(rng, (0, 140), (20, 230)), int(rng.integers(1, 3)), cv2.LINE_AA)
    return image


def _contrast(pixels: np.ndarray, color: tuple[int, ...]) -> float:
    """How far `color` is from the fifth of the `pixels` (height, width, 3) that come closest to it."""
    return float(np.quantile(np.abs(pixels - np.int16(color)).sum(axis=2), 0.2))


def _render(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[Shape]]:
    """One image (size, size, 3) uint8 BGR and its shapes in drawing order."""
    image, shapes = _background(rng, size), _arrange(rng, size)
    for shape in shapes:
        left, top, right, bottom = shape.box.astype(int)
        behind = image[top : bottom + 1, left : right + 1].astype(np.int16)
        colors = [_color(rng, (90, 256), (110, 256)) for _ in range(4)]
        shape.draw(image, max(colors, key=partial(_contrast, behind)))
    noise = rng.integers(-14, 15, image.shape, dtype=np.int16)
    return np.clip(image + noise, 0, 255).astype(np.uint8), shapes


def _write(folder: Path, split: int, name: str, count: int, size: int, seed: int) -> None:
    """Write `count` images with their label files into the new folders of one split."""
    images, labels = folder / "images" / name, folder / "labels" / name
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for index in range(count):
        image, shapes = _render(np.random.default_rng([seed, split, index]), size)
        if not cv2.imwrite(str(images / f"{index:05d}.png"), image):
            raise OSError(f"OpenCV could not write {images / f'{index:05d}.png'}; is the disk full or write-protected?")
        rows = [(s.kind, *((s.box[:2] + s.box[2:]) / 2 / size), *((s.box[2:] - s.box[:2]) / size)) for s in shapes]
        text = "".join("{} {:.6f} {:.6f} {:.6f} {:.6f}\n".format(*row) for row in rows)
        (labels / f"{index:05d}.txt").write_text(text, encoding="ascii", newline="\n")


def _is_complete(root: Path, spec: dict[str, object]) -> bool:
    """Whether `root` holds the data set of `spec`; False if it is empty or missing, an error for other content."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    remedy = "Delete that folder or pass another root."
    try:
        found = json.loads((root / SPEC_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{root} is no finished shapes set: expected a readable {SPEC_FILE} in it. {remedy}") from None
    if found != spec:
        raise ValueError(f"{root} holds another shapes set: found {found}, expected {spec}. {remedy}")
    for name in ("train", "val"):
        for kind, suffix in (("images", "png"), ("labels", "txt")):
            count = sum(1 for _ in (root / kind / name).glob(f"*.{suffix}"))
            if count != spec[name]:
                where = root / kind / name
                raise ValueError(f"{where} was changed: found {count} .{suffix} files, expected {spec[name]}. {remedy}")
    return True


def generate(root: str | Path, *, train: int = 320, val: int = 96, size: int = 160, seed: int = 0) -> Path:
    """Write the data set in YOLO format below `root`, or do nothing where it already is.

    The layout is `images/{train,val}/00000.png`, `labels/{train,val}/00000.txt` and `shapes.json` with the arguments.
    The same arguments give the same bytes, as long as OpenCV and NumPy stay the same.

    Args:
        root: Folder of the data set; missing parents are created.
        train: Number of training images, at least 1.
        val: Number of validation images, at least 1.
        size: Height and width of every image in px, at least 64.
        seed: Non-negative seed of all random choices.

    Returns:
        The absolute path of `root`.

    Raises:
        ValueError: If an argument is not an integer or too small, or if `root` holds anything but this data set.
    """
    arguments = {"train": train, "val": val, "size": size, "seed": seed}
    for (key, value), least in zip(arguments.items(), (1, 1, 64, 0), strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{key}={value!r}: expected an integer of at least {least}")
    root = Path(root).expanduser().resolve()
    spec = {"format": FORMAT, **arguments, "names": list(NAMES)}
    if _is_complete(root, spec):
        return root
    draft = root.with_name(f".{root.name}.{uuid.uuid4().hex[:8]}.partial")  # a sibling: same file system as the root
    try:
        _write(draft, 0, "train", train, size, seed)
        _write(draft, 1, "val", val, size, seed)
        (draft / SPEC_FILE).write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8", newline="\n")
        try:
            with contextlib.suppress(OSError):
                root.rmdir()  # Windows does not replace even an empty folder
            os.replace(draft, root)
        except OSError:
            # Another process (a second rank, a second run) may have finished first.
            if not _is_complete(root, spec):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # renamed after a success
    return root

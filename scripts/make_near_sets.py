"""Make detection data sets near COCO under new class names, from a data set with COCO's images and names.

A pretrained model knows these images and objects, but Ultralytics matches class rows by name, so here it copies none,
or one. Where learning rates follow from class names alone, these sets show it.

    coco_vehicles   car, bus, truck, motorcycle and bicycle, each under a new name
    coco_people     person as "pedestrian"
    coco_plus       person under its own name and the 19 next most frequent classes under new ones

A set has the images with at least one box of its classes.

Usage: python scripts/make_near_sets.py SOURCE_FOLDER OUT_FOLDER
SOURCE_FOLDER has data.yaml and {images,labels}/{train,val}, as Ultralytics lays a data set out.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import yaml

VEHICLES = {"car": "automobile", "bus": "coach", "truck": "lorry", "motorcycle": "motorbike", "bicycle": "pushbike"}
SPLITS = ("train", "val")


def boxes(path: Path) -> list[tuple[int, str]]:
    """Class index and the rest of each line of a label file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [(int(line.split()[0]), line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def most_frequent(source: Path, names: dict[int, str], count: int) -> list[str]:
    """The classes with the most boxes in the training images, in falling order."""
    found = Counter(index for path in (source / "labels/train").glob("*.txt") for index, _ in boxes(path))
    return [names[index] for index, _ in found.most_common(count)]


def make(source: Path, out: Path, names: dict[int, str], new_names: dict[str, str]) -> None:
    """Write a data set with some of the classes.

    Args:
        source: Folder of the source.
        out: Folder to write; must not exist.
        names: Class names of the source by index.
        new_names: Class names of the result by those of the source, in the order of the result.
    """
    by_name = {name: index for index, name in enumerate(new_names)}
    new_index = {index: by_name[name] for index, name in names.items() if name in by_name}
    for split in SPLITS:
        for kind in ("images", "labels"):
            (out / kind / split).mkdir(parents=True)
        for image in sorted((source / "images" / split).iterdir()):
            kept = [
                (new_index[i], box)
                for i, box in boxes(source / "labels" / split / f"{image.stem}.txt")
                if i in new_index
            ]
            if kept:
                shutil.copyfile(image, out / "images" / split / image.name)
                text = "".join(f"{index} {box}\n" for index, box in kept)
                (out / "labels" / split / f"{image.stem}.txt").write_text(text)
    content = {"train": "images/train", "val": "images/val", "names": dict(enumerate(new_names.values()))}
    (out / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def main(source: Path, out: Path) -> None:
    """Write the three sets into a folder."""
    listed = yaml.safe_load((source / "data.yaml").read_text())["names"]
    names = dict(enumerate(listed)) if isinstance(listed, list) else listed
    others = [name for name in most_frequent(source, names, 20) if name != "person"][:19]
    sets = {
        "coco_vehicles": VEHICLES,
        "coco_people": {"person": "pedestrian"},
        "coco_plus": {"person": "person", **{name: f"my {name}" for name in others}},
    }
    for name, new_names in sets.items():
        make(source, out / name, names, new_names)
        counts = [len(list((out / name / "images" / split).iterdir())) for split in SPLITS]
        print(f"{name}: {counts[0]} training and {counts[1]} validation images, {len(new_names)} classes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))

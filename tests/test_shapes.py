"""The generated data set: same bytes twice, true and tight labels, never half a folder, and the YAML that asks for it.

What is measured on pixels is measured on files that `generate` wrote, read back with OpenCV.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolo_sophia import cli, shapes

CONFIG = Path(__file__).parents[1] / "configs" / "data" / "shapes.yaml"
SMALL = {"train": 4, "val": 3, "size": 96, "seed": 5}


def digest(root: Path) -> dict[str, str]:
    """Map every file below `root` to the hash of its bytes."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples(root: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each image with its label rows (n, 5): class, then centre, width and height as fractions."""
    for path in sorted(root.glob("images/*/*.png")):
        yield cv2.imread(str(path)), np.loadtxt(root / "labels" / path.parent.name / f"{path.stem}.txt", ndmin=2)


def corners(row: np.ndarray, size: int) -> np.ndarray:
    """Return left, top, right, bottom in px of one label row."""
    return np.concatenate([row[1:3] - row[3:] / 2, row[1:3] + row[3:] / 2]) * size


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.generate(tmp_path_factory.mktemp("shapes") / "parent" / "set", train=40, val=4)


def test_same_arguments_give_the_same_bytes(tmp_path):
    first, second = (digest(shapes.generate(tmp_path / name, **SMALL)) for name in "ab")
    assert first == second
    assert len(first) == 2 * (SMALL["train"] + SMALL["val"]) + 1


def test_every_image_is_its_own(tmp_path):
    first = digest(shapes.generate(tmp_path / "a", **SMALL))
    assert len(set(first.values())) == len(first)  # no two images alike, within or across the splits
    other = digest(shapes.generate(tmp_path / "b", **{**SMALL, "seed": 6}))
    assert not set(first.values()) & set(other.values())


def test_a_longer_split_keeps_its_beginning(tmp_path):
    short = digest(shapes.generate(tmp_path / "a", **SMALL))
    long = digest(shapes.generate(tmp_path / "b", **{**SMALL, "train": 6}))
    del short[shapes.SPEC_FILE]
    assert short.items() <= long.items()


def test_layout(root):
    assert root.is_absolute()
    assert {path.name for path in root.iterdir()} == {"images", "labels", "shapes.json"}
    assert [path.name for path in root.parent.iterdir()] == ["set"]  # the temporary sibling is gone
    for split, count in (("train", 40), ("val", 4)):
        images = {path.stem for path in root.glob(f"images/{split}/*.png")}
        assert images == {path.stem for path in root.glob(f"labels/{split}/*.txt")}
        assert len(images) == count


def test_labels_are_valid_and_varied(root):
    rows = [row for image, rows in samples(root) for row in rows]
    kinds, boxes = np.array(rows)[:, 0], np.array([corners(row, 160) for row in rows])
    assert set(kinds) == set(range(len(shapes.NAMES)))
    assert boxes.min() >= 0 and boxes.max() <= 160
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert sides.min() >= shapes.MIN_SIDE - 0.01 and sides.max() <= 80.01
    assert np.mean(sides < 20) > 0.1 and np.mean(sides > 50) > 0.1
    for image, labels in samples(root):
        assert image.shape == (160, 160, 3)
        assert shapes.MIN_OBJECTS <= len(labels) <= shapes.MAX_OBJECTS
        assert image.reshape(-1, 3).std(axis=0).min() > 5  # nothing is flat


def test_boxes_enclose_the_colour_and_are_tight(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_background", lambda rng, size: np.zeros((size, size, 3), np.uint8))
    for image, rows in samples(shapes.generate(tmp_path / "set", train=20, val=1)):
        ink = image.max(axis=2) > 60  # above the noise (14), below every shape colour (110)
        inside = np.zeros_like(ink)
        for row in rows:
            left, top, right, bottom = corners(row, 160)
            box = np.s_[int(np.floor(top)) : int(np.ceil(bottom)), int(np.floor(left)) : int(np.ceil(right))]
            inside[box] = True
            ys, xs = np.nonzero(ink[box])
            height, width = ink[box].shape  # ink comes within 2 px of all four edges (pointed tips fade out)
            assert max(ys.min(), xs.min(), height - 1 - ys.max(), width - 1 - xs.max()) <= 2
        grown = cv2.dilate(inside.astype(np.uint8), np.ones((3, 3), np.uint8))  # the smoothed edge spills 1 px at most
        assert not (ink & (grown == 0)).any()


@pytest.mark.parametrize("kind", range(len(shapes.NAMES)), ids=shapes.NAMES)
def test_outlines_have_the_form_of_their_name(kind):
    contours = shapes._OUTLINES[kind]
    corner_count = {"circle": 64, "square": 4, "triangle": 3, "star": 10, "ring": 64, "cross": 12}
    assert len(contours[0]) == corner_count[shapes.NAMES[kind]]
    canvas = np.zeros((100, 100), np.uint8)
    shapes.Shape(kind, [40 * contour + 50 for contour in contours], np.zeros(4)).draw(canvas, (255,))
    assert canvas[50, 50] == (0 if shapes.NAMES[kind] == "ring" else 255)


def test_drawing_puts_pixel_zero_between_zero_and_one():
    canvas = np.zeros((60, 60), np.uint8)
    shapes.Shape(0, [20 * shapes._ROUND + (30.0, 25.5)], np.zeros(4)).draw(canvas, (255,))
    centre = (np.argwhere(canvas > 0) + 0.5).T @ canvas[canvas > 0] / canvas.sum()
    np.testing.assert_allclose(centre, (25.5, 30.0), atol=0.1)  # row (y) first


def test_overlaps_exist_and_are_bounded():
    overlaps = []
    for index in range(60):
        scene = shapes._arrange(np.random.default_rng(index), 160)
        owner = np.full((160, 160), 255, np.uint8)
        for number, shape in enumerate(scene):
            shape.draw(owner, (number,), cv2.LINE_8)
            overlaps += [shapes._iou(shape.box, other.box) for other in scene[:number]]
        for number, shape in enumerate(scene):
            alone = np.zeros((160, 160), np.uint8)
            shape.draw(alone, (1,), cv2.LINE_8)
            assert (owner == number).sum() >= shapes.MIN_VISIBLE * alone.sum()
    assert max(overlaps) <= shapes.MAX_IOU
    assert np.mean(np.array(overlaps) > 0.05) > 0.05


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [((0, 0, 2, 2), (0, 0, 2, 2), 1.0), ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3), ((0, 0, 1, 1), (2, 2, 3, 3), 0.0)],
)
def test_iou(a, b, expected):
    assert shapes._iou(np.array(a, float), np.array(b, float)) == pytest.approx(expected)


def test_a_finished_set_is_left_alone(tmp_path, monkeypatch):
    root = shapes.generate(tmp_path / "set", **SMALL)
    (root / "labels" / "train.cache").write_text("Ultralytics writes this")
    before = digest(root)
    monkeypatch.setattr(shapes, "_render", None)  # drawing again would fail
    assert shapes.generate(str(root), **SMALL) == root
    assert digest(root) == before


@pytest.mark.parametrize("change", [{"seed": 6}, {"size": 128}, {"train": 5}, {"val": 2}, {"format": 0}])
def test_another_spec_is_refused(tmp_path, monkeypatch, change):
    root = shapes.generate(tmp_path / "set", **SMALL)
    before = digest(root)
    monkeypatch.setattr(shapes, "FORMAT", change.pop("format", shapes.FORMAT))
    with pytest.raises(ValueError, match=r"(?s)found \{.*'seed': 5.*expected \{.*Delete that folder"):
        shapes.generate(root, **{**SMALL, **change})
    assert digest(root) == before


def test_a_foreign_or_damaged_folder_is_refused(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"no finished shapes set: expected a readable shapes\.json"):
        shapes.generate(foreign, **SMALL)
    assert (foreign / "thesis.txt").read_text() == "precious"
    root = shapes.generate(tmp_path / "set", **SMALL)
    (root / "labels" / "val" / "00001.txt").unlink()
    with pytest.raises(ValueError, match=r"was changed: found 2 \.txt files, expected 3"):
        shapes.generate(root, **SMALL)


def test_an_empty_folder_is_filled(tmp_path):
    assert shapes.generate(tmp_path, **SMALL) == tmp_path.resolve()
    assert json.loads((tmp_path / "shapes.json").read_text())["train"] == SMALL["train"]


def test_a_killed_generation_is_not_taken_for_a_finished_one(tmp_path):
    script = f"""
import os
from yolo_sophia import cli, shapes
render, calls = shapes._render, []
def die(*args):
    calls.append(1)
    return render(*args) if len(calls) < 6 else os._exit(9)  # no clean-up runs, as after SIGKILL
shapes._render = die
shapes.generate({str(tmp_path / "set")!r}, **{SMALL!r})
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(shapes.__file__).parents[1])
    assert killed.returncode == 9
    assert not (tmp_path / "set").exists()
    root = shapes.generate(tmp_path / "set", **SMALL)
    assert digest(root) == digest(shapes.generate(tmp_path / "again", **SMALL))


def test_an_interrupted_generation_cleans_up(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "_render", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shapes.generate(tmp_path / "set", **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rival", [SMALL, {**SMALL, "seed": 6}], ids=["same", "other"])
def test_a_rival_that_finishes_first(tmp_path, monkeypatch, rival):
    write = shapes._write

    def finish_first(*args):
        monkeypatch.setattr(shapes, "_write", write)
        shapes.generate(tmp_path / "set", **rival)
        write(*args)

    monkeypatch.setattr(shapes, "_write", finish_first)
    if rival is SMALL:
        shapes.generate(tmp_path / "set", **SMALL)
    else:
        with pytest.raises(ValueError, match="holds another shapes set"):
            shapes.generate(tmp_path / "set", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert json.loads((tmp_path / "set" / "shapes.json").read_text())["seed"] == rival["seed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": 0}, "train=0: expected an integer of at least 1"),
        ({"val": -1}, "val=-1: expected an integer of at least 1"),
        ({"size": 63}, "size=63: expected an integer of at least 64"),
        ({"size": 160.0}, "size=160.0: expected an integer"),
        ({"seed": -1}, "seed=-1: expected an integer of at least 0"),
        ({"train": True}, "train=True: expected an integer"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        shapes.generate(tmp_path / "set", **change)
    assert not list(tmp_path.iterdir())


def test_module_needs_neither_torch_nor_ultralytics():
    # Imported without its package: this is about shapes.py alone, whatever the package's __init__ imports.
    script = f"""
import sys
sys.path.append({str(Path(shapes.__file__).parent)!r})
import shapes
sys.exit(", ".join({{"torch", "ultralytics"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_ultralytics_generates_it_from_the_yaml(tmp_path, monkeypatch):
    from ultralytics.data import utils

    monkeypatch.setattr(utils, "DATASETS_DIR", tmp_path / "datasets")
    monkeypatch.setattr(utils, "check_font", lambda *args: None)  # it would fetch a font from the network
    monkeypatch.chdir(tmp_path)  # a relative path that exists in the working folder would win over DATASETS_DIR
    data = utils.check_det_dataset(str(CONFIG))
    root = (tmp_path / "datasets" / "yolo-sophia-shapes").resolve()
    assert Path(data["path"]) == root
    assert data["names"] == dict(enumerate(shapes.NAMES))
    for split, count in (("train", 320), ("val", 96)):
        assert Path(data[split]) == root / "images" / split
        images = list(Path(data[split]).iterdir())
        assert len(images) == count
        assert all(Path(label).is_file() for label in utils.img2label_paths([str(path) for path in images]))
    monkeypatch.setattr(shapes, "generate", None)  # the second time nothing is generated
    assert utils.check_det_dataset(str(CONFIG))["path"] == data["path"]


def test_the_command_says_where_the_file_lies(capsys):
    assert cli.main(["path", "data/shapes.yaml"]) == 0
    assert Path(capsys.readouterr().out.strip()) == CONFIG
    assert cli.main(["path"]) == 0
    names = capsys.readouterr().out.split()
    assert {"data/shapes.yaml", "presets/published.yaml", "compare/coco.yaml"} <= set(names)
    for name in ("data/shape.yaml", "../pyproject.toml", "/etc/passwd", "", "presets"):
        assert cli.main(["path", name]) == 2
        error = capsys.readouterr().err
        assert "does not ship with the package" in error and ("shapes.yaml'?" in error) == (name == "data/shape.yaml")

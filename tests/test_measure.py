"""A data YAML means the same here as in Ultralytics, whose own readers are the oracle."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from ultralytics.data.base import BaseDataset
from ultralytics.data.utils import check_det_dataset

from yolo_sophia.integration.measure import count_images, read_data

pytestmark = pytest.mark.compat
NAMES = "names:\n  0: Käse\n  1: b\n"


@pytest.fixture
def root(tmp_path) -> Path:
    """Folders of images in many spellings; empty files, which are never opened."""
    names = (
        "images/train/0.png", "images/train/1.JPG", "images/train/deep/2.jpeg", "images/train/3.txt",
        "images/train/.4.png", "images/train/5", "images/train/.deep/6.png", "images/val/7.png", "other [1]/8.bmp",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    for number in range(3):
        (outside / f"{number}.webp").touch()
    (tmp_path / "images/train/linked").symlink_to(outside, target_is_directory=True)
    (tmp_path / "link").symlink_to(tmp_path / "images", target_is_directory=True)
    (tmp_path / "list.txt").write_text(f"./images/val/7.png\n{outside}/0.webp\n\n./images/train/1.JPG\n./3.txt\n")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf./images/val/7.png\n")
    return tmp_path


def theirs(data: Path) -> int:
    """Training images as Ultralytics finds them."""
    train = check_det_dataset(str(data), autodownload=False)["train"]
    stand_in = SimpleNamespace(prefix="", fraction=1.0)
    return len(BaseDataset.get_img_files(stand_in, train))


@pytest.mark.parametrize(
    "text",
    [
        "path: {root}\ntrain: images/train\nval: images/val\n",
        "train: images/train\nval: images/val\n",
        "path: {root}\ntrain: [images/train, images/val]\nval: images/val\n",
        "path: {root}\ntrain: link/train\nval: images/val\n",
        "path: {root}\ntrain: images/train/linked\nval: images/val\n",
        "path: {root}\ntrain: list.txt\nval: images/val\n",
        "path: {root}\ntrain: [list.txt, bom.txt, images/val]\nval: images/val\n",
        "path: {root}/images\ntrain: ../images/train\nval: val\n",
        "path: {root}/images/val\ntrain: ../../images/train\nval: ../val\n",
        "path: {root}/images\ntrain: ../train\nval: ../val\n",
        "path: {root}\ntrain: {root}/images/train\nval: images/val\n",
        "# a comment\n---\ntrain: ./images/train\nval: images/val\nextra: 2024-01-01\n",
    ],
)
def test_images_are_those_of_ultralytics(text, root):
    path = root / "data.yaml"
    path.write_text(text.replace("{root}", str(root)) + NAMES, encoding="utf-8")
    assert count_images(str(path)) == count_images(path) == theirs(path) > 0


def test_a_folder_with_brackets_in_its_name(root):
    """Ultralytics 8.3 takes the brackets for a pattern, and finds nothing."""
    path = root / "data.yaml"
    path.write_text(f"path: {root}\ntrain: other [1]\nval: images/val\n{NAMES}", encoding="utf-8")
    assert count_images(path) == 1


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("cp1252"),
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode().replace(b"train:", b"\x01train:\x7f"),
        lambda text: text.encode().replace(b"\n", b"\r\n"),
        lambda text: text.encode().replace(b"train: ", b"train: \t"),
    ],
    ids=["cp1252", "bom", "utf-16", "control characters", "crlf", "tab"],
)
def test_encodings_are_those_of_ultralytics(encode, root):
    path = root / "data.yaml"
    path.write_bytes(encode(f"path: {root}\ntrain: images/train\nval: images/val\n{NAMES}"))
    try:
        theirs(path)
    except Exception:  # Ultralytics 8.3 does not read tabs
        with pytest.raises(ValueError, match="no data YAML"):
            read_data(path)
        return
    found, content = read_data(path)
    assert found == path and count_images(path) == theirs(path)
    expected = check_det_dataset(str(path), autodownload=False)["names"]
    assert list(content["names"].values()) == list(expected.values())


def test_data_without_a_file_of_its_own(root, monkeypatch):
    data = root / "set.yaml"
    data.write_text(f"path: {root}\ntrain: images/train\nval: images/val\n{NAMES}", encoding="utf-8")
    monkeypatch.chdir(root)
    assert count_images("set") == count_images("set.yaml") == count_images(root) == theirs(data)
    for name in ("cats/0.png", "cats/1.png", "dogs/2.jpg"):
        (root / "classes/train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "classes/train" / name).touch()
    assert count_images(root / "classes") == 3 and read_data(root / "classes")[1]["names"] == ["cats", "dogs"]
    assert count_images("https://example.com/set.zip") == count_images("set.zip") == 0


def test_images_that_are_not_there_yet_are_unknown(root):
    path = root / "data.yaml"
    path.write_text(f"path: {root}\ntrain: [images/train, gone]\nval: images/val\n{NAMES}", encoding="utf-8")
    assert count_images(path) == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path: 2024\ntrain: images\n", "path=2024, expected a path"),
        ("train:\n", "train is empty, expected a path or a list of paths"),
        ("train: 3\n", "train=3, expected a path or a list of paths"),
        ("train: [images, 3]\n", "expected a path or a list of paths"),
        ("val: images\n", "KeyError 'train'"),
        ("- train\n", "no data YAML"),
        ("train: [", "no data YAML"),
    ],
)
def test_what_names_no_images_is_refused(text, says, tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no data YAML with a train entry: ") as error:
        count_images(path)
    assert says in str(error.value) and str(path) in str(error.value)


def test_relative_paths_are_those_of_the_version(root, monkeypatch):
    """Relative to the working folder where they exist there; else, and always in Ultralytics 8.3, to `datasets_dir`."""
    import ultralytics.data.utils as utils

    monkeypatch.setattr(utils, "DATASETS_DIR", root)
    (root / "here").mkdir()
    monkeypatch.chdir(root / "here")
    path = root / "here" / "data.yaml"
    path.write_text(f"path: images\ntrain: train\nval: val\n{NAMES}", encoding="utf-8")
    assert count_images(os.path.relpath(path)) == theirs(path) > 0

"""The preset that fits a run: by what it starts from and by its optimizer steps, as Ultralytics counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ultralytics import YOLO
from ultralytics.cfg import get_cfg

from yolo_sophia.integration.choice import SHORT, choose_preset, has_weights, optimizer_steps
from yolo_sophia.integration.measure import count_images
from yolo_sophia.presets import preset_names

pytestmark = pytest.mark.compat


@pytest.fixture
def images(tmp_path) -> Path:
    """data.yaml of 50 training images, empty files."""
    (tmp_path / "images").mkdir()
    for i in range(50):
        (tmp_path / f"images/{i}.png").touch()
    path = tmp_path / "data.yaml"
    path.write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: [a]\n")
    return path


def arguments(**given) -> dict:
    return {**vars(get_cfg()), "model": "yolov8n.yaml", **{k: str(v) if k == "data" else v for k, v in given.items()}}


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"epochs": 10, "batch": 16, "nbs": 16}, 40),  # the last batch is short
        ({"epochs": 10, "batch": 16, "nbs": 64}, 10),
        ({"epochs": 10, "batch": 32, "nbs": 16}, 20),
        ({"epochs": 10, "batch": -1}, 10),
        ({"epochs": 10, "batch": 10, "nbs": 10, "fraction": 0.5}, 30),  # 25 images
        ({"epochs": 10, "batch": 10, "nbs": 10, "fraction": 20}, 20),
        ({"epochs": 10, "batch": 10, "nbs": 10, "fraction": [0.2, 1.0, 1.0]}, 10),
        ({"epochs": 10, "time": 1.0}, None),
    ],
)
def test_steps(images, given, steps):
    assert optimizer_steps(arguments(data=images, **given)) == steps


@pytest.mark.parametrize("data", ["missing.yaml", None])
def test_steps_are_unknown_where_the_images_are(tmp_path, data):
    assert optimizer_steps(arguments(data=data)) is None
    empty = tmp_path / "empty.yaml"
    empty.write_text("path: nowhere\ntrain: images\nval: images\nnames: [a]\n")
    assert optimizer_steps(arguments(data=empty)) is None


@pytest.mark.slow
def test_the_count_is_ultralytics_own(tiny_run):
    """`iterations` as Ultralytics passes it to build_optimizer."""
    seen = []

    class Watching(YOLO("yolov8n.yaml").task_map["detect"]["trainer"]):
        def build_optimizer(self, *args, iterations, **kwargs):
            seen.append(iterations)
            return super().build_optimizer(*args, iterations=iterations, **kwargs)

    run = {**tiny_run, "epochs": 3, "batch": 6, "nbs": 4, "fraction": 0.8}
    Watching(overrides={**run, "optimizer": "SGD"}).train()
    assert seen == [optimizer_steps(arguments(**run))] == [9]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"model": "yolov8n.yaml", "pretrained": True}, False),
        ({"model": "my/yolov8n.PT"}, True),
        ({"model": "yolov8n.yaml", "pretrained": "some.pt"}, True),
        ({"model": None}, False),
    ],
)
def test_weights(given, expected):
    assert has_weights(arguments(**given)) == expected


@pytest.mark.parametrize(
    ("epochs", "model", "name"),
    [
        (SHORT // 4 - 1, "yolov8n.yaml", "detect-scratch"),
        (SHORT // 4 - 1, "yolov8n.pt", "detect-short"),
        (SHORT // 4, "yolov8n.yaml", "detect-scratch"),
        (SHORT // 4, "yolov8n.pt", "detect-finetune"),
    ],
)
def test_choice(images, epochs, model, name):
    chosen, reason = choose_preset(arguments(data=images, batch=16, nbs=16, epochs=epochs, model=model))
    assert chosen == name and name in preset_names()
    assert f"{4 * epochs} steps" in reason


def test_images_of_several_data_sets(images, tmp_path):
    """As YOLO-World and YOLOE take them; a set with another kind of labels is not counted."""
    path, sets = tmp_path / "mixed.yaml", {"yolo_data": [str(images), str(images)]}
    path.write_text(yaml.safe_dump({"train": sets, "val": sets}))
    assert count_images(str(path)) == 2 * count_images(str(images))
    path.write_text(yaml.safe_dump({"train": {**sets, "grounding_data": [{"img_path": "x"}]}, "val": sets}))
    assert count_images(str(path)) == 0


def test_a_run_of_unknown_length_counts_as_long():
    chosen, reason = choose_preset(arguments(data="missing.yaml", model="yolov8n.pt"))
    assert (chosen, reason) == ("detect-finetune", "chosen for a fine-tuning of unknown length")

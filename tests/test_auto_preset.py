"""The preset that fits a run: by what it starts from and by its optimizer steps, as Ultralytics counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from ultralytics import YOLO
from ultralytics.cfg import get_cfg

from yolo_sophia.integration.arguments import resolve
from yolo_sophia.integration.auto_lr import factor_for, rate_for
from yolo_sophia.integration.auto_preset import SHORT, choose_preset, has_weights, optimizer_steps
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
def test_auto_preset(images, epochs, model, name):
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


@pytest.fixture
def weights(tmp_path, tiny_model) -> Path:
    """A checkpoint of a model that knows cats, dogs and a person."""
    model, path = YOLO(tiny_model).model, tmp_path / "weights.pt"
    model.names = {0: "cat", 1: "dog", 2: "Person"}
    torch.save({"model": model}, path)
    return path


@pytest.mark.parametrize(
    ("names", "given", "lr", "why"),
    [
        ("[a, b, c]", {}, 0.001429, "for 3 new classes"),
        ("[a, b, c]", {"single_cls": True}, 0.002, "for 1 new class"),
        ("nothing\nnc: 80", {}, 0.000119, "for 80 new classes"),
        ("nothing", {}, 0.000714, "for an unknown number of new classes"),  # as of ten
        ("[person, helmet]", {}, 0.00012, "as the weights know 1 of 2 classes"),
        ("[person, helmet]", {"single_cls": True}, 0.00012, "as the weights know 1 of 2 classes"),
        ("[person, helmet, vest]", {}, 0.001429, "for 3 new classes"),
        (
            "{0: Dog, 1: CAT}",
            {"model": "yolov8n.yaml", "pretrained": True},
            0.00012,
            "as the weights know 2 of 2 classes",
        ),
    ],
)
def test_the_learning_rate_that_follows_from_the_classes(tmp_path, weights, names, given, lr, why):
    """Ultralytics' own rule for AdamW, round(0.002 * 5 / (4 + nc), 6), unless the weights know the classes."""
    path = tmp_path / "data.yaml"
    path.write_text(f"train: images\nval: images\nnames: {names}\n".replace("names: nothing\n", ""))
    if given.get("pretrained"):
        given = {**given, "pretrained": str(weights)}
    run = {**arguments(data=path), "model": str(weights), **given}
    assert rate_for(run) == (lr, why)
    settled = resolve({**run, "sophia": "detect-short"}, ())
    assert (settled.values["lr0"], settled.sources["lr0"]) == (lr, "preset")
    assert settled.reason == f"asked for, lr0={lr} {why}"
    again = resolve({**run, **settled.values}, ())  # as a child process does
    assert (again.values, again.sources, again.reason) == (settled.values, settled.sources, "")
    resumed = resolve({**run, **settled.values, "model": "last.pt", "pretrained": True, "resume": True}, ())
    assert (resumed.values, resumed.sources) == (settled.values, settled.sources)
    searched = resolve({**run, **settled.values, "lr0": 0.5}, ())  # by model.tune
    assert (searched.values["lr0"], searched.sources["lr0"]) == (0.5, "typed")


def test_the_classes_of_files_that_cannot_be_read_are_unknown(tmp_path):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"no checkpoint")
    unknown = (0.000714, "for an unknown number of new classes")
    assert rate_for(arguments(data="missing.yaml", model=str(damaged))) == unknown
    assert rate_for(arguments(data=None, model=None)) == unknown


@pytest.mark.parametrize(
    ("lr", "new", "factor"),
    [(0.001, True, 2.5), (0.000119, True, 21.0084), (0.000119, False, 1.0), (0.01, True, 1.0), (0.0, True, 1.0)],
)
def test_the_factor_of_a_head(lr, new, factor):
    """A new head learns at 0.0025 whatever the rest does."""
    assert factor_for(lr, new) == factor

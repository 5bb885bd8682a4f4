"""The preset that fits a run: by what it starts from and by its optimizer steps, as Ultralytics counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from ultralytics import YOLO
from ultralytics.cfg import get_cfg

from yolo_sophia.integration.auto_lr import FEWEST_STEPS, MEASURED, START, factor_for
from yolo_sophia.integration.auto_preset import FEWER_STEPS, choose_preset, optimizer_steps
from yolo_sophia.integration.explicit import MARKER
from yolo_sophia.integration.measure import count_images
from yolo_sophia.integration.resolution import Facts, resolve
from yolo_sophia.options import ALL
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
    ("from_weights", "steps", "name", "reason"),
    [
        (False, FEWER_STEPS - 1, "detect-scratch", "a training from scratch of 999 steps"),
        (True, FEWER_STEPS - 1, "detect-short", "a fine-tuning of 999 steps"),
        (False, FEWER_STEPS, "detect-scratch", "a training from scratch of 1000 steps"),
        (True, FEWER_STEPS, "detect-finetune", "a fine-tuning of 1000 steps"),
        (True, None, "detect-finetune", "a fine-tuning of unknown length"),
    ],
)
def test_auto_preset(from_weights, steps, name, reason):
    assert choose_preset(from_weights, steps) == (name, f"chosen for {reason}")
    assert name in preset_names()


def test_images_of_several_data_sets(images, tmp_path):
    """As YOLO-World and YOLOE take them; a set with another kind of labels is not counted."""
    path, sets = tmp_path / "mixed.yaml", {"yolo_data": [str(images), str(images)]}
    path.write_text(yaml.safe_dump({"train": sets, "val": sets}))
    assert count_images(str(path)) == 2 * count_images(str(images))
    path.write_text(yaml.safe_dump({"train": {**sets, "grounding_data": [{"img_path": "x"}]}, "val": sets}))
    assert count_images(str(path)) == 0


class Stop(Exception):
    """The training has decided on its settings."""


@pytest.fixture
def trained(tmp_path, tiny_model) -> Path:
    """A checkpoint of a model that has seen images and knows cats, dogs and a person."""
    model, path = YOLO(tiny_model).model, tmp_path / "weights.pt"
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 64, 64))
    model.names = {0: "cat", 1: "dog", 2: "Person"}
    torch.save({"model": model}, path)
    return path


def settings_of(make, **run) -> tuple[dict, bool]:
    """Arguments of a training when its optimizer is built, and whether its model has the weights' running means."""
    found = []

    def stop(trainer):
        found.extend([vars(trainer.args), bool(trainer.model.model[0].bn.running_mean.any())])
        raise Stop

    model = make()
    model.add_callback("on_pretrain_routine_end", stop)
    with pytest.raises(Stop):
        model.train(**run)
    return tuple(found)


FORMS = {  # how a run says what it starts from: the model, and more arguments
    "weights": lambda w, y: (lambda: YOLO(w), {}),
    "path": lambda w, y: (lambda: YOLO(Path(w)), {}),
    "yaml": lambda w, y: (lambda: YOLO(y), {}),
    "yaml and load": lambda w, y: (lambda: YOLO(y).load(w), {}),
    "yaml and pretrained": lambda w, y: (lambda: YOLO(y), {"pretrained": w}),
    "pretrained=False": lambda w, y: (lambda: YOLO(w), {"pretrained": False}),
    "reset weights": lambda w, y: (lambda: YOLO(w).reset_weights(), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_a_run_starts_from(form, trained, tiny_run, tiny_model):
    """The model decides, in whatever way its weights came; in some versions not all ways bring them."""
    make, more = FORMS[form](str(trained), tiny_model)
    run = {k: v for k, v in tiny_run.items() if k != "model"}
    args, has_weights = settings_of(make, **run, **more, optimizer="SophiaG", exist_ok=True)
    assert args["sophia"] == ("detect-short" if has_weights else "detect-scratch")
    if version() >= (8, 4):
        assert has_weights == (form not in ("yaml", "pretrained=False", "reset weights"))
    saved = yaml.safe_load((Path(args["save_dir"]) / "args.yaml").read_text())
    assert {key: saved[key] for key in (*ALL, "sophia", MARKER)} == {key: args[key] for key in (*ALL, "sophia", MARKER)}
    assert all(isinstance(factor, float) for factor in saved["lr_factors"].values())


def version() -> tuple[int, int]:
    from ultralytics import __version__

    major, minor, *_ = __version__.split(".")
    return int(major), int(minor)


@pytest.mark.parametrize(
    ("classes", "steps", "lr", "source"),
    [
        (3, FEWEST_STEPS - 1, 0.001429, "preset"),
        (1, FEWEST_STEPS - 1, 0.002, "preset"),
        (80, FEWEST_STEPS - 1, 0.000119, "preset"),
        (0, FEWEST_STEPS - 1, 0.000714, "preset"),  # as of ten
        (3, FEWEST_STEPS, START, MEASURED),
        (3, None, START, MEASURED),
    ],
)
def test_a_short_run_takes_ultralytics_learning_rate(classes, steps, lr, source):
    """Ultralytics' own rule for AdamW, round(0.002 * 5 / (4 + nc), 6); a longer run measures."""
    resolved = resolve({"optimizer": "SophiaG"}, (), Facts(True, steps, classes))
    assert (resolved.values["lr0"], resolved.sources["lr0"]) == (lr, source)
    why = "too short to measure" if source == "preset" else "lr0=0.0002 until measured"
    assert resolved.reason.endswith(why)
    typed = resolve({"optimizer": "SophiaG", "lr0": 0.003}, ("lr0",), Facts(True, steps, classes))
    assert (typed.values["lr0"], typed.sources["lr0"]) == (0.003, "explicit")


@pytest.mark.parametrize("single_cls", [False, True])
def test_a_short_run_counts_its_classes(trained, tiny_run, single_cls):
    run = {k: v for k, v in tiny_run.items() if k != "model"}
    args, _ = settings_of(lambda: YOLO(str(trained)), **run, optimizer="SophiaG", single_cls=single_cls)
    assert args["lr0"] == (0.002 if single_cls else 0.001)


@pytest.mark.parametrize(("lr", "factor"), [(0.001, 10.0), (0.000119, 84.0336), (0.02, 1.0), (0.0, 1.0)])
def test_the_factor_of_what_is_new(lr, factor):
    """It learns at 0.01 whatever the rest does."""
    assert factor_for(lr) == factor

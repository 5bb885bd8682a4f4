"""`yolo-sophia doctor`: its figures are those of Ultralytics' own trainer, and it writes and downloads nothing."""

from __future__ import annotations

import json
import math
import os
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DistributedSampler
from ultralytics import YOLO
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_sophia import cli
from yolo_sophia.integration import run_length
from yolo_sophia.integration.doctor import Fact, examine, label_counts, table
from yolo_sophia.integration.doctor.label_counts import count_labels
from yolo_sophia.integration.doctor.setting_facts import safe_rate
from yolo_sophia.integration.doctor.start_facts import near_names
from yolo_sophia.integration.measure import image_files

pytestmark = pytest.mark.compat
BOX = "{} 0.5 0.5 0.2 0.2\n"


class Stop(Exception):
    """The training has decided on its settings."""


@pytest.fixture
def make(tmp_path):
    """Write a data set: label texts of its training and validation images (None: no file); the images are empty."""

    def write(train: list, val: list, names=("a", "b", "c"), **more) -> str:
        for split, texts in {"train": train, "val": val}.items():
            for kind in ("images", "labels"):
                (tmp_path / "set" / kind / split).mkdir(parents=True, exist_ok=True)
            for number, text in enumerate(texts):
                (tmp_path / "set" / "images" / split / f"{number:05}.jpg").touch()
                if text is not None:
                    (tmp_path / "set" / "labels" / split / f"{number:05}.txt").write_text(text)
        path = tmp_path / "set" / "data.yaml"
        content = {"path": str(path.parent), "train": "images/train", "val": "images/val", "names": list(names)}
        path.write_text(yaml.safe_dump(content | more))
        return str(path)

    return write


@pytest.fixture
def weights(tmp_path, tiny_model) -> str:
    """A checkpoint of a model that has seen images and knows a cat, a dog and a traffic light."""
    layout = yaml.safe_load(Path(tiny_model).read_text())
    (tmp_path / "yolov8n-three.yaml").write_text(yaml.safe_dump({**layout, "nc": 3}))
    model, path = YOLO(tmp_path / "yolov8n-three.yaml").model, tmp_path / "weights.pt"
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 64, 64))
        for p in model.model[-1].parameters():
            p.add_(0.1)
    model.names = {0: "cat", 1: "dog", 2: "traffic light"}
    torch.save({"model": model}, path)
    return str(path)


def facts(**given) -> dict[str, Fact]:
    return {fact.name: fact for fact in examine(given)}


def trainer_class():
    return YOLO("yolov8n.yaml").task_map["detect"]["trainer"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"epochs": 3, "batch": 4, "nbs": 16, "warmup_epochs": 1.0},
        {"epochs": 2, "batch": 2, "nbs": 64, "warmup_epochs": 3.0},  # 8.4: fewer batches than nbs
        {"epochs": 4, "batch": 3, "nbs": 8, "warmup_epochs": 0.5, "fraction": 0.8},
        {"epochs": 2, "batch": 16, "nbs": 64, "warmup_epochs": 0.0},  # 8.3: no step at all
        {"epochs": 8, "batch": 1, "nbs": 4, "warmup_epochs": 3.0},  # 8.3: at least 100 batches of warm-up
        {"epochs": 1, "batch": 5, "nbs": 5, "warmup_epochs": 3.0},  # 8.4: no warm-up
    ],
)
def test_steps_and_warmup_are_those_of_a_training(tiny_run, small_model, given):
    counted = Counter()

    def is_below(trainer) -> bool:
        group = next(group for group in trainer.optimizer.param_groups if group["weight_decay"])
        return bool(group["lr"] < group["initial_lr"] * trainer.lf(trainer.epoch) * (1 - 1e-9))

    class Counting(trainer_class()):
        def optimizer_step(self):
            super().optimizer_step()
            counted.update(steps=1, warmup_steps=is_below(self))

    def end(trainer):
        counted.update(batches=1, warmup_batches=is_below(trainer))

    run = {**tiny_run, "model": str(small_model), "optimizer": "SGD", "mosaic": 0.0, **given}
    trainer = Counting(overrides=run)
    trainer.add_callback("on_train_batch_end", end)
    trainer.train()
    dataset, found = trainer.train_loader.dataset, facts(**run)
    steps, warmup = found["optimizer steps"].values, found["warm-up"].values if counted["steps"] else {}
    assert (steps["steps"], steps["batches"]) == (counted["steps"], counted["batches"])
    assert steps["accumulate"] == trainer.accumulate
    assert warmup.get("batches", 0) == counted["warmup_batches"]
    assert warmup.get("steps", 0) == counted["warmup_steps"]
    assert found["images"].values["train"] == len(dataset)
    labels = count_labels(tuple(map(str, dataset.im_files)), "detect", 6, (), False)
    classes = np.concatenate([label["cls"].flatten() for label in dataset.labels]).astype(int)
    assert labels.boxes == Counter(classes.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["auto", "SophiaG", "torch.optim.AdamW"])
def test_rate_and_class_rows_are_those_of_a_training(tiny_run, tiny_data, weights, tmp_path, optimizer):
    """Up to its first batch."""
    content = yaml.safe_load(tiny_data.read_text())
    content["names"] = dict(enumerate(["x", "y", "Dog", "z", "traffic_light", "w"]))
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(content))
    run = {**tiny_run, "model": weights, "data": str(tmp_path / "named.yaml"), "optimizer": optimizer}
    found = facts(**{k: v for k, v in run.items() if k != "val"})
    seen = []

    def stop(trainer):
        seen.append(trainer)
        raise Stop

    model = YOLO(run.pop("model"))
    model.add_callback("on_pretrain_routine_end", stop)
    with pytest.raises(Stop):
        model.train(**run)
    trainer = seen[0]
    lowest = min(group["initial_lr"] for group in trainer.optimizer.param_groups)
    rate, preset = found["learning rate"].values, found.get("preset")
    assert rate["lr0"] == pytest.approx(lowest)
    assert rate["optimizer"] in (type(trainer.optimizer).__name__, f"torch.optim.{type(trainer.optimizer).__name__}")
    assert found["rate of the biases"].values["warmup_bias_lr"] == trainer.args.warmup_bias_lr
    if preset is not None:
        assert (preset.values["preset"], preset.values["lr0"]) == (trainer.args.sophia, trainer.args.lr0)
    norm = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert found["memory of BatchNorm"].values["momentum"] == norm.momentum
    decay = trainer.ema.decay(found["optimizer steps"].values["steps"])
    assert found["memory of the EMA"].values["steps"] == pytest.approx(1 / (1 - decay))
    total = sum(p.numel() for p in trainer.model.parameters())
    assert found["model"].values["parameters"] == total


def test_class_rows(make, weights):
    label = [BOX.format(0)] * 4
    by_name = hasattr(YOLO("yolov8n.yaml").task_map["detect"]["trainer"], "set_model_names_for_load")
    rows = facts(data=make(label, label, ["u", "v", "w", "x"]), model=weights)["class rows"]
    assert rows.values["new"] == ["u", "v", "w", "x"] and not rows.look
    rows = facts(data=make(label, label, ["u", "traffic_light", "w", "Dogs"]), model=weights)["class rows"]
    assert rows.look and "traffic_light -> traffic light, Dogs -> dog" in rows.argument
    rows = facts(data=make(label, label, ["u", "v", "w"]), model=weights)["class rows"]
    assert rows.values["by_position"] == ["u", "v", "w"] and rows.look
    rows = facts(data=make(label, label, ["cat", "dog", "traffic light"]), model=weights)["class rows"]
    assert rows.values["by_name"] == ["cat", "dog", "traffic light"] and not rows.look
    if by_name:
        rows = facts(data=make(label, label, ["u", "CAT", "v", "w"]), model=weights)["class rows"]
        assert (rows.values["by_name"], rows.values["new"]) == (["CAT"], ["u", "v", "w"])


def test_near_names():
    known = ["traffic light", "cat", "bus"]
    assert near_names(["Traffic_Light", "cats", "bu", "cattle"], known) == {
        "Traffic_Light": "traffic light",
        "cats": "cat",
        "bu": "bus",
    }


def test_labels(make, tiny_model):
    """Missing, empty, damaged, polygons, a class beyond the last one."""
    polygon = "1 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2\n"
    train = [BOX.format(0) * 1 + "0 0.2 0.2 0.1 0.1\n", BOX.format(2), None, "", "0 0.5 0.5\n", BOX.format(3), polygon]
    train += [BOX.format(0), "nonsense\n", BOX.format(0) + "0 0.7 0.7 1.5 0.2\n"]
    found = facts(data=make(train, [BOX.format(0)] * 3), model=str(tiny_model))
    assert found["images"].figure == "10 training, 3 validation"
    few = found["classes with few labels"]
    assert few.values == {"few": {"b": 1, "c": 1, "a": 3}, "objects": 5, "read": 10} and few.look
    assert few.argument == "label more"
    assert found["classes not validated"].values == {"missing": ["b", "c"], "trained": ["b", "c"]}
    assert found["images without objects"].values == {"backgrounds": 2, "share": 0.2}
    assert found["images without objects"].look
    damaged = found["damaged label files"]
    assert damaged.look and damaged.values["corrupt"] == 4
    assert "00004.txt" in damaged.argument


def test_a_rare_class_can_be_left_out(make, tiny_model):
    label = "".join(f"{k} 0.{x} 0.5 0.1 0.1\n" for k in (0, 2) for x in range(1, 9))
    data = make([label] * 4 + [BOX.format(1)], [label + BOX.format(1)])
    few = facts(data=data, model=str(tiny_model))["classes with few labels"]
    assert (few.values["few"], few.argument) == ({"b": 1}, "label more, or classes=0,2")
    found = facts(data=data, model=str(tiny_model), classes=[0, 2])
    assert not found["classes with few labels"].look and not found["classes not validated"].look
    found = facts(data=data, model=str(tiny_model), single_cls=True)
    assert found["classes with few labels"].values["objects"] == 65


def test_many_labels_are_sampled(make, tiny_model, monkeypatch):
    monkeypatch.setattr(label_counts, "MOST", 10)
    count_labels.cache_clear()
    found = facts(data=make([BOX.format(0)] * 40, [BOX.format(0)]), model=str(tiny_model))
    count_labels.cache_clear()
    few = found["classes with few labels"]
    assert few.values["read"] == 10 and few.values["objects"] == 40
    assert "in a sample of 10 of 40 label files" in few.figure


def test_nothing_is_written_or_downloaded(make, weights, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    data = make([BOX.format(0)] * 4, [BOX.format(0)])
    files = sorted(tmp_path.rglob("*"))
    folders = [path for path in files if path.is_dir()]
    for folder in folders:
        os.chmod(folder, 0o555)
    try:
        for name in (weights, "yolov8n.yaml", "yolov8m.pt", "https://example.org/x.pt"):
            assert facts(data=data, model=name, optimizer="SophiaG")
    finally:
        for folder in folders:
            os.chmod(folder, 0o755)
    assert sorted(tmp_path.rglob("*")) == files


def test_without_the_model(make):
    label = [BOX.format(0)] * 16
    found = facts(data=make(label, label), model="yolov8x.pt", optimizer="SophiaG", epochs=400)
    assert found["model"].figure == "yolov8x.pt is not on this machine; nothing is downloaded" and found["model"].look
    assert found["optimizer steps"].values["steps"] and "class rows" not in found
    assert found["preset"].values == {"preset": "detect-short", "lr0": None, "source": "preset"}
    assert facts(data=make(label, label), model="yolov8x.pt")["learning rate"].values["lr0"] is None


def test_a_model_that_cannot_be_loaded(make, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    model = facts(data=make([BOX.format(0)], [BOX.format(0)]), model=str(tmp_path / "bad.pt"))["model"]
    assert model.look and "bad.pt cannot be loaded" in model.figure


@pytest.mark.parametrize("data", ["coco8.yaml", "set.ndjson", "https://example.org/set.zip"])
def test_without_the_images(tiny_model, data, monkeypatch, tmp_path):
    from ultralytics.data import utils

    monkeypatch.setattr(utils, "DATASETS_DIR", tmp_path)
    found = facts(data=data, model=str(tiny_model))
    assert found["images"].look and "nothing is downloaded" in found["images"].figure
    assert found["optimizer steps"].values["steps"] is None and "warm-up" not in found


def test_unknown_lengths(make, tiny_model, monkeypatch):
    data = make([BOX.format(0)] * 40, [BOX.format(0)])
    found = facts(data=data, model=str(tiny_model), time=1.5)["optimizer steps"]
    assert found.figure == "unknown: time=1.5 hours decide on the epochs"
    assert facts(data=data, model=str(tiny_model), batch=-1)["optimizer steps"].values["steps"]  # 16, on the processor
    monkeypatch.setattr(run_length, "uses_gpu", lambda arguments: True)
    found = facts(data=data, model=str(tiny_model), batch=-1, epochs=30)["optimizer steps"]
    assert found.figure == "unknown: about 30; AutoBatch measures the GPU for batch=-1"


def length(images: int, **given):
    return run_length.run_length({**DEFAULT_CFG_DICT, **given}, images)


@pytest.mark.parametrize(("images", "batch", "devices"), [(50, 16, 2), (51, 15, 2), (7, 64, 4), (100, 12, 3)])
def test_batches_on_several_devices(images, batch, devices):
    own = batch // devices
    sampler = DistributedSampler(range(images), num_replicas=devices, rank=0)
    for device in (",".join(map(str, range(devices))), list(range(devices))):
        assert length(images, batch=batch, device=device).batches == math.ceil(len(sampler) / min(own, images))


def test_a_batch_that_the_devices_cannot_share(make, tiny_model):
    data = make([BOX.format(0)] * 40, [BOX.format(0)])
    steps = facts(data=data, model=str(tiny_model), batch=15, device="0,1")["optimizer steps"]
    assert steps.look and steps.argument == "batch=16"


def test_few_steps(make, tiny_model):
    """What is proposed is enough."""
    given = {"data": make([BOX.format(0)] * 40, [BOX.format(0)]), "model": str(tiny_model), "batch": 8}
    for more in ({"nbs": 8, "epochs": 10}, {"nbs": 64, "epochs": 70}, {"nbs": 64, "epochs": 20}):
        steps = facts(**given, **more)["optimizer steps"]
        assert steps.look
        proposed = {key: int(value) for key, _, value in (word.partition("=") for word in steps.argument.split())}
        better = facts(**{**given, **more, **proposed})["optimizer steps"]
        assert not better.look and better.values["steps"] >= 300
    assert not facts(**given, nbs=8, epochs=60)["optimizer steps"].look


def test_a_long_warmup(make, tiny_model):
    given = {"data": make([BOX.format(0)] * 40, [BOX.format(0)]), "model": str(tiny_model), "batch": 1, "nbs": 1}
    warmup = facts(**given, epochs=20, warmup_epochs=6.0)["warm-up"]
    assert warmup.look and warmup.argument == "warmup_epochs=2"
    assert warmup.values["steps"] == 240
    assert not facts(**given, epochs=20, warmup_epochs=2.0)["warm-up"].look


def test_memory(make, tiny_model):
    given = {"data": make([BOX.format(0)] * 32, [BOX.format(0)]), "model": str(tiny_model), "epochs": 100}
    norm = facts(**given)["memory of BatchNorm"]
    assert norm.look and norm.values == {"batches": 1 / 0.03, "share": 1 / 0.03 / 200, "momentum": 0.03}
    norm = facts(**given, optimizer="SophiaG", sophia="published")["memory of BatchNorm"]
    assert norm.look and norm.argument == "bn_momentum=0.1"
    assert facts(**given, optimizer="torch.optim.AdamW", bn_momentum=0.2)["memory of BatchNorm"].values["batches"] == 5
    memory = facts(**given, nbs=16, batch=16)["memory of the EMA"].values["steps"]
    assert memory == pytest.approx(1 / (1 - 0.9999 * (1 - math.exp(-200 / 2000))))


@pytest.mark.parametrize(
    ("given", "images", "argument"),
    [
        ({"optimizer": "AdamW"}, 200, "lr0=0.001429"),
        ({"optimizer": "AdamW", "lr0": 0.001}, 200, ""),
        ({"optimizer": "SGD", "lr0": 0.02}, 25, ""),
        ({"optimizer": "torch.optim.AdamW", "lr0": 0.01}, 200, "lr0=0.001429"),
        ({"optimizer": "AdamW", "lr0": 0.002}, 25, "lr0=0.00045"),
        ({"optimizer": "AdamW", "lr0": 0.001}, 25, ""),
        ({"optimizer": "auto", "single_cls": True}, 25, "optimizer=AdamW lr0=0.00045 warmup_bias_lr=0"),
        ({"optimizer": "auto", "single_cls": True}, 150, ""),
        (
            {"optimizer": "auto", "single_cls": True, "lr_factors": {"backbone": 0.1}},
            25,
            "optimizer=AdamW lr0=0.00045 warmup_bias_lr=0",
        ),
        ({"optimizer": "SophiaG", "lr0": 0.02}, 200, "no lr0, the preset has one"),
        ({"optimizer": "SophiaG"}, 200, ""),
    ],
)
def test_rates_that_are_known_to_be_too_high(make, tiny_model, given, images, argument):
    names = ["a"] if given.get("single_cls") else ["a", "b", "c"]
    data = make([BOX.format(0)] * images, [BOX.format(0)], names)
    rate = facts(data=data, model=str(tiny_model), **given)["learning rate"]
    assert (rate.look, rate.argument) == (bool(argument), argument)


def test_safe_rate_on_the_measured_sets():
    assert safe_rate(500) == 0.002
    assert 0.001 < 2.5 * safe_rate(25) < 0.002


@pytest.mark.parametrize(
    ("given", "ignored"),
    [
        ({"lr0": 0.02, "momentum": 0.8, "warmup_bias_lr": 0.1}, {"lr0", "momentum", "warmup_bias_lr"}),
        ({"optimizer": "AdamW", "lr0": 0.001, "momentum": 0.8}, set()),
        ({"optimizer": "AdamW", "warmup_momentum": 0.5}, {"warmup_momentum"}),
        ({"optimizer": "SGD", "warmup_momentum": 0.5}, set()),
        ({"optimizer": "SGD", "warmup_momentum": 0.5, "warmup_epochs": 0.0}, {"warmup_momentum"}),
        ({"optimizer": "SGD", "time": 1.0, "epochs": 7}, {"epochs"}),
        ({"dropout": 0.1, "mask_ratio": 2, "kobj": 2.0}, {"dropout", "mask_ratio", "kobj"}),
        ({"optimizer": "SophiaG", "lr0": 0.001, "rho": 0.1}, set()),
    ],
)
def test_arguments_without_effect(make, tiny_model, given, ignored):
    data = make([BOX.format(0)] * 40, [BOX.format(0)])
    found = facts(data=data, model=str(tiny_model), **given)["arguments without effect"]
    assert set(found.values["ignored"]) == ignored and found.look == bool(ignored)


def test_rate_of_the_biases(make, tiny_model):
    given = {"data": make([BOX.format(0)] * 40, [BOX.format(0)]), "model": str(tiny_model)}
    rate = facts(**given, optimizer="AdamW", lr0=0.001)["rate of the biases"]
    assert rate.look and rate.argument == "warmup_bias_lr=0"
    assert not facts(**given, optimizer="AdamW", lr0=0.001, warmup_bias_lr=0.0)["rate of the biases"].look
    assert "rate of the biases" not in facts(**given, optimizer="SGD")


@pytest.mark.parametrize("task", ["classify", "segment", "pose", "obb"])
def test_other_tasks(make, tmp_path, task):
    model = {"classify": "yolov8n-cls.yaml", "segment": "yolov8n-seg.yaml"}.get(task, f"yolov8n-{task}.yaml")
    if task == "classify":
        for name, number in {"train/a": 12, "train/b": 3, "val/a": 2}.items():
            (tmp_path / "images" / name).mkdir(parents=True)
            for k in range(number):
                (tmp_path / f"images/{name}/{k}.png").touch()
        found = facts(data=str(tmp_path / "images"), model=model)
        assert found["images"].figure == "15 training, 2 validation"
        assert found["classes with few labels"].values["few"] == {"b": 3}
        assert found["classes with few labels"].figure == "1 with fewer than 10 images: b 3"
        assert found["classes not validated"].values["missing"] == ["b"]
        return
    label = {"pose": "0 0.5 0.5 0.2 0.2 0.5 0.5 2 0.4 0.4 1\n"}.get(task, "0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2\n")
    more = {"kpt_shape": [2, 3]} if task == "pose" else {}
    found = facts(data=make([label] * 12, [label], ["a"], **more), model=model)
    assert found["model"].values["task"] == task and not found["model"].look
    assert found["classes with few labels"].values["objects"] == 12
    assert not found["damaged label files"].look


def test_files_are_those_of_a_fraction(make):
    data = make([BOX.format(0)] * 10, [BOX.format(0)])
    assert [Path(file).name for file in image_files(data)] == [f"{k:05}.jpg" for k in range(10)]
    assert run_length.images_used(10, 0.25) == 2 and run_length.images_used(10, 0.01) == 1
    assert run_length.images_used(10, 4) == 4 and run_length.images_used(10, 40) == 10
    assert run_length.images_used(10, [0.5, 0.3], "val") == 3 and run_length.images_used(10, 0.5, "val") == 10


def test_table():
    lines = table([Fact("a", "1 of 2"), Fact("longer", "x", True, "nbs=16")]).splitlines()
    assert lines == ["ok    a       1 of 2", "look  longer  x       nbs=16"]


def test_command(make, tiny_model, capsys, tmp_path):
    data = make([BOX.format(0)] * 40, [BOX.format(0)])
    words = ["doctor", f"data={data}", f"model={tiny_model}"]
    assert cli.main([*words, "--strict"]) == 1
    assert "look  optimizer steps" in capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    found = {fact["fact"]: fact for fact in report["facts"]}
    assert report["data"] == data and found["images"]["values"]["train"] == 40
    (tmp_path / "run.yaml").write_text("epochs: 7\nbatch: 8\n")
    assert cli.main([*words, f"cfg={tmp_path / 'run.yaml'}", "epochs=9", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    steps = next(fact for fact in report["facts"] if fact["fact"] == "optimizer steps")
    assert steps["values"]["batches"] == 5 * 9
    (tmp_path / "other.yaml").write_text(Path(data).read_text())
    assert cli.main(["doctor", f"data={data},{tmp_path / 'other.yaml'}", f"model={tiny_model}"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith(".yaml")] == [
        data,
        str(tmp_path / "other.yaml"),
    ]
    assert cli.main(["doctor"]) == 0


def test_strict_passes_where_all_is_in_order(make, weights, capsys):
    label = "".join(f"{k} 0.{x} 0.5 0.1 0.1\n" for k in range(3) for x in range(1, 9))
    data = make([label] * 40, [label], ["cat", "dog", "traffic light"])
    words = [f"data={data}", f"model={weights}", "epochs=400", "batch=4", "nbs=4"]
    assert cli.main(["doctor", *words, "optimizer=SophiaG", "--strict"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=m.yaml"], "found no data: add data=..."),
        (["data=nowhere.yaml", "model=m.yaml"], "no data YAML"),
        (["data=d.yaml", "model=m.yaml", "epoch=3"], "'epoch' is not a known argument. Did you mean 'epochs'?"),
        (["data=d.yaml", "model=m.yaml", "epochs=abc"], "epochs"),
        (["data=d.yaml", "model=m.yaml", "rho=0.1"], "are arguments of optimizer=SophiaG"),
        (["data=d.yaml", "model=m.yaml", "optimizer=AdamX"], "is not an optimizer"),
        (["data=d.yaml", "model=m.yaml", "resume=True"], "takes its arguments from its checkpoint"),
        (["data"], "expected key=value"),
    ],
)
def test_errors_are_those_of_a_training(words, message, capsys):
    assert cli.main(["doctor", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("yolo-sophia: ") and message in error

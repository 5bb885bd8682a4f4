"""Short trainings with SophiaG: every task and model family, and Ultralytics' settings that change what a step sees."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_models import write_data
from ultralytics import YOLO
from ultralytics.engine import trainer as engine
from ultralytics.engine.model import Model
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, ROOT
from ultralytics.utils import loss as losses
from ultralytics.utils.patches import torch_load

pytestmark = [pytest.mark.slow, pytest.mark.compat]

MODELS = ROOT / "cfg" / "models"
FAMILIES = {
    "v8 segment": "v8/yolov8-seg.yaml",
    "v8 pose": "v8/yolov8-pose.yaml",
    "v8 obb": "v8/yolov8-obb.yaml",
    "v8 classify": "v8/yolov8-cls.yaml",
    "11 detect": "11/yolo11.yaml",
    "12 detect": "12/yolo12.yaml",
    "26 segment": "26/yolo26-seg.yaml",
    "26 pose": "26/yolo26-pose.yaml",
    "26 obb": "26/yolo26-obb.yaml",
}
BASE = {"imgsz": 64, "epochs": 1, "batch": 4, "nbs": 4, "device": "cpu", "plots": False, "val": False, "workers": 0}
STEPS = 4  # per epoch: 16 images in batches of 4


def needs(path: str) -> pytest.MarkDecorator:
    return pytest.mark.requires((MODELS / path).is_file(), reason=f"this Ultralytics has no {path}")


@pytest.fixture(scope="module")
def data(tiny_data, tmp_path_factory) -> Callable[[str], str]:
    """What `data=` takes for a task."""
    made = {"detect": tiny_data}

    def of(task: str) -> str:
        if task not in made:
            made[task] = write_data(tiny_data, task, tmp_path_factory.mktemp("tasks") / task)
        return str(made[task])

    return of


def tiny(path: Path, folder: Path) -> Path:
    """A model's YAML with its smallest scale made as narrow as its layers allow."""
    content = yaml.safe_load(path.read_text())
    target = folder / re.sub(r"(yolov?\d+)", r"\1n", path.name)
    for width in (0.0625, 0.25, 0.5):
        target.write_text(yaml.safe_dump(content | {"scales": {"n": [0.33, width, 256]}}))
        with contextlib.suppress(ZeroDivisionError, ValueError, AssertionError):  # attention without a head
            YOLO(target)
            break
    return target


@pytest.fixture
def train(tmp_path) -> Callable[..., SimpleNamespace]:
    """Train with SophiaG, h made at every step of all images; gives the trainer and what it logged."""

    def run(model, data, **settings) -> SimpleNamespace:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        LOGGER.addHandler(handler)
        model = model if isinstance(model, Model) else YOLO(model)
        arguments = (
            BASE
            | {
                "optimizer": "SophiaG",
                "hessian_interval": 1,
                "hessian_fraction": 1.0,
                "project": str(tmp_path / "runs"),
            }
            | settings
        )
        try:
            model.train(data=data, **arguments)
        finally:
            LOGGER.removeHandler(handler)
        return SimpleNamespace(trainer=model.trainer, log="\n".join(lines), model=model)

    return run


def assert_curved(trainer, steps: int | None = STEPS) -> None:
    """Every parameter that was trained has a curvature, made as often as was asked for."""
    optimizer = trainer.optimizer
    clock = optimizer.param_groups[0]
    if steps is not None:
        assert clock["hessian_updates"] == steps
    assert clock["hessian_updates"] >= 1 and clock["hessian_dropped"] == 0
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for p, state in optimizer.state.items():
        h = state["hessian"]
        assert h.isfinite().all() and (h >= 0).all(), names[id(p)]
        assert h.any() or not state["exp_avg"].any(), f"{names[id(p)]} is trained without curvature"


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(path)) for name, path in FAMILIES.items()])
def test_task_and_family(name, data, train, tmp_path):
    run = train(tiny(MODELS / FAMILIES[name], tmp_path), data(name.split()[1]))
    assert_curved(run.trainer)
    assert "is not known" not in run.log
    checkpoint = torch_load(run.trainer.last, map_location="cpu")
    assert checkpoint["train_args"]["optimizer"] == "SophiaG"


def test_rtdetr_says_that_its_likelihood_is_not_known(data, train, tmp_path):
    from ultralytics import RTDETR

    layout = yaml.safe_load((MODELS / "v8/yolov8-rtdetr.yaml").read_text())
    layout |= {"scales": {"n": [0.33, 0.0625, 256]}}
    layout["head"][-1][-1] = ["nc", 16, 8, 2, 2, 2]  # hidden size, queries, points, heads, layers
    path = tmp_path / "yolov8n-rtdetr.yaml"
    path.write_text(yaml.safe_dump(layout))
    run = train(RTDETR(str(path)), data("detect"), deterministic=False)
    assert_curved(run.trainer)
    (line,) = [line for line in run.log.splitlines() if "is not known here" in line]
    assert "RTDETRDetectionLoss" in line and "docs/TASKS.md" in line


@pytest.mark.parametrize(
    ("name", "labels"),
    [  # masks are made of polygons
        pytest.param("sem", "segment", marks=needs("26/yolo26-sem.yaml")),
        pytest.param("depth", "depth", marks=needs("26/yolo26-depth.yaml")),
    ],
)
def test_dense_tasks_are_signed(name, labels, data, train, tmp_path):
    run = train(tiny(MODELS / f"26/yolo26-{name}.yaml", tmp_path), data(labels))
    assert_curved(run.trainer)
    assert len([line for line in run.log.splitlines() if "is not known here" in line]) == 1


# Text and visual prompts ----------------------------------------------------------------------------------------------


def random_embeddings(texts) -> dict[str, torch.Tensor]:
    """In place of CLIP's, which would have to be downloaded."""
    g = torch.Generator().manual_seed(0)
    return {text: torch.nn.functional.normalize(torch.randn(512, generator=g), dim=0) for text in sorted(texts)}


@pytest.fixture
def prompts(monkeypatch) -> None:
    for path in ("world.train.WorldTrainer", "yoloe.train.YOLOETrainerFromScratch"):
        module, name = f"ultralytics.models.yolo.{path}".rsplit(".", 1)
        kind = getattr(pytest.importorskip(module), name)
        if not hasattr(kind, "generate_text_embeddings"):
            pytest.skip("this Ultralytics has no place to give text embeddings")
        monkeypatch.setattr(kind, "generate_text_embeddings", lambda self, texts, *_, **__: random_embeddings(texts))
    embedded = lambda self, texts, *_, **__: torch.stack(list(random_embeddings(texts).values()))[None]  # noqa: E731
    monkeypatch.setattr("ultralytics.nn.tasks.YOLOEModel.get_text_pe", embedded)
    monkeypatch.setattr("ultralytics.nn.tasks.WorldModel.set_classes", lambda *_, **__: None)


@pytest.mark.long
def test_trainer_of_yolo_world(data, train, tmp_path, prompts):
    from ultralytics import YOLOWorld

    run = train(YOLOWorld(tiny(MODELS / "v8/yolov8-worldv2.yaml", tmp_path)), data("detect"))
    assert_curved(run.trainer)
    assert "is not known here" not in run.log


@pytest.mark.long
def test_trainers_of_yoloe(data, train, tmp_path, prompts):
    """Text prompts, then a linear probe on the trained weights; then visual prompts, with data sets in its own form."""
    from ultralytics import YOLOE
    from ultralytics.models.yolo import yoloe

    path = tiny(MODELS / "v8/yoloe-v8.yaml", tmp_path)
    text = train(YOLOE(path), data("detect"), trainer=yoloe.YOLOETrainer)
    probe = train(YOLOE(text.trainer.last), data("detect"), trainer=yoloe.YOLOEPETrainer)
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text(yaml.safe_dump({split: {"yolo_data": [data("detect")]} for split in ("train", "val")}))
    visual = train(YOLOE(path), str(mixed), trainer=yoloe.YOLOEVPTrainer)
    for run in (text, probe, visual):
        assert_curved(run.trainer)
        assert ("is not known here" in run.log) == (run is visual)
    assert "of unknown length" not in visual.log


# Models with losses of their own --------------------------------------------------------------------------------------


def test_parameters_without_curvature_are_named(data, train, tiny_model, monkeypatch):
    """A model whose loss adds something to its criterion's; the others of this file give no such line."""

    class Adding(DetectionTrainer):
        def get_model(self, *args, **kwargs):
            model = super().get_model(*args, **kwargs)
            model.extra = torch.nn.Parameter(torch.ones(3))
            return model

    def loss(self, batch, preds=None):
        total, items = original(self, batch, preds)
        return total.sum() + self.extra.square().sum() if hasattr(self, "extra") else total, items

    original = DetectionModel.loss
    monkeypatch.setattr(DetectionModel, "loss", loss)
    run = train(tiny_model, data("detect"), trainer=Adding)
    (line,) = [line for line in run.log.splitlines() if "whose curvature is not known" in line]
    assert "SophiaG: 1 parameters" in line and line.endswith(": extra")


SETTINGS = {  # those that do not touch each other share a run
    "multi_scale, cls_pw, close_mosaic": {
        "multi_scale": 0.5 if isinstance(DEFAULT_CFG_DICT["multi_scale"], float) else True,
        "cls_pw": 0.5,
        "close_mosaic": 1,
        "epochs": 2,
    },
    "rect, single_cls": {"rect": True, "single_cls": True},
    "fraction, freeze": {"fraction": 0.5, "freeze": 10, "epochs": 2},
    "frozen head": {"freeze": [22]},
    "frozen but for the boxes": {"freeze": [*range(22), "22.cv3"]},
    "AutoBatch": {"batch": -1},
    "time": {"time": 1e-9},
    "early stopping": {"epochs": 9, "patience": 1, "val": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_setting(name, data, train, tiny_model):
    settings = {key: value for key, value in SETTINGS[name].items() if key in DEFAULT_CFG_DICT}  # cls_pw is younger
    model = YOLO(tiny_model)
    if name == "early stopping":  # as if an earlier epoch had been perfect
        model.add_callback("on_train_start", lambda trainer: setattr(trainer.stopper, "best_fitness", 1.0))
    run = train(model, data("detect"), **settings)
    trainer = run.trainer
    steps = {"time": 1, "early stopping": None, "AutoBatch": 1}
    assert_curved(trainer, steps.get(name, 2 * STEPS if "close_mosaic" in settings else STEPS))
    if name == "early stopping":
        assert trainer.epoch < 8
    if "close_mosaic" in settings:
        assert "Closing dataloader mosaic" in run.log
    if "cls_pw" in settings:
        assert trainer.model.class_weights.unique().numel() > 1


@pytest.mark.parametrize("by", ["argument", "callback"])
def test_everything_frozen_ends_as_with_adamw(by, data, tiny_model, tmp_path):
    errors = []
    for optimizer in ("AdamW", "SophiaG"):
        settings = BASE | {"optimizer": optimizer, "project": str(tmp_path / "runs")}
        model = YOLO(tiny_model)
        if by == "callback":
            model.add_callback("on_train_start", lambda trainer: trainer.model.requires_grad_(False))
        else:
            settings["freeze"] = 23
        with pytest.raises(RuntimeError) as error:
            model.train(data=data("detect"), **settings)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_an_edited_loss_trains_with_one_line(fraction, data, train, tiny_model, monkeypatch):
    """The class loss of every criterion is reweighted, as by an edit of Ultralytics' source."""
    original = losses.v8DetectionLoss.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.bce = torch.nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.tensor(2.0))

    monkeypatch.setattr(losses.v8DetectionLoss, "__init__", init)
    run = train(tiny_model, data("detect"), hessian_fraction=fraction, batch=8, epochs=2)
    assert_curved(run.trainer)
    (line,) = [line for line in run.log.splitlines() if "is not known here" in line]
    assert "v8DetectionLoss" in line and "differs from that of the loss" in line


@pytest.mark.parametrize(("task", "expected"), [("classify", 2), ("detect", 16)])
def test_out_of_memory_leaves_the_scale_of_h(task, expected, data, train, tiny_model, tmp_path):
    """Windows of two micro-batches of 8 images: twice the estimate of a mean, 16 / images that of a sum."""
    model = YOLO(tiny(MODELS / "v8/yolov8-cls.yaml", tmp_path) if task == "classify" else tiny_model)
    raw, factors, images, sums = [], [], [], [0.0]

    def on_train_start(trainer):
        estimator = trainer._sophia.estimator

        def estimate(terms, *args):
            found = estimator(terms, *args)
            raw.append(sum(float(e.sum()) for e in found if e is not None))
            if len(raw) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return found

        trainer._sophia.estimator = estimate

    def on_hessian_update(trainer):
        group = trainer.optimizer.param_groups[0]
        images.append(max(4, round(8 * group["hessian_fraction"])))
        states = trainer.optimizer.state.values()
        sums.append(sum(float(state["hessian"].double().sum()) for state in states))
        beta2 = group["betas"][1]
        factors.append((sums[-1] - beta2 * sums[-2]) / (1 - beta2) / raw[-1])

    model.add_callback("on_train_start", on_train_start)
    model.add_callback("on_hessian_update", on_hessian_update)
    run = train(model, data(task), batch=8, nbs=16, epochs=4, warmup_epochs=0)
    assert "out of memory" in run.log and images == [8, 4, 4]
    assert factors == pytest.approx([expected if task == "classify" else expected / n for n in images], rel=1e-2)


@pytest.mark.requires(hasattr(engine, "MultiTrainer"), reason="this Ultralytics trains on one data set")
def test_several_data_sets(tiny_data, tiny_model, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(Path(tiny_data).read_text())
    settings = BASE | {"optimizer": "SophiaG", "fraction": 0.25, "project": str(tmp_path / "runs")}
    YOLO(tiny_model).train(data=[str(tiny_data), str(other)], trainer=DetectionTrainer, **settings)
    found = sorted((tmp_path / "runs").rglob("results.csv"))
    assert len(found) == 2 and all("sophia/rho" in path.read_text() for path in found)


@needs("26/yolo26.yaml")
def test_two_heads(data, train, tmp_path):
    """An interrupted run goes on with the curvature, the clock and the weights of the heads; then it is a teacher."""
    path = tiny(MODELS / "26/yolo26.yaml", tmp_path)
    model = YOLO(path)

    def stop(trainer):
        trainer.stop = trainer.epoch == 0

    model.add_callback("on_train_epoch_end", stop)
    model.add_callback("on_model_save", lambda trainer: kept.append(trainer.last.read_bytes()))
    kept: list[bytes] = []
    first = train(model, data("detect"), epochs=2)
    assert_curved(first.trainer)
    assert "is not known" not in first.log
    last = tmp_path / "last.pt"
    last.write_bytes(kept[0])  # the finished run's own is stripped
    saved = torch_load(last, map_location="cpu")["optimizer"]
    assert saved["param_groups"][0]["hessian_updates"] == STEPS
    resumed = YOLO(last)
    resumed.train(resume=True)
    trainer = resumed.trainer
    assert_curved(trainer, 2 * STEPS)
    assert trainer.epoch == 1 and trainer.model.criterion.o2m == pytest.approx(0.1)

    if "distill_model" not in DEFAULT_CFG_DICT:
        return
    run = train(path, data("detect"), distill_model=str(first.trainer.last))
    assert_curved(run.trainer)
    projector = [p for name, p in run.trainer.model.named_parameters() if "projector" in name]
    assert projector and all(run.trainer.optimizer.state[p]["hessian"].any() for p in projector)

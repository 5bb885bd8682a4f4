"""`lr0: auto`: what is measured, when the rate is decided, and what it is written into."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from ultralytics import YOLO

from yolo_sophia.integration import auto_lr, measured_lr
from yolo_sophia.integration.auto_lr import FAR, FAR_RATIO, NEAR, NEAR_RATIO, NEW_RATE, START, START_STEPS, rate_of
from yolo_sophia.integration.measured_lr import KEY, WINDOW, RateMeasurement
from yolo_sophia.optim import SophiaG

pytestmark = pytest.mark.compat

BODY, NEW = 0, 1
"""Parameter groups of `measuring`."""


@pytest.fixture
def measuring(monkeypatch) -> RateMeasurement:
    """A measurement from the first step on, over a body and a group of new rows."""
    monkeypatch.setattr(measured_lr, "save_arguments", lambda trainer: None)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr, "initial_lr": lr} for lr in (START, NEW_RATE)]
    optimizer = SophiaG(groups)
    args = SimpleNamespace(lr0=START, lr_factors={"new": NEW_RATE / START}, close_mosaic=10, single_cls=False)
    trainer = SimpleNamespace(
        args=args, epoch=0, epochs=100, device="cpu", loss_names=("box_loss", "cls_loss", "dfl_loss")
    )
    trainer.data = {"names": {0: "a", 1: "b"}}
    trainer.scheduler = SimpleNamespace(base_lrs=[START, NEW_RATE])
    measurement = RateMeasurement(trainer, optimizer)
    measurement.begin([NEW])
    return measurement


def step(measurement: RateMeasurement, *losses: float, lr: float = START) -> None:
    """One optimizer step over batches with these localization losses."""
    measurement.optimizer.param_groups[BODY]["lr"] = lr
    for i, loss in enumerate(losses):
        measurement.trainer.loss_items = torch.tensor([loss * 0.75, 100.0 - loss, loss * 0.25])
        if i == len(losses) - 1:
            measurement.after_step()
        measurement.after_event("on_train_batch_end")


@pytest.mark.parametrize(
    ("ratio", "rate"),
    [
        (1.2, NEAR),
        (NEAR_RATIO, NEAR),
        ((NEAR_RATIO + FAR_RATIO) / 2, (NEAR * FAR) ** 0.5),
        (FAR_RATIO, FAR),
        (0.1, FAR),
    ],
)
def test_the_rate_of_a_ratio(ratio, rate):
    assert rate_of(ratio) == pytest.approx(rate, rel=2e-3)


@pytest.mark.parametrize(("ratio", "rate"), [(0.95, NEAR), (0.5, FAR)])
def test_the_rate_follows_the_localization_loss(measuring, ratio, rate):
    """Of the class loss nothing is read: it rises here where the others fall."""
    for i in range(START_STEPS - 1):
        step(measuring, 4.0 if i < WINDOW else 4.0 * ratio)
    assert measuring.state["full_steps"] == START_STEPS - 1
    step(measuring, 4.0 * ratio)
    body, new = measuring.optimizer.param_groups
    assert measuring.state is None
    assert (body["lr"], body["initial_lr"]) == pytest.approx((rate, rate))
    assert (new["lr"], new["initial_lr"]) == (NEW_RATE, NEW_RATE)
    assert measuring.trainer.scheduler.base_lrs == pytest.approx([rate, NEW_RATE])
    assert measuring.trainer.args.lr0 == rate
    assert measuring.trainer.args.lr_factors["new"] == pytest.approx(NEW_RATE / rate, rel=1e-3)
    step(measuring, 0.1, lr=body["lr"])
    assert body["lr"] == pytest.approx(rate)  # decided once


def test_the_loss_of_a_step_is_the_mean_over_its_batches(measuring):
    step(measuring, 1.0, 2.0, 6.0)
    step(measuring, 5.0)
    assert measuring.state["losses"] == pytest.approx([3.0, 5.0])


def test_a_skipped_step_is_no_step(measuring):
    measuring.trainer.loss_items = torch.tensor([1.0, 1.0, 1.0])
    measuring.after_event("on_train_batch_end")
    assert measuring.state["losses"] == [] and measuring.state["full_steps"] == 0


def test_a_step_of_the_warm_up_counts_in_part(measuring):
    step(measuring, 1.0, lr=0.0)
    step(measuring, 1.0, lr=START / 2)
    assert measuring.state["full_steps"] == 0.5


def test_two_windows_at_least(measuring):
    """Though the steps at a rate above the start count for more."""
    for i in range(2 * WINDOW):
        assert measuring.state is not None, i
        step(measuring, 1.0, lr=10 * START)
    assert measuring.state is None


def test_the_measurement_starts_again_where_the_mosaic_closes(measuring):
    step(measuring, 1.0)
    measuring.trainer.epoch = 89
    measuring.after_event("on_train_epoch_start")
    assert len(measuring.state["losses"]) == 1
    measuring.trainer.epoch = 90
    measuring.after_event("on_train_epoch_start")
    assert measuring.state == {"losses": [], "full_steps": 0.0, "lr0": START, "fixed": [NEW]}


def test_a_factor_that_is_typed_stays_a_factor(measuring):
    measuring.begin([])
    measuring.trainer.args.lr_factors = {"new": 50.0}
    for _ in range(START_STEPS + 1):
        step(measuring, 1.0)
    assert measuring.trainer.args.lr_factors == {"new": 50.0}
    assert measuring.optimizer.param_groups[NEW]["initial_lr"] == pytest.approx(NEW_RATE * NEAR / START)


@pytest.mark.parametrize("names", [("loss",), ("cls_loss", "sem_loss")])
def test_a_loss_that_does_not_localize_takes_ultralytics_rate(measuring, names):
    measuring.trainer.loss_names = names
    measuring.trainer.loss_items = torch.ones(len(names))
    measuring.after_event("on_train_batch_end")
    assert measuring.state is None and measuring.trainer.args.lr0 == 0.001667  # of two classes


def test_losses_by_name(measuring):
    """As of Ultralytics 8.4."""
    measuring.trainer.loss_items = {"box_loss": torch.tensor(1.0), "cls_loss": torch.tensor(7.0), "dfl_loss": 2.0}
    measuring.after_step()
    measuring.after_event("on_train_batch_end")
    assert measuring.state["losses"] == [3.0]


def test_without_a_beginning_nothing_is_measured(measuring):
    del measuring.optimizer.param_groups[0][KEY]
    step(measuring, 1.0)
    measuring.after_load()
    assert KEY not in measuring.optimizer.param_groups[0]


def test_a_state_from_before_the_decision_is_decided_again(measuring):
    """As NaN recovery loads one."""
    import copy

    for _ in range(START_STEPS - 1):
        step(measuring, 1.0)
    saved = copy.deepcopy(measuring.optimizer.state_dict())
    step(measuring, 1.0)
    step(measuring, 1.0)
    assert measuring.state is None
    measuring.optimizer.load_state_dict(saved)
    measuring.after_load()
    assert measuring.trainer.scheduler.base_lrs == [START, NEW_RATE]
    for _ in range(2):
        step(measuring, 1.0)
    assert measuring.optimizer.param_groups[BODY]["initial_lr"] == pytest.approx(NEAR)


@pytest.fixture
def run(tiny_run, four_classes, monkeypatch) -> dict[str, Any]:
    """Arguments of a run of eight steps from weights, which decides after the fifth."""
    monkeypatch.setattr(auto_lr, "FEWEST_STEPS", 1)
    monkeypatch.setattr(measured_lr, "WINDOW", 2)
    monkeypatch.setattr(measured_lr, "START_STEPS", 5)
    monkeypatch.setattr(measured_lr, "rate_of", lambda ratio: 0.0007)
    rest = {key: value for key, value in tiny_run.items() if key not in ("model", "name")}
    return {**rest, "optimizer": "SophiaG", "warmup_epochs": 0, "cos_lr": False, "lrf": 1.0}


def rates(trainer: Any) -> set[float]:
    return {round(g["initial_lr"], 7) for g in trainer.optimizer.param_groups}


@pytest.mark.slow
def test_a_run_measures_its_rate(run, four_classes, tmp_path):
    seen = []
    model = YOLO(str(four_classes))
    model.add_callback("on_train_batch_end", lambda t: seen.append(t.args.lr0))
    model.train(**run, name="run")
    trainer = model.trainer
    assert seen == [START] * 5 + [0.0007] * 3  # other callbacks of the fifth batch come first
    assert rates(trainer) == {0.0007, NEW_RATE}
    assert yaml.safe_load((trainer.save_dir / "args.yaml").read_text())["lr0"] == 0.0007
    recorded = torch.load(trainer.last, weights_only=False)["train_args"]
    assert recorded["lr0"] == 0.0007 and recorded["lr_factors"]["new"] == pytest.approx(NEW_RATE / 0.0007, rel=1e-3)


class Cut(Exception):
    """The run ends here."""


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_resumed_run_has_the_rate_of_an_uncut_one(run, four_classes, epochs):
    """Cut before the decision, and after it."""
    given = {**run, "epochs": 3}
    whole = YOLO(str(four_classes))
    whole.train(**given, name="whole")

    def cut(trainer: Any) -> None:
        if trainer.epoch == epochs:
            raise Cut

    model = YOLO(str(four_classes))
    model.add_callback("on_train_epoch_start", cut)
    with pytest.raises(Cut):
        model.train(**given, name="cut")
    state = torch.load(model.trainer.last, weights_only=False)["optimizer"]["param_groups"][0][KEY]
    assert (state is None) == (epochs == 2)
    again = YOLO(str(model.trainer.last))
    again.train(resume=True)
    assert again.trainer.args.lr0 == 0.0007 and rates(again.trainer) == rates(whole.trainer) == {0.0007, NEW_RATE}
    assert again.trainer.scheduler.base_lrs == whole.trainer.scheduler.base_lrs

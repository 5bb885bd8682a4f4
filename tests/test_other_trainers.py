"""Trainers and callbacks that replace parts of the loop: h is that of the ordinary run, or one error says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from yolo_sophia import install

pytestmark = [pytest.mark.slow, pytest.mark.compat]
SETTINGS = {"optimizer": "SophiaG", "warmup_epochs": 0, "hessian_interval": 2, "hessian_warmup": 0, "close_mosaic": 0}
STEPS = 4  # per epoch: 16 images in batches of 4


@pytest.fixture
def train(tiny_run, monkeypatch) -> Callable[..., SimpleNamespace]:
    """Train on the tiny set; `callbacks` go to the model. What comes back has h after each update, by parameter."""
    install()

    def run(trainer: type = DetectionTrainer, **given: Any) -> SimpleNamespace:
        callbacks = {key: given.pop(key) for key in [*given] if key.startswith("on_")}
        settings = {**tiny_run, "epochs": 1, **SETTINGS, **given}
        hessians, lines = [], []

        def on_hessian_update(trainer):
            named = [(n.replace("_orig_mod.", ""), p) for n, p in trainer.model.named_parameters() if p.requires_grad]
            hessians.append({n: trainer.optimizer.state[p]["hessian"].clone() for n, p in named})

        made = trainer(overrides=settings)
        for event, callback in {**callbacks, "on_hessian_update": on_hessian_update}.items():
            made.add_callback(event, callback)
        monkeypatch.setattr(LOGGER, "warning", lambda line, *_: lines.append(str(line)))
        found = SimpleNamespace(error=None, trainer=made, hessians=hessians, warnings=lines)
        try:
            made.train()
        except RuntimeError as error:
            found.error = str(error)
        return found

    return run


def same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected):
        assert a.keys() == b.keys() and all(h.any() for h in b.values())
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6 * float(b[name].max()), msg=name)


# What callbacks replace -----------------------------------------------------------------------------------------------


def replaced_scaler(trainer):
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=False)


def enabled_scaler(trainer):
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)


def replaced_preprocess(trainer):
    trainer.preprocess_batch = MethodType(DetectionTrainer.preprocess_batch, trainer)


def wrapped_preprocess(trainer):
    original = trainer.preprocess_batch
    trainer.preprocess_batch = lambda batch: original(batch)


def replaced_criterion(trainer):
    trainer.model.criterion = trainer.model.init_criterion()


def removed_criterion(trainer):
    trainer.model.criterion = None


def compiled_model(trainer):
    trainer.model = torch.compile(trainer.model, backend="eager")


def own_optimizer_step(trainer):
    def optimizer_step():
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=False)
        trainer.ema.update(trainer.model)

    trainer.optimizer_step = optimizer_step


@pytest.mark.parametrize("fraction", [0.25, 1.0])
@pytest.mark.parametrize(
    ("event", "change"),
    [
        ("on_train_start", replaced_scaler),
        ("on_train_batch_start", replaced_scaler),
        ("on_train_start", enabled_scaler),
        ("on_train_start", replaced_preprocess),
        ("on_train_batch_start", replaced_preprocess),
        ("on_train_epoch_start", wrapped_preprocess),
        ("on_train_epoch_start", replaced_criterion),
        ("on_train_batch_start", removed_criterion),
        ("on_train_start", own_optimizer_step),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_h_is_that_of_the_ordinary_run(event, change, fraction, train):
    settings = {"epochs": 2, "batch": 8, "nbs": 8, "hessian_fraction": fraction, "hessian_interval": 1}
    run = train(**{event: change}, **settings)
    assert run.error is None and not run.warnings
    same(run.hessians, train(**settings).hessians)


@pytest.mark.requires(hasattr(DetectionTrainer, "_build_train_pipeline"), reason="its EMA does not unwrap such a model")
def test_a_model_compiled_by_a_callback(train):
    run = train(on_train_start=compiled_model)
    assert run.error is None
    same(run.hessians, train().hessians)


# Loops of their own ---------------------------------------------------------------------------------------------------


class OwnLoop(DetectionTrainer):
    """A loop without scaler and `optimizer_step`, with windows of two batches and gradients that are never None."""

    def _do_train(self, *ranks):  # an argument before 8.4
        self._setup_train(*ranks)
        del self.scaler
        self.run_callbacks("on_train_start")
        for epoch in range(self.epochs):
            self.epoch = epoch
            self.scheduler.step()
            self.model.train()
            for i, batch in enumerate(self.train_loader):
                self.loss_of(batch).backward()
                if i % 2:
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=False)

    def loss_of(self, batch):
        return self.model(self.preprocess_batch(batch))[0].sum()


def test_a_loop_that_calls_backward_and_step_itself(train):
    run = train(OwnLoop, nbs=8, hessian_interval=1)
    assert run.error is None and not run.warnings
    same(run.hessians, train(nbs=8, hessian_interval=1).hessians)


class Unprepared(OwnLoop):
    """Prepares its batches without `preprocess_batch`."""

    def loss_of(self, batch):
        return self.model(DetectionTrainer.preprocess_batch(self, batch))[0].sum()


def test_a_loop_that_shows_no_batch_ends_in_an_error(train):
    run = train(Unprepared, epochs=4)
    assert "found 3 steps of Unprepared without a call of its preprocess_batch" in run.error
    assert {float(state["step"]) for state in run.trainer.optimizer.state.values()} == {2.0}
    assert not run.hessians


def test_batches_that_are_no_longer_shown_are_warned_of_once(train):
    class Later(OwnLoop):
        def loss_of(self, batch):
            return OwnLoop.loss_of(self, batch) if self.epoch == 0 else Unprepared.loss_of(self, batch)

    run = train(Later, epochs=4)
    assert run.error is None
    assert len([line for line in run.warnings if "The curvature is no longer updated" in line]) == 1


class OwnLoss(OwnLoop):
    """Trains with a loss that the model does not have."""

    def loss_of(self, batch):
        batch = self.preprocess_batch(batch)
        predictions = self.model(batch["img"])
        while not isinstance(predictions, Tensor):
            predictions = next(iter(predictions.values() if isinstance(predictions, dict) else predictions))
        return predictions.square().mean()


def test_a_loss_that_is_not_the_models_ends_in_an_error(train):
    run = train(OwnLoss)
    assert "trains with another one" in run.error
    assert not run.hessians and not run.trainer.optimizer.state
    assert not {"loss"} & set(vars(run.trainer.model))


def test_a_batch_without_images_ends_in_an_error(train):
    class Pairs(DetectionTrainer):
        def preprocess_batch(self, batch):
            return [super().preprocess_batch(batch)]

    assert 'found list, expected a dictionary with the images as "img"' in train(Pairs).error


def test_a_model_of_other_parameters_ends_in_an_error(train):
    def exchange(trainer):
        trainer.model = copy.deepcopy(trainer.model)

    assert "found none of the optimizer's parameters" in train(on_train_start=exchange).error


# Terms that are absent -----------------------------------------------------------------------------------------------


class WithExtra(DetectionModel):
    """A detector with a parameter that only a term of its own loss trains."""

    def loss(self, batch, *predictions):
        total, items = super().loss(batch, *predictions)
        return total + self.extra.square().sum(), items


class NoObjectsAtFirst(DetectionTrainer):
    """The first batch has no objects, so that its estimate has no terms of boxes; the next one of its window has."""

    batches, extra = 0, False

    def get_model(self, cfg=None, weights=None, verbose=True):
        model = super().get_model(cfg, weights, verbose)
        if self.extra:
            model.__class__ = WithExtra
            model.extra = torch.nn.Parameter(torch.ones(3))
        return model

    def preprocess_batch(self, batch):
        batch = super().preprocess_batch(batch)
        self.batches += 1
        return (
            {**batch, **{key: batch[key][:0] for key in ("cls", "bboxes", "batch_idx")}} if self.batches == 1 else batch
        )


class WithExtraTerm(NoObjectsAtFirst):
    extra = True


@pytest.mark.parametrize("trainer", [NoObjectsAtFirst, WithExtraTerm])
def test_unknown_curvature_is_reported_once_and_not_for_want_of_objects(trainer, train):
    run = train(trainer, nbs=8, epochs=2, hessian_interval=1)
    assert run.error is None and len(run.hessians) == 4
    said = [line for line in run.warnings if "whose curvature is not known here" in line]
    assert [line.rpartition(": ")[2] for line in said] == ["extra"] * trainer.extra


# Parameters that are frozen and unfrozen ------------------------------------------------------------------------------


def layers(trainer, last: int) -> list[Tensor]:
    return [p for n, p in trainer.model.named_parameters() if int(n.split(".")[1]) < last and ".dfl" not in n]


def updates_of(trainer, params: list[Tensor]) -> set[int]:
    states = trainer.optimizer.state
    return {states[p]["hessian_updates"] if p in states else 0 for p in params}


def test_an_unfrozen_parameter_has_curvature_at_its_first_step(train):
    """Unfrozen layer by layer, frozen again; the interval alone gives one update."""
    seen, estimates = [], []

    def on_train_start(trainer):
        estimator = trainer._sophia.estimator

        def remember(terms, params, *rest):
            found = estimator(terms, params, *rest)
            estimates.append({id(p): e.clone() for p, e in zip(params, found) if e is not None})
            return found

        trainer._sophia.estimator = remember

    def on_train_epoch_start(trainer):
        for p in layers(trainer, 10):
            p.requires_grad_(trainer.epoch >= 2)
        for p in layers(trainer, 3):
            p.requires_grad_(trainer.epoch in {1, 3})

    def on_train_batch_end(trainer):
        first, more = layers(trainer, 3), [p for p in layers(trainer, 10) if id(p) not in map(id, layers(trainer, 3))]
        head = [*trainer.model.model[-1].cv3.parameters()]
        seen.append([updates_of(trainer, params) for params in (first, more, head)])
        if len(seen) == STEPS + 1:
            factor = 1 - trainer.optimizer.param_groups[0]["betas"][1]  # the bias correction divides by it
            for p in first:
                h = trainer.optimizer.state[p]["hessian"]
                torch.testing.assert_close(h, factor * estimates[-1][id(p)])
                assert h.any()

    run = train(
        epochs=4,
        freeze=10,
        hessian_interval=10**6,
        hessian_average="element",
        on_train_start=on_train_start,
        on_train_epoch_start=on_train_epoch_start,
        on_train_batch_end=on_train_batch_end,
    )
    assert run.error is None
    expected = [({0}, {0}, {1}), ({1}, {0}, {2}), ({1}, {1}, {3}), ({1}, {1}, {3})]
    assert seen == [list(one) for one in expected for _ in range(STEPS)]
    assert len(estimates) == 3


def test_a_parameter_unfrozen_within_a_window_has_curvature_at_its_step(train):
    unfrozen = []

    def on_train_batch_end(trainer):
        if not unfrozen:
            unfrozen.extend(layers(trainer, 3))
            for p in unfrozen:
                p.requires_grad_(True)
        elif len(unfrozen) and "steps" not in vars(trainer):
            trainer.steps = updates_of(trainer, unfrozen), updates_of(trainer, [*trainer.model.model[-1].parameters()])

    run = train(nbs=8, freeze=3, hessian_interval=10**6, on_train_batch_end=on_train_batch_end)
    assert run.trainer.steps[0] == {1}
    assert len(run.hessians) == 1
    names = {id(p): n for n, p in run.trainer.model.named_parameters()}
    assert all(run.hessians[0][names[id(p)]].any() for p in unfrozen)

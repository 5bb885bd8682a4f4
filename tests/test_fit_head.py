"""`fit_head=True`: new class rows are fitted before the first step, and nothing else of the training changes."""

from __future__ import annotations

import copy
import logging
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tiny_models import CLASSES, MODELS, batch_of, build
from torch import nn
from ultralytics import YOLO, __version__
from ultralytics.utils import LOGGER

from yolo_sophia.curvature.logistic import fit_rows
from yolo_sophia.integration import fit_head
from yolo_sophia.integration.class_samples import ClassSamples, Collector, class_convolutions
from yolo_sophia.integration.modules import trained_part

pytestmark = pytest.mark.compat
IS_84 = tuple(map(int, __version__.split(".")[:2])) >= (8, 4)


# The solver -----------------------------------------------------------------------------------------------------------


def problem(samples: int = 400, columns: int = 6, rows: int = 3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(samples, columns, generator=g, dtype=torch.float64) * torch.arange(1, columns + 1) + 2
    true = torch.randn(rows, columns, generator=g, dtype=torch.float64) / 3
    chance = ((x - 2) @ true.t() - 4).sigmoid()
    targets = (torch.rand(samples, rows, generator=g, dtype=torch.float64) < chance).double()
    return x, targets, 1 + 9 * torch.rand(samples, generator=g, dtype=torch.float64)


def initial(rows: int, columns: int):
    """As Ultralytics leaves a new class: p (1 - p) is 1e-4."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, columns, generator=g, dtype=torch.float64) / 10, torch.full((rows,), -9.0).double()


@pytest.mark.parametrize("precision", [0.5, 20.0])
def test_the_solver_agrees_with_scikit_learn(precision):
    x, targets, weights = problem()
    mean = (weights[:, None] * x).sum(0) / weights.sum()
    scale = ((weights[:, None] * (x - mean).square()).sum(0) / weights.sum()).sqrt()
    rows, bias = fit_rows(x, targets, weights, *initial(3, 6), precision, iterations=500, tolerance=1e-9)
    for k in range(3):
        expected = LogisticRegression(C=1 / precision, tol=1e-10, max_iter=10_000)
        expected.fit(((x - mean) / scale).numpy(), targets[:, k].numpy(), weights.numpy())
        torch.testing.assert_close(rows[k] * scale, torch.from_numpy(expected.coef_[0]), rtol=1e-5, atol=1e-6)
        assert float(bias[k] + rows[k] @ mean) == pytest.approx(expected.intercept_[0], rel=1e-5)


def test_soft_targets_are_a_mixture_of_hard_ones():
    x, targets, weights = problem()
    soft = 0.3 * targets
    both = torch.cat([targets, torch.zeros_like(targets)])
    found = fit_rows(x, soft, weights, *initial(3, 6), 1.0, 500, 1e-9)
    expected = fit_rows(x.repeat(2, 1), both, torch.cat([0.3 * weights, 0.7 * weights]), *initial(3, 6), 1.0, 500, 1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_rare_class_stays_near_its_rate():
    """A class with one positive hardly leaves the prior; one with many does."""
    x, targets, weights = problem(2000)
    rare = torch.zeros_like(targets[:, :1])
    rare[7] = 1
    targets = torch.cat([targets, rare], 1)
    weights = torch.ones_like(weights)
    rows, bias = fit_rows(x, targets, weights, *initial(4, 6), 5.0)
    free, _ = fit_rows(x, targets, weights, *initial(4, 6), 1e-3)
    spread, without = ((w * x.std(0)).square().sum(1).sqrt() for w in (rows, free))
    assert spread[3] < 0.5 < without[3] / 2
    assert (spread[:3] > 0.7 * without[:3]).all()
    rate = (x @ rows[3] + bias[3]).sigmoid().mean()
    assert float(rate) == pytest.approx(1 / 2000, rel=1e-3)  # b has no prior


def test_rows_without_positives_and_constant_inputs():
    x, targets, weights = problem()
    x, targets = x.float(), targets.float()
    x[:, 2] = 3.0
    targets[:, 1] = 0
    start = [v.float() for v in initial(3, 6)]
    rows, bias = fit_rows(x, targets, weights.float(), *start, 1.0)
    assert torch.equal(rows[1], start[0][1]) and bias[1] == start[1][1]
    assert rows.isfinite().all() and rows[0, 2] == rows[2, 2] == 0 and not torch.equal(rows[0], start[0][0])


# The samples ----------------------------------------------------------------------------------------------------------


def test_the_background_is_drawn_without_bias():
    g = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(4000, 2, generator=g) - 5
    targets = torch.zeros(4000, 2)
    targets[:50, 1] = 0.5
    one = ClassSamples(nn.Conv2d(3, 2, 1), torch.tensor([1]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(50):
            one.add(scores.sigmoid()[:, [0, 1, 1]], scores, targets, 200)
    inputs, kept, weights = map(torch.cat, (one.inputs, one.targets, one.weights))
    assert one.assigned == 50 * 50 == int((kept > 0).sum()) and (weights[kept[:, 0] > 0] == 1).all()
    assert len(inputs) == pytest.approx(50 * (50 + 200), rel=0.05)
    assert float(weights.max()) <= 2 * 3950 / 200 * 1.0001
    for column in (0, 1):  # one that the probability of a sample follows, and one that it does not
        found = (weights * inputs[:, column]).sum() / 50
        assert float(found) == pytest.approx(float(scores.sigmoid()[:, column].sum()), rel=0.05)


HEADS = [task for task in MODELS if task != "classify"]


@pytest.mark.parametrize("two_heads", [False, pytest.param(True, marks=pytest.mark.requires(IS_84, reason="8.4"))])
@pytest.mark.parametrize("task", HEADS)
def test_samples_are_those_of_the_class_loss(task, two_heads):
    """Of every head, the class loss of the criterion is that of the samples; the model is left as it was."""
    model = build(task, two_heads)
    batch, criterion = batch_of(task, images=3), model.criterion
    branches = class_convolutions(model)
    assert list(branches) == ["cv3", "one2one_cv3"][: 1 + two_heads] and {len(own) for own in branches.values()} == {2}
    model.eval()
    state = copy.deepcopy(model.state_dict())
    rows = {name: torch.arange(CLASSES) for own in branches.values() for name in own}
    collector = Collector(model, rows, model.train)
    with torch.random.fork_rng(devices=[]):
        collector.collect(copy.copy(batch), background=10**9)
    assert model.criterion is criterion and not any(m.training for m in model.modules())
    assert all(torch.equal(own, state[name]) for name, own in model.state_dict().items())
    assert collector.objects == len(batch["cls"]) and set(collector.samples) == set(rows)
    parts = [criterion.one2many, criterion.one2one] if two_heads else [criterion]
    recorded = []
    for part in parts:
        bce = part.bce
        part.bce = lambda scores, targets, bce=bce: (
            recorded.append(bce(scores, targets).sum().item()) or bce(scores, targets)
        )
    model.train()
    model(copy.copy(batch))
    for (branch, own), expected in zip(branches.items(), recorded):
        losses = [fit_head.class_loss(collector.samples[name], conv.weight, conv.bias) for name, conv in own.items()]
        assert sum(losses) == pytest.approx(expected, rel=1e-4), branch
        per_object = collector.anchors_per_object(next(iter(own)))
        assert 1 <= per_object <= 10 and (branch == "cv3" or per_object < 2)


def scaled(tree):
    """Twice the tensors of an output."""
    if isinstance(tree, dict):
        return {key: scaled(own) for key, own in tree.items()}
    return [scaled(own) for own in tree] if isinstance(tree, (list, tuple)) else 2 * tree


def test_a_class_loss_of_other_scores_is_refused():
    model = build("detect")
    collector = Collector(model, {}, model.train)
    hook = model.model[-1].register_forward_hook(lambda _, args, output: scaled(output))
    with pytest.raises(RuntimeError, match=r"DetectionModel that are not the outputs .* of Detect. Remove fit_head"):
        collector.collect(batch_of("detect"), 10)
    hook.remove()
    collector.collect(batch_of("detect"), 10)
    kind = type(collector.criterion)
    functional = {"__call__": lambda self, preds, batch: (torch.zeros(3), None)}
    collector.criterion.__class__ = type("Edited", (kind,), functional)
    with pytest.raises(RuntimeError, match=r"called its `bce` 0 times .* Remove fit_head"):
        collector.collect(batch_of("detect"), 10)


class Holder(nn.Module):
    """A model of a head alone."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.model = nn.Sequential(head)


@pytest.mark.parametrize("name", ["Classify", "RTDETRDecoder", "WorldDetect"])
def test_other_heads_are_refused(name):
    from ultralytics.nn.modules import head as heads

    if name == "Classify":
        model = build("classify")
    else:
        size = {"hd": 16, "nq": 10, "ndl": 1, "nh": 2} if name == "RTDETRDecoder" else {}
        model = Holder(getattr(heads, name)(nc=CLASSES, ch=(8, 8, 8), **size))
    with pytest.raises(ValueError, match=f"found {name}. Remove fit_head"):
        fit_head.fit_before_training(SimpleNamespace(model=model))


# The training ---------------------------------------------------------------------------------------------------------


def streams() -> list:
    """What the next draw from each random state would give."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    return drawn


def train(run: dict, weights: Path | None, **arguments) -> SimpleNamespace:
    """Train, and note the state before and after the start of the training, and the loss of each batch."""
    seen = SimpleNamespace(losses=[], lines=[])
    arguments = {**run, **arguments}
    model = YOLO(arguments.pop("model"))
    if weights:
        model.load(weights)

    def note(event: str):
        def callback(trainer):
            state = copy.deepcopy(trained_part(trainer.model).state_dict())
            setattr(seen, event, SimpleNamespace(state=state, streams=streams(), trainer=trainer))
            seen.ema = copy.deepcopy(trainer.ema.ema.state_dict())

        return callback

    def batch_end(trainer):
        seen.losses.append(float(trainer.loss.detach()))

    model.add_callback("on_pretrain_routine_end", note("before"))
    model.add_callback("on_train_start", note("after"))
    model.add_callback("on_train_batch_end", batch_end)
    handler = logging.Handler()
    handler.emit = lambda record: seen.lines.append(record.getMessage())
    LOGGER.addHandler(handler)
    try:
        model.train(**arguments)
    finally:
        LOGGER.removeHandler(handler)
    seen.lines = [line for line in seen.lines if "fit_head:" in line]
    seen.end, seen.trainer = model.trainer.model.state_dict(), model.trainer
    return seen


OPTIMIZERS = {
    "SophiaG": {"optimizer": "SophiaG"},
    "dotted": {"optimizer": "torch.optim.AdamW", "lr0": 0.001},
    "SGD": {"optimizer": "SGD"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_the_new_rows_are_fitted(tiny_run, four_classes, name):
    seen = train(tiny_run | {"epochs": 1}, four_classes, fit_head=True, **OPTIMIZERS[name])
    changed = {key for key, own in seen.after.state.items() if not torch.equal(own, seen.before.state[key])}
    assert changed == {f"model.22.cv3.{i}.2.{key}" for i in range(3) for key in ("weight", "bias")} - empty(seen)
    assert {f"model.22.cv3.0.2.{key}" for key in ("weight", "bias")} <= changed
    assert all(torch.equal(own, seen.after.state[key]) for key, own in seen.ema.items())
    assert seen.after.streams == seen.before.streams
    (line,) = seen.lines
    found = re.search(
        r"18 new class rows in 3 layers .* of 4 batches; class loss per positive (\S+) -> (\S+); took", line
    )
    assert float(found[2]) < float(found[1])
    assert seen.trainer.args.fit_head is True


def empty(seen) -> set[str]:
    """Parameters of levels that no object is assigned to: they stay as they are."""
    same = lambda key: torch.equal(seen.after.state[key], seen.before.state[key])  # noqa: E731
    return {f"model.22.cv3.2.2.{key}" for key in ("weight", "bias") if same(f"model.22.cv3.2.2.{key}")}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "workers"), [("SophiaG", 0), ("dotted", 1), ("SGD", 0)])
def test_the_training_is_untouched_but_for_the_rows(tiny_run, four_classes, name, workers, monkeypatch):
    """With the write suppressed, it is bit for bit that without fit_head."""
    run = (
        tiny_run
        | {"epochs": 1, "workers": workers, "multi_scale": 0.5 if IS_84 else True, "mixup": 0.5, "close_mosaic": 0}
        | OPTIMIZERS[name]
    )
    without = train(run, four_classes)
    solved = []
    monkeypatch.setattr(fit_head, "solve", solved.append)
    suppressed = train(run, four_classes, fit_head=True)
    assert len(solved) == 2 and len(suppressed.lines) == 1 and not without.lines
    assert suppressed.losses == without.losses
    assert all(torch.equal(own, without.end[key]) for key, own in suppressed.end.items())


@pytest.mark.slow
def test_nothing_to_fit(tiny_run):
    seen = train(tiny_run | {"epochs": 1}, None, fit_head=True, optimizer="SophiaG")
    assert len(seen.lines) == 1 and "nothing to fit" in seen.lines[0]
    assert all(torch.equal(own, seen.before.state[key]) for key, own in seen.after.state.items())


def interrupt(trainer):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resumed_run_does_not_fit_again(tiny_run, four_classes):
    model = YOLO(tiny_run.pop("model")).load(four_classes)
    model.add_callback("on_fit_epoch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.train(**tiny_run, optimizer="SophiaG", fit_head=True)
    resumed = train({"model": str(model.trainer.last), "resume": True}, None)
    assert resumed.trainer.args.fit_head is True and resumed.trainer.start_epoch == 1 and resumed.lines == []
    assert all(torch.equal(own, resumed.before.state[key]) for key, own in resumed.after.state.items())

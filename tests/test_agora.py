"""Sophia by the Agora constructor: both estimators, their data, what a refresh leaves alone, and plain refusals."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Generator, nn
from torch.utils.data import DataLoader, TensorDataset

from yolo_sophia import Sophia
from yolo_sophia.curvature import GaussNewtonBartlett, Hutchinson, OnBatches, likelihood_of
from yolo_sophia.curvature.noise import forked, noise_seed

ESTIMATORS = ("Hutchinson", "Gauss-Newton-Bartlett")
both = pytest.mark.parametrize("estimator", ESTIMATORS)
LOSS = nn.CrossEntropyLoss()


def network() -> nn.Module:
    """Convolution weights of four dimensions, BatchNorm, dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(12, 3)
        )


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    noise = Generator().manual_seed(1)
    return [(torch.randn(6, 1, 4, 4, generator=noise), torch.randint(3, (6,), generator=noise)) for _ in range(count)]


def train(optimizer: Sophia, steps: range, model: nn.Module | None = None) -> None:
    """The loop of the README, with dropout noise that depends on nothing but the step."""
    model = model or optimizer.hessian_estimator.model
    for step in steps:
        x, y = batches()[step % 3]
        optimizer.zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step)
            LOSS(model(x), y).backward()
        optimizer.step()


@both
def test_the_first_estimate_is_that_of_the_data(estimator):
    """h after one step is (1 - b2) times the estimate of the first batch, under the noise of the seed."""
    model = network()
    optimizer = Sophia(model, batches(), model.parameters(), estimator=estimator, loss_function=LOSS, betas=(0.9, 0.75))
    score = LOSS if estimator == "Hutchinson" else likelihood_of(LOSS)
    kind = Hutchinson() if estimator == "Hutchinson" else GaussNewtonBartlett()
    params = list(model.parameters())
    with forked(noise_seed(0, 0)):
        expected = OnBatches(kind, model, batches(), score)(params)
    train(optimizer, range(1))
    for p, e in zip(params, expected):
        torch.testing.assert_close(optimizer.state[p]["hessian"], 0.25 * e)
        assert optimizer.state[p]["hessian"].any()


@both
@pytest.mark.parametrize("k", [1, 2, 5])
def test_k_is_respected(estimator, k, monkeypatch):
    model, refreshed, taken = network(), [], []
    optimizer = Sophia(model, batches(2), model.parameters(), k=k, estimator=estimator, loss_function=LOSS)
    on = optimizer.hessian_estimator.on
    monkeypatch.setattr(optimizer.hessian_estimator, "on", lambda b, p: (taken.append(b[0]), on(b, p))[1])
    for step in range(8):
        before = optimizer.state[model[0].weight].get("hessian", torch.zeros(())).clone()
        train(optimizer, range(step, step + 1))
        if not torch.equal(before.expand(3, 1, 3, 3), optimizer.state[model[0].weight]["hessian"]):
            refreshed.append(step)
    assert refreshed == list(range(0, 8, k))
    assert all(torch.equal(x, batches(2)[i % 2][0]) for i, x in enumerate(taken))  # batch after batch, and again


@both
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_refresh_leaves_everything_but_h_alone(estimator, training):
    model = network().train(training)
    loader = DataLoader(TensorDataset(*map(torch.cat, zip(*batches()))), batch_size=6, shuffle=True)
    optimizer = Sophia(model, loader, model.parameters(), estimator=estimator, loss_function=LOSS)
    LOSS(model(batches()[0][0]), batches()[0][1]).backward()
    before, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    states, modes = (torch.get_rng_state(), random.getstate()), [m.training for m in model.modules()]
    optimizer.refresh()
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert modes == [m.training for m in model.modules()]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for p, g in zip(model.parameters(), grads):
        assert torch.equal(p.grad, g) and optimizer.state[p]["hessian"].any()


@both
@pytest.mark.parametrize("done", [0, 3, 8])
@pytest.mark.parametrize("copied", ["state_dict", "deepcopy"])
def test_a_resumed_run_makes_the_estimates_it_would_have_made(estimator, done, copied):
    model = network()
    settings = {"k": 2, "estimator": estimator, "loss_function": LOSS, "lr": 0.05}
    optimizer = Sophia(model, batches(), model.parameters(), seed=3, **settings)
    train(optimizer, range(done))
    if copied == "deepcopy":
        other = copy.deepcopy(optimizer)
        resumed = other.hessian_estimator.model
    else:
        resumed = network()
        resumed.load_state_dict(copy.deepcopy(model.state_dict()))
        other = Sophia(resumed, batches(), resumed.parameters(), **settings)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, range(done, 12))
    train(other, range(done, 12))
    for (name, p), q in zip(model.named_parameters(), resumed.parameters()):
        assert torch.equal(p, q), name
        assert torch.equal(optimizer.state[p]["hessian"], other.state[q]["hessian"]), name


def test_hutchinson_takes_the_closures_loss_where_there_are_no_targets():
    inputs_only, without_data = network(), network()
    x, y = batches()[0]
    for model, data in ((inputs_only, [x]), (without_data, None)):
        optimizer = Sophia(model, data, model.parameters(), loss_function=LOSS if data else None)
        model.eval()

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = LOSS(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert optimizer.state[model[0].weight]["hessian"].any()
    assert all(torch.equal(p, q) for p, q in zip(inputs_only.parameters(), without_data.parameters()))


@pytest.mark.parametrize("data", [None, [batches()[0][0]]], ids=["nothing", "inputs"])
def test_hutchinson_without_targets_or_loss_says_so(data):
    model = network()
    optimizer = Sophia(model, data, model.parameters(), loss_function=LOSS)
    LOSS(model(batches()[0][0]), batches()[0][1]).backward()
    with pytest.raises(RuntimeError, match=r"needs a loss.*pairs \(inputs, targets\), or call step\(closure\)"):
        optimizer.step()


def test_gauss_newton_bartlett_needs_no_targets():
    model, twin = network(), network()
    for m, data in ((model, batches()), (twin, [x for x, _ in batches()])):
        train(Sophia(m, data, m.parameters(), estimator=ESTIMATORS[1], loss_function=LOSS, k=1), range(3))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"estimator": "hutchinson"}, ValueError, "Invalid estimator: found 'hutchinson', expected one of"),
        ({"estimator": ESTIMATORS[1], "loss_function": None}, ValueError, "Bartlett' needs loss_function"),
        ({"estimator": ESTIMATORS[1], "input_data": None}, ValueError, "Bartlett' needs input_data"),
        (
            {"estimator": ESTIMATORS[1], "loss_function": nn.HuberLoss()},
            TypeError,
            "is known for HuberLoss",
        ),
        ({"input_data": 3}, TypeError, "Invalid input_data: found int"),
        ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay"),
    ],
)
def test_erroneous_inputs(change, error, message):
    model = network()
    with pytest.raises(error, match=message):
        Sophia(
            **{"model": model, "input_data": batches(), "params": model.parameters(), "loss_function": LOSS} | change
        )

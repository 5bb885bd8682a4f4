"""Estimates on batches of their own: they converge to exact diagonals, leave no trace, and find their place again."""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from exact import (
    CLASSES,
    assert_converged,
    case,
    gauss_newton_diagonal,
    hessian_diagonal,
    mean_and_error,
    without_running_statistics,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from yolo_sophia.curvature import EmpiricalFisher, GaussNewtonBartlett, Hutchinson, OnBatches, likelihood_of
from yolo_sophia.curvature.batches import Batches, buffers_kept, moved
from yolo_sophia.curvature.noise import forked

WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
both_reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def losses(c, reduction: str) -> dict[str, tuple[nn.Module, Tensor]]:
    """Losses with a target for each prediction of the net."""
    onehot = F.one_hot(c.labels, CLASSES).double().movedim(-1, 1)
    return {
        "cross-entropy": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1, reduction=reduction), c.labels),
        "bce": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0), reduction=reduction), onehot),
        "mse": (nn.MSELoss(reduction=reduction), onehot),
    }


def converges(c, loss, target, estimator, exact, samples: int) -> None:
    """Assert that the mean of the estimator's draws on this one batch is the exact diagonal."""
    score = loss if isinstance(estimator, Hutchinson) else likelihood_of(loss)
    on_batches = OnBatches(estimator, c.net, [(c.x, target)], score)
    with forked(0):
        found = mean_and_error(partial(on_batches, c.params), samples)
    assert_converged(*found, exact)
    with pytest.raises(AssertionError, match="standard errors"):  # so many samples tell it from the half as much again
        assert_converged(*found, [1.5 * e for e in exact])


@both_reductions
@pytest.mark.parametrize(
    ("net", "name"), [("mlp", "cross-entropy"), ("mlp", "mse"), ("conv", "bce"), ("transformer", "cross-entropy")]
)
def test_gauss_newton_bartlett_converges_to_the_exact_diagonal(net, name, reduction):
    c = case(net)
    loss, target = losses(c, reduction)[name]
    exact = gauss_newton_diagonal(c, lambda f: loss(f, target))
    converges(c, loss, target, GaussNewtonBartlett(), exact, 300)


def test_squared_gradients_of_true_labels_do_not():
    """What is often taken for Gauss-Newton-Bartlett fails the comparison above, with and without its factor."""
    c = case("mlp")
    loss, target = losses(c, "mean")["cross-entropy"]
    exact = gauss_newton_diagonal(c, lambda f: loss(f, target))
    grads = torch.autograd.grad(loss(c.net(c.x), target), c.params)
    (terms,) = (likelihood_of(loss)(c.net(c.x), target),)
    impostors = [[g.square() for g in grads], [len(c.x) * g.square() for g in grads]]
    for impostor in (*impostors, EmpiricalFisher()(terms, c.params, None)):
        with pytest.raises(AssertionError, match="standard errors"):
            assert_converged(impostor, [0.1 * e for e in exact], exact)


@pytest.mark.parametrize(
    ("net", "reduction"), [("mlp", "mean"), ("mlp", "sum"), ("conv", "mean"), ("conv", "sum"), ("transformer", "mean")]
)
def test_hutchinson_converges_to_the_exact_diagonal(net, reduction):
    c = case(net)
    loss, target = losses(c, reduction)["cross-entropy"]
    exact = hessian_diagonal(c, lambda f: loss(f, target))
    assert min(float(e.min()) for e in exact) < 0  # it is not Gauss-Newton's
    converges(c, loss, target, Hutchinson(), exact, 200)


@both_reductions
@pytest.mark.parametrize("net", ["mlp", "conv", "transformer"])
def test_oracles_agree_with_curvlinops(net, reduction):
    curvlinops = pytest.importorskip("curvlinops")
    c = case(net)
    loss, target = losses(c, reduction)["mse"]
    data = [(c.x, target)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for kind, exact in (
            (curvlinops.GGNLinearOperator, gauss_newton_diagonal(c, lambda f: loss(f, target))),
            (curvlinops.HessianLinearOperator, hessian_diagonal(c, lambda f: loss(f, target))),
        ):
            net = without_running_statistics(c.net)
            operator = kind(net, loss, list(net.parameters()), data, progressbar=False)
            theirs = (operator @ torch.eye(operator.shape[1], dtype=torch.float64)).diag()
            torch.testing.assert_close(torch.cat([e.flatten() for e in exact]), theirs, rtol=1e-8, atol=1e-12)


class Shifting(nn.BatchNorm1d):
    """A norm with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        self.running_mean += 1
        return super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_keeps_the_buffers(training):
    """Whatever a norm does, it finds the buffers it has, its output is that of a plain pass, and an error ends it."""
    norms = [*(nn.BatchNorm1d(4) for _ in range(3)), Shifting(4), nn.BatchNorm1d(4, track_running_stats=False)]
    norms[2].forward = lambda x: norms[2].running_var.mul_(2) * x
    model = nn.Sequential(*norms).train(training)
    model[1].eval()
    x, before = torch.rand(5, 4), copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model)
    expected[2].forward = lambda x: expected[2].running_var.mul_(2) * x
    for inputs in (x, x, None):
        with pytest.raises(AttributeError) if inputs is None else nullcontext(), buffers_kept(model) as copies:
            found = functional_call(model, copies, (inputs,))
    assert torch.equal(found, expected(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.track_running_stats for m in model] == [True, True, True, True, False]
    with buffers_kept(nn.Sequential(nn.BatchNorm1d(4), nn.SyncBatchNorm(4))) as copies:
        assert not copies


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("estimator", [Hutchinson(2), GaussNewtonBartlett()], ids=lambda e: type(e).__name__)
def test_leaves_no_trace(estimator, training):
    c, loss = case("conv"), nn.CrossEntropyLoss()
    net = nn.Sequential(c.net, nn.Dropout(0.5)).train(training)
    c.net[1].eval()  # a part in another mode
    for p in c.params[::2]:
        p.grad = torch.ones_like(p)
    data = DataLoader(TensorDataset(c.x, c.labels), batch_size=2, shuffle=True)
    on_batches = OnBatches(estimator, net, data, loss if isinstance(estimator, Hutchinson) else likelihood_of(loss))
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    states = torch.get_rng_state(), random.getstate()
    with forked(3):
        first = on_batches(c.params)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert modes == [m.training for m in net.modules()]
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    for i, p in enumerate(c.params):
        assert p.grad is None if i % 2 else torch.equal(p.grad, torch.ones_like(p))
    assert any(e.any() for e in first) and not any(e.requires_grad for e in first)
    again = OnBatches(estimator, net, data, on_batches.score)
    with forked(3):
        assert all(torch.equal(a, b) for a, b in zip(first, again(c.params)))


def test_batches_are_gone_through_again_and_again():
    batches = Batches([(1, 2), [3, 4], 5, torch.ones(2)])
    expected = [(1, 2), (3, 4), (5, None)]
    for _ in range(2):
        assert [batches.take() for _ in range(3)] == expected
        inputs, targets = batches.take()
        assert inputs.sum() == 2 and targets is None
    alone = Batches(torch.ones(2, 3))
    assert alone.take()[0].shape == alone.take()[0].shape == (2, 3)


@pytest.mark.parametrize("data", [range(5), DataLoader(range(5), batch_size=None)], ids=["list", "loader"])
def test_the_batch_of_a_number_is_found_again(data):
    taken = [Batches(data).take(i)[0] for i in (0, 3, 7, 12)]
    assert list(map(int, taken)) == [0, 3, 2, 2]
    batches = Batches(data)
    assert [int(batches.take(i)[0]) for i in (0, 1, 7, 8, 1, 2)] == [0, 1, 2, 3, 1, 2]
    assert int(copy.deepcopy(batches).take()[0]) == 3


def test_only_the_place_within_a_round_is_looked_for():
    read = []

    class Counting(list):
        def __iter__(self):
            return (read.append(x) or x for x in list.__iter__(self))

    assert Batches(Counting("abc")).take(3 * 10**6 + 1)[0] == "b" and read == ["a", "b"]


def test_nested_batches_are_moved():
    t = torch.ones(1)
    out = moved({"a": [t, (t, "word")], "b": 3}, torch.device("meta"))
    assert out["a"][0].is_meta and out["a"][1][0].is_meta and out["a"][1][1] == "word" and out["b"] == 3


def test_data_without_a_length_is_counted():
    class Endless:
        def __iter__(self):
            return iter("abc")

    assert Batches(Endless()).take(4)[0] == "b"


def test_data_that_cannot_be_cycled_is_refused():
    with pytest.raises(TypeError, match="Invalid input_data: found int, expected an iterable"):
        Batches(3)
    once = Batches(iter([1]))
    assert once.take() == (1, None)
    with pytest.raises(ValueError, match=r"no batch after 1.*nor an iterator that can be used once"):
        once.take()
    with pytest.raises(ValueError, match="no batch after 0"):
        Batches([]).take()

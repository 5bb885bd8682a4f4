"""DecoupledSophia: an estimator written by a user, the clock, the seed, and the rule of the Agora release."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import AdamW

from yolo_sophia import DecoupledSophia, SophiaG, SophiaH

STEPS = 12


def squared_gradient_of_noisy_inputs(params: list[Tensor]) -> list[Tensor | None]:
    """What a user writes: draws from the global random states, and forgets a parameter."""
    x = torch.randn(8, 3) + random.random() + np.random.rand()
    loss = (x @ params[0]).tanh().square().mean()
    (g,) = torch.autograd.grad(loss, params[:1])
    return [g.square()] + [None] * (len(params) - 1)


def made(estimator=squared_gradient_of_noisy_inputs, **settings) -> DecoupledSophia:
    noise = torch.Generator().manual_seed(3)
    params = [Parameter(torch.randn(3, 2, generator=noise)), Parameter(torch.randn(4, generator=noise))]
    return DecoupledSophia(params, estimator, **{"lr": 0.1, "betas": (0.9, 0.5), "k": 3, "rho": 5.0, **settings})


def held(optimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer, steps=range(STEPS)) -> None:
    for step in steps:
        for i, p in enumerate(held(optimizer)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
        optimizer.step()


def assert_equal(a, b) -> None:
    for p, q in zip(held(a), held(b)):
        assert torch.equal(p, q)
        torch.testing.assert_close(dict(a.state[p]), dict(b.state[q]), rtol=0, atol=0)


@pytest.mark.parametrize("corrected", [False, True])
def test_rule_of_the_agora_release(corrected):
    """Written out: momentum and decay once, max(h, eps), rho the bound, a refresh at the first step and every k-th."""
    calls = []

    def estimator(params):
        calls.append([tuple(p.shape) for p in params])
        return [torch.full_like(p, 2.0 * len(calls) - 3) for p in params]  # the first is negative

    settings = {"lr": 0.01, "betas": (0.9, 0.8), "eps": 0.05, "weight_decay": 0.1, "k": 3, "rho": 0.5}
    optimizer = made(estimator, bias_correction=corrected, **settings)
    theta = [p.detach().clone() for p in held(optimizer)]
    m, h = [torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta]
    train(optimizer)
    for step in range(STEPS):
        for i, p in enumerate(theta):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            m[i] = 0.9 * m[i] + 0.1 * g
            if step % 3 == 0:
                h[i] = 0.8 * h[i] + 0.2 * (2.0 * (step // 3 + 1) - 3)
            p *= 1 - 0.01 * 0.1
            curvature = h[i] / (1 - 0.8 ** (step // 3 + 1)) if corrected else h[i]
            p -= 0.01 * (m[i] / curvature.clamp(min=0.05)).clamp(-0.5, 0.5)
    assert calls == [[(3, 2), (4,)]] * 4
    for p, expected in zip(held(optimizer), theta):
        torch.testing.assert_close(p.detach(), expected)


def test_a_negative_curvature_steps_along_the_momentum():
    optimizer = made(lambda params: [torch.full_like(p, -1e3) for p in params], lr=0.1, rho=0.5, betas=(0.0, 0.0))
    start = [p.detach().clone() for p in held(optimizer)]
    train(optimizer, range(1))
    for p, before in zip(held(optimizer), start):
        torch.testing.assert_close(p.detach(), before - 0.1 * 0.5 * p.grad.sign())


def test_the_global_random_states_are_left_alone_and_the_seed_decides():
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    first, same, other = made(), made(), made(seed=1)
    for optimizer in (first, same, other):
        train(optimizer)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))
    assert_equal(first, same)
    assert not torch.equal(held(first)[0], held(other)[0])
    noise = []

    def estimator(params):
        noise.append(float(torch.rand(())))
        return [None for _ in params]

    train(made(estimator))
    assert len(set(noise)) == len(noise) == 4  # each refresh has noise of its own


@pytest.mark.parametrize("kind", [SophiaG, SophiaH, AdamW])
def test_the_state_of_another_optimizer_is_refused(kind):
    ours, params = made(), [Parameter(torch.ones(3, 2)), Parameter(torch.ones(4))]
    theirs = kind(params)
    for p in params:
        p.grad = torch.ones_like(p)
    if kind is not AdamW:
        theirs.update_hessian([torch.ones_like(p) for p in params])
    theirs.step()
    with pytest.raises(ValueError, match="The state is not DecoupledSophia's"):
        ours.load_state_dict(theirs.state_dict())
    train(ours, range(1))
    with pytest.raises(ValueError, match="The state is not SophiaG's"):
        SophiaG(params).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("done", [0, 2, 7])
def test_a_copy_makes_the_estimates_that_the_original_would(copied, done):
    optimizer = made()
    train(optimizer, range(done))
    if copied == "state_dict":
        other = made(seed=9, k=7)
        for p, q in zip(held(other), held(optimizer)):
            p.data.copy_(q)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        other = copy.deepcopy(optimizer) if copied == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    for o in (other, optimizer):
        train(o, range(done, STEPS))
    assert_equal(other, optimizer)


def test_frozen_parameters_are_no_part_of_the_estimate():
    seen = []

    def estimator(params):
        seen.append(params)
        return [torch.ones_like(p) for p in params]

    optimizer = made(estimator)
    first, second = held(optimizer)
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert seen == [[second]] and first not in optimizer.state and second in optimizer.state


def test_an_estimate_that_is_not_finite_is_dropped():
    values = iter([1.0, float("nan"), 3.0])
    optimizer = made(lambda params: [torch.full_like(p, v) for v in [next(values)] for p in params], k=1)
    train(optimizer, range(1))
    h = optimizer.state[held(optimizer)[0]]["hessian"].clone()
    with pytest.warns(UserWarning, match="dropped a Hessian estimate that is not finite"):
        train(optimizer, range(1, 2))
    assert torch.equal(h, optimizer.state[held(optimizer)[0]]["hessian"])
    train(optimizer, range(2, 3))
    assert optimizer.state[held(optimizer)[0]]["hessian_updates"] == 2


def test_an_estimate_from_elsewhere_restarts_the_clock():
    optimizer = made(lambda params: pytest.fail("not due"))
    assert optimizer.refresh_due
    optimizer.update_hessian([torch.ones_like(p) for p in held(optimizer)])
    train(optimizer, range(3))
    assert optimizer.refresh_due


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "Invalid k: found 0, expected an integer >= 1"),
        ({"k": 2.5}, ValueError, "Invalid k"),
        ({"k": True}, ValueError, "Invalid k"),
        ({"seed": -1}, ValueError, "Invalid seed"),
        ({"rho": 0}, ValueError, "Invalid rho"),
        ({"estimator": 3}, TypeError, "Invalid hessian_estimator: found int"),
    ],
)
def test_erroneous_inputs(change, error, message):
    with pytest.raises(error, match=message):
        made(**change)


def test_wrong_estimates_are_refused():
    with pytest.raises(ValueError, match="gave 1 estimates for 2 parameters"):
        train(made(lambda params: params[:1]))
    with pytest.raises(ValueError, match=r"Estimate 1 has shape \(3, 2\)"):
        train(made(lambda params: [params[0], params[0]]))


def test_our_estimators_are_such_functions():
    from yolo_sophia.curvature import GaussNewtonBartlett, Hutchinson, OnBatches, likelihood_of

    net, loss = nn.Linear(4, 3), nn.CrossEntropyLoss()
    batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]
    for estimator in (
        OnBatches(Hutchinson(), net, batches, loss),
        OnBatches(GaussNewtonBartlett(), net, batches, likelihood_of(loss)),
    ):
        optimizer = DecoupledSophia(net.parameters(), estimator, k=1)
        for x, y in batches * 2:
            optimizer.zero_grad()
            loss(net(x), y).backward()
            optimizer.step()
        assert all(optimizer.state[p]["hessian"].any() for p in net.parameters())


@pytest.mark.parametrize("kind", ["DecoupledSophia", "SophiaH"])
def test_equals_an_independent_release_for_given_estimates(kind):
    """pytorch_optimizer's SophiaH clips m / max(h, eps) at p; with h_hat scaled by rho this is the paper's rule too."""
    released = pytest.importorskip("pytorch_optimizer")
    noise = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=noise, dtype=torch.float64) for s in ((3, 2, 2, 2), (4,), ())]
    ours, theirs = ([Parameter(p.clone()) for p in start] for _ in range(2))
    shared = {"lr": 0.03, "betas": (0.9, 0.7), "weight_decay": 0.2, "eps": 1e-2}
    if kind == "SophiaH":
        rho, optimizer = 0.3, SophiaH(ours, rho=0.3, hessian_interval=1000, **shared)
        oracle = released.SophiaH(theirs, p=1.0, update_period=1000, **shared)
    else:
        rho, optimizer = 1.0, DecoupledSophia(ours, lambda params: [], k=1000, rho=0.5, **shared)
        oracle = released.SophiaH(theirs, p=0.5, update_period=1000, **shared)
    clipped = 0
    for step in range(40):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=noise, dtype=torch.float64)
            q.grad = p.grad.clone()
        estimates = None
        if step % 4 == 0:
            estimates = [torch.randn(p.shape, generator=noise, dtype=torch.float64) + 0.2 for p in ours]
            optimizer.update_hessian(estimates)
        optimizer.step()
        oracle.step(hessian=None if estimates is None else [rho * e for e in estimates])
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        h = optimizer.state[ours[0]]["hessian"]
        clipped += int((optimizer.state[ours[0]]["exp_avg"].abs() > h.clamp(min=1e-2)).sum())
    assert 0 < clipped < 40 * ours[0].numel()

"""Hutchinson's estimate, and SophiaH: the trajectory of optax's Sophia, closures of both kinds, plain refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from yolo_sophia import SophiaH
from yolo_sophia.curvature import Hutchinson, hutchinson


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


class Problem:
    """A small net with attention, whose fused form has no second derivative, and a batch for each step."""

    def __init__(self, **settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        self.attention.double(), self.head.double()
        self.params = [*self.attention.parameters(), *self.head.parameters()]
        self.optimizer = SophiaH(
            self.params, **{"lr": 0.05, "hessian_interval": 3, "betas": (0.9, 0.7), "eps": 1e-4, **settings}
        )

    def loss(self, step: int) -> Tensor:
        x, y = torch.randn(5, 6, 4, generator=seeded(step)).double(), torch.randint(3, (5,), generator=seeded(step))
        attended = torch.nn.functional.scaled_dot_product_attention(*[self.attention(x, x, x)[0]] * 3)
        return nn.functional.cross_entropy(self.head(attended.mean(1)), y)

    def closure(self, step: int, backward: bool = True):
        def evaluate() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss(step)
            if backward:
                loss.backward()
            return loss

        return evaluate


def assert_equal(a: Problem, b: Problem) -> None:
    for p, q in zip(a.params, b.params):
        assert torch.equal(p, q)
        torch.testing.assert_close(dict(a.optimizer.state[p]), dict(b.optimizer.state[q]), rtol=0, atol=0)


# The estimate ---------------------------------------------------------------------------------------------------------


def test_a_diagonal_hessian_is_exact_with_one_probe():
    x, unused, linear = Parameter(torch.tensor([1.0, 2.0, -1.0])), Parameter(torch.ones(2)), Parameter(torch.ones(4))
    loss = (x**4).sum() + linear.sum()
    curved, none, flat = Hutchinson()(loss, [x, unused, linear], seeded())
    torch.testing.assert_close(curved, 12 * x.detach() ** 2)
    assert none is None and torch.equal(flat, torch.zeros(4))
    loss.backward()  # the graph is still there, and no .grad was written before
    torch.testing.assert_close(x.grad, 4 * x.detach() ** 3)
    assert [e.tolist() for e in Hutchinson()(linear.sum(), [linear], None)] == [[0.0] * 4]  # no curvature anywhere


def test_samples_are_averaged():
    problem = Problem()
    with hutchinson.twice_differentiable():
        loss = problem.loss(0)
    noise, one_after_the_other = seeded(1), seeded(1)
    together = Hutchinson(4)(loss, problem.params, noise)
    singles = [Hutchinson()(loss, problem.params, one_after_the_other) for _ in range(4)]
    for mean, *parts in zip(together, *singles):
        torch.testing.assert_close(mean, sum(parts) / 4)
    assert torch.equal(noise.get_state(), one_after_the_other.get_state())


@pytest.mark.parametrize("n_samples", [0, 1.5, True])
def test_samples_are_counted(n_samples):
    with pytest.raises(ValueError, match=r"Invalid n_samples: found .*, expected an integer >= 1"):
        SophiaH([Parameter(torch.ones(2))], n_samples=n_samples)


def test_what_cannot_be_differentiated_twice_is_refused():
    p = Parameter(torch.ones(2, 1, 4, 4))
    freed = (p**3).sum()
    freed.backward()
    fused = nn.functional.scaled_dot_product_attention(p, p, p).sum()
    for loss in (freed, fused, torch.ones(()), p**3):
        with pytest.raises(RuntimeError, match=r"differentiates the loss twice.*before backward\(\).*PyTorch says"):
            Hutchinson()(loss, [p], None)


# SophiaH --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 3])
def test_follows_optax(interval, monkeypatch):
    """The signs are optax's; its h moves after the step, and its momentum is bias-corrected: both are allowed for."""
    jax = pytest.importorskip("jax", reason="JAX has no wheel for this platform")
    optax = pytest.importorskip("optax")
    from optax.contrib import sophia

    before = jax.config.jax_enable_x64
    try:
        jax.config.update("jax_enable_x64", True)
        jnp, b1, gamma, eps = jax.numpy, 0.9, 0.2, 1e-3
        a, start = (torch.randn(*n, generator=seeded(1), dtype=torch.float64) for n in ((6, 6), (6,)))
        settings = {"b1": b1, "b2": 0.8, "eps": eps, "gamma": gamma, "weight_decay": 0.1, "update_interval": interval}
        theirs = sophia(0.05, **settings)

        def objective(x):
            return jnp.sum(jnp.log(jnp.cosh(jnp.asarray(a.numpy()) @ x))) + jnp.sum(jnp.cos(x))

        @jax.jit
        def their_step(theta, state):
            signs = optax.tree_utils.tree_random_like(
                jax.random.split(state[0].hessian_fn_state.key)[1], theta, jax.random.rademacher, dtype=jnp.float32
            )
            updates, state = theirs.update(jax.grad(objective)(theta), state, theta, obj_fn=objective)
            return optax.apply_updates(theta, updates), state, signs

        theta = jnp.asarray(start.numpy())
        state, ours, negative = theirs.init(theta), Parameter(start.clone()), 0
        optimizer = SophiaH([ours], lr=0.05, betas=(b1, 0.8), weight_decay=0.1, hessian_interval=100)
        optimizer.update_hessian([torch.zeros_like(ours)])
        for step in range(20):
            theta, state, signs = their_step(theta, state)
            signs = torch.tensor(signs.tolist(), dtype=torch.float64)
            monkeypatch.setattr(hutchinson, "rademacher", lambda *_, signs=signs: signs)
            optimizer.zero_grad()
            loss = torch.cosh(a @ ours).log().sum() + torch.cos(ours).sum()
            loss.backward(retain_graph=True)
            estimate = Hutchinson()(loss, [ours], None)
            correction = 1 - b1 ** (step + 1)
            optimizer.param_groups[0].update(rho=gamma * correction, eps=eps * correction)
            optimizer.step()
            if step % interval == 0:
                optimizer.update_hessian([estimate[0]])
            h = optimizer.state[ours]["hessian"]
            negative += int((h < 0).sum())
            torch.testing.assert_close(ours.detach().tolist(), theta.tolist(), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(h.tolist(), state[0].nu.tolist(), rtol=1e-10, atol=1e-12)
        assert negative  # else the maximum in the denominator was not needed
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("backward", [True, False], ids=["closure-with-backward", "closure-without"])
def test_closures_and_refreshing_by_hand_are_one(backward):
    by_closure, by_hand = Problem(), Problem()
    for step in range(7):
        if not backward:
            by_closure.closure(step)()
            grads = [p.grad for p in by_closure.params]
        due = by_closure.optimizer.refresh_due

        def closure(step=step, grads=None if backward else grads):
            loss = by_closure.closure(step, backward)()
            for p, g in zip(by_closure.params, grads or []):
                p.grad = g
            return loss

        loss = by_closure.optimizer.step(closure)
        assert due == by_hand.optimizer.refresh_due == (step % 3 == 0)
        with hutchinson.twice_differentiable():
            same = by_hand.loss(step)
        if by_hand.optimizer.refresh_due:
            by_hand.optimizer.refresh(same)
        by_hand.optimizer.zero_grad()
        same.backward()
        by_hand.optimizer.step()
        torch.testing.assert_close(loss, same)
    for p, q in zip(by_closure.params, by_hand.params):
        torch.testing.assert_close(p, q)
        for key, value in by_closure.optimizer.state[p].items():
            torch.testing.assert_close(value, by_hand.optimizer.state[q][key], msg=key)


def test_gradients_of_a_closure_are_the_ordinary_ones():
    problem = Problem(lr=0.0)
    problem.optimizer.step(problem.closure(0))
    found = [p.grad for p in problem.params]
    with hutchinson.twice_differentiable():
        problem.closure(0)()
    for g, p in zip(found, problem.params):
        assert torch.equal(g, p.grad) and g.grad_fn is None


@pytest.mark.parametrize("done", [0, 2, 5])
def test_a_resumed_run_continues_bit_for_bit(done):
    problem, resumed = Problem(n_samples=2, seed=4), Problem(n_samples=1)
    for step in range(done):
        problem.optimizer.step(problem.closure(step))
    for p, q in zip(resumed.params, problem.params):
        p.data.copy_(q)
    resumed.optimizer.load_state_dict(copy.deepcopy(problem.optimizer.state_dict()))
    states = torch.get_rng_state()
    for step in range(done, 8):
        for o in (problem, resumed):
            o.optimizer.step(o.closure(step))
    assert_equal(problem, resumed)
    assert torch.equal(states, torch.get_rng_state())


def test_without_a_loss_it_says_so():
    problem = Problem()
    before = copy.deepcopy(problem.optimizer.state_dict())
    for closure in (None, lambda: None):
        with pytest.raises(RuntimeError, match=r"needs the loss to update h, found none.*step\(closure\)"):
            problem.optimizer.step(closure)
    assert problem.optimizer.state_dict() == before
    problem.optimizer.update_hessian([None for _ in problem.params])  # from elsewhere
    for _ in range(3):
        problem.optimizer.step()
    with pytest.raises(RuntimeError, match="needs the loss"):
        problem.optimizer.step()

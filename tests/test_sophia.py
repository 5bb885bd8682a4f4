"""SophiaG alone: the official release's numbers, the paper's algorithm, its refusals, and life as a torch optimizer.

`train` feeds gradients that depend on nothing but the number of the step, so that two optimizers which are asked for
the same steps see the same run, and the continuation of a saved one can be compared bit for bit.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import sophia_opt
import torch
from reference import official_parity, relative_difference, sophia
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from yolo_sophia.optim import DecoupledSophia, SophiaG, SophiaH
from yolo_sophia.optim._state import MATURE

STEP = {"grad": {"bs": 12}, "estimates": {}}  # what step() takes after an update_hessian() of that kind
EVERY = 3  # steps per Hessian update

both_implementations = pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
both_sources = pytest.mark.parametrize("source", list(STEP))


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters of the given shapes, the same ones at every call."""
    noise = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(s, generator=noise, dtype=torch.float64).to(dtype)) for s in shapes or ((4, 3), (5,))]


def held(optimizer: Optimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def copies(optimizer: Optimizer) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in held(optimizer)]


def drawn(p: Tensor, step: int, index: int = 0) -> Tensor:
    """The gradient of parameter `index` in a step; -1 - step means the sampled one of the Hessian update before it."""
    noise = torch.Generator().manual_seed(1000 * (step + 500) + index)
    return 3 * torch.randn(p.shape, generator=noise, dtype=torch.float64).to(p.dtype)


def update_hessian(optimizer: Optimizer, sampled: list[Tensor | None], source: str) -> None:
    """Hand over the sampled gradients in `.grad`, or their squares as estimates."""
    if source == "estimates":
        return optimizer.update_hessian(None if g is None else g.square() for g in sampled)
    for p, g in zip(held(optimizer), sampled):
        p.grad = g
    return optimizer.update_hessian()


def train(optimizer: Optimizer, steps: range, source: str = "estimates") -> None:
    """Run these steps, with a Hessian update before every third; frozen parameters get no gradient."""
    for step in steps:
        for number in (-1 - step, step) if step % EVERY == 0 else (step,):
            grads = [drawn(p, number, i) if p.requires_grad else None for i, p in enumerate(held(optimizer))]
            if number < 0:
                update_hessian(optimizer, grads, source)
        for p, g in zip(held(optimizer), grads):
            p.grad = g
        optimizer.step(**STEP[source])


def assert_equal(found: Optimizer, expected: Optimizer, tolerance: float | None = 0.0) -> None:
    """Assert that parameters and states agree bit for bit, within a tolerance, or (None) within the dtype's."""
    options = {"rtol": tolerance, "atol": tolerance, "check_stride": False}
    assert len(held(found)) == len(held(expected)) > 0
    for p, q in zip(held(found), held(expected)):
        torch.testing.assert_close(p, q, **options)
        torch.testing.assert_close(dict(found.state.get(p, {})), dict(expected.state.get(q, {})), **options)


def assert_follows_the_paper(optimizer: SophiaG, index: int, start: Tensor, steps: range, scale: float = 1, **settings):
    """Assert that a float64 parameter is where `reference.sophia` gets from `start`; h_hat = scale * g_hat^2."""
    p = held(optimizer)[index]
    estimates = {k - steps[0]: scale * drawn(p, -1 - k, index).square() for k in steps if k % EVERY == 0}
    theta, m, h = sophia(start, [drawn(p, k, index) for k in steps], estimates, **settings)
    assert relative_difference(p.detach(), theta) < 1e-14
    assert relative_difference(optimizer.state[p]["exp_avg"], m) < 1e-14
    assert relative_difference(optimizer.state[p]["hessian"] * scale, h) < 1e-14
    assert optimizer.state[p]["step"] == len(steps) and optimizer.state[p]["hessian_updates"] == len(estimates)


# The numbers


@pytest.mark.parametrize("foreach", [None, False, True], ids=["default", "single", "foreach"])
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_equals_the_official_release(dtype, bound, maximize, foreach):
    assert official_parity(dtype, foreach=foreach, maximize=maximize) <= bound


@both_implementations
@both_sources
@pytest.mark.parametrize("bias_correction", [False, True], ids=["plain", "corrected"])
def test_equals_the_paper(source, bias_correction, foreach):
    settings = {"lr": 0.02, "betas": (0.9, 0.8), "rho": 0.1, "weight_decay": 0.3, "eps": 1e-3}
    settings["bias_correction"] = bias_correction
    optimizer = SophiaG(parameters(dtype=torch.float64), foreach=foreach, **settings)
    start = copies(optimizer)
    train(optimizer, range(40), source)
    for i, p in enumerate(start):  # the scale is algorithm 2's: h_hat = B * g_hat * g_hat
        assert_follows_the_paper(optimizer, i, p.detach(), range(40), STEP[source].get("bs", 1), **settings)


def test_implementations_agree_on_mixed_tensors():
    def run(foreach: bool) -> SophiaG:
        dtypes, shapes = (torch.float32, torch.float64, torch.bfloat16), ((4, 3), (), (0, 3), (2, 3, 2, 2), (7,))
        params = [p for trio in zip(*(parameters(*shapes, dtype=d) for d in dtypes)) for p in trio]
        optimizer = SophiaG(params, lr=0.01, bias_correction=True, foreach=foreach)
        for turn in range(3):  # unequal numbers of Hessian updates, so that every dtype has its own bias correction
            optimizer.update_hessian([p.detach().square() if i % 3 >= turn else None for i, p in enumerate(params)])
        train(optimizer, range(12))
        return optimizer

    assert_equal(run(foreach=True), run(foreach=False), tolerance=None)


@both_implementations
def test_a_badly_scaled_quadratic_looks_round(foreach):
    curvature = torch.logspace(-4, 4, 9, dtype=torch.float64)
    x = Parameter(torch.ones(9, dtype=torch.float64))
    optimizer = SophiaG([x], 0.2, (0.5, 0.9), rho=1.0, weight_decay=0.0, bias_correction=True, foreach=foreach)
    for _ in range(100):
        optimizer.update_hessian([curvature])
        x.grad = curvature * x.detach()
        optimizer.step()
    assert x.abs().max() < 1e-6
    torch.testing.assert_close(x.detach(), x[:1].detach().expand(9), rtol=1e-6, atol=0)  # all at the same pace


@both_implementations
@both_sources
def test_zero_gradients_only_decay(source, foreach):
    (p,) = parameters((5,), dtype=torch.float64)
    start, p.grad = p.detach().clone(), torch.zeros_like(p)
    optimizer = SophiaG([p], lr=0.1, weight_decay=0.5, foreach=foreach)
    optimizer.step()
    for value in (0, 1, 0):
        update_hessian(optimizer, [torch.full_like(p, value)], source)
        p.grad = torch.zeros_like(p)
        optimizer.step(**STEP[source])
    torch.testing.assert_close(optimizer.state[p]["hessian"], torch.full_like(start, 0.99 * 0.01))
    torch.testing.assert_close(p.detach(), start * 0.95**4)


@both_implementations
@both_sources
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 20.0])
def test_half_precision_stays_finite(dtype, size, source, foreach):
    (p,) = parameters((50,), dtype=dtype)
    start = p.detach().clone()
    optimizer = SophiaG([p], lr=0.01, weight_decay=0.0, foreach=foreach)
    for step in range(20):
        if step % EVERY == 0:
            update_hessian(optimizer, [size * drawn(p, -1 - step)], source)
        p.grad = size * drawn(p, step)
        optimizer.step(**STEP[source])
        assert p.isfinite().all() and all(optimizer.state[p][key].isfinite().all() for key in ("exp_avg", "hessian"))
    assert torch.equal(p, start) == (size == 0)
    assert (p - start).abs().max() < 2 * 20 * 0.01  # 2: rounding


@both_implementations
@both_sources
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1, 1)], ids=str)
def test_degenerate_shapes(shape, source, foreach):
    params = parameters(shape, (2,))
    start = params[0].detach().clone()
    optimizer = SophiaG(params, lr=0.02, foreach=foreach)
    train(optimizer, range(5), source)
    assert params[0].shape == optimizer.state[params[0]]["hessian"].shape == shape
    assert start.numel() == 0 or not torch.equal(params[0], start)


@both_implementations
@both_sources
@pytest.mark.parametrize("grads_alike", [True, False], ids=["same-layout", "contiguous-grad"])
@pytest.mark.parametrize(
    ("shape", "arrange"),
    [
        ((2, 3, 4, 5), lambda t: t.contiguous(memory_format=torch.channels_last)),
        ((6, 4), lambda t: t.t().contiguous().t()),
        ((6, 4), lambda t: t.repeat_interleave(2, dim=1)[:, ::2]),
    ],
    ids=["channels_last", "transposed", "strided"],
)
def test_memory_layout_does_not_matter(shape, arrange, grads_alike, source, foreach):
    (plain,) = parameters(shape)
    arranged = Parameter(arrange(plain.detach()))
    assert arranged.stride() != plain.stride()
    optimizer, expected = (SophiaG([p], lr=0.02, rho=0.1, foreach=foreach) for p in (arranged, plain))
    train(expected, range(8), source)
    layout = arrange if grads_alike else torch.clone
    for step in range(8):
        if step % EVERY == 0:
            update_hessian(optimizer, [layout(drawn(plain, -1 - step))], source)
        arranged.grad = layout(drawn(plain, step))
        optimizer.step(**STEP[source])
    assert_equal(optimizer, expected)


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1e-3}, r"Invalid lr: found -0\.001, expected a number >= 0"),
        ({"lr": float("nan")}, "Invalid lr"),
        ({"betas": (-0.1, 0.9)}, r"Invalid betas: found \(-0\.1, 0\.9\), expected two numbers in \[0, 1\)"),
        ({"betas": (1.0, 0.9)}, "Invalid betas"),
        ({"betas": (0.9, 1.0)}, "Invalid betas"),
        ({"betas": (0.9, -0.1)}, "Invalid betas"),
        ({"betas": (0.9,)}, "Invalid betas"),
        ({"betas": 0.9}, "Invalid betas"),
        ({"rho": 0.0}, r"Invalid rho: found 0\.0, expected a number > 0"),
        ({"rho": -0.04}, "Invalid rho"),
        ({"weight_decay": -0.1}, r"Invalid weight_decay: found -0\.1, expected a number >= 0"),
        ({"eps": 0.0}, r"Invalid eps: found 0\.0, expected a number > 0"),
        ({"eps": -1e-15}, "Invalid eps"),
        ({"params": [Parameter(torch.zeros(2, dtype=torch.complex64))]}, r"complex.*found one of torch\.complex64.*2,"),
        ({"rho": None}, "not supported between"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_erroneous_inputs(change, message):
    error = TypeError if None in change.values() else ValueError
    with pytest.raises(error, match=message):
        SophiaG(**{"params": parameters(), **change})
    optimizer = SophiaG(parameters())
    groups = list(optimizer.param_groups)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": parameters(), **change})
    assert optimizer.param_groups == groups


@both_sources
def test_kinds_of_estimate_do_not_mix(source):
    optimizer = SophiaG(parameters())
    train(optimizer, range(2), source)
    before, other = copy.deepcopy(optimizer), "estimates" if source == "grad" else "grad"
    with pytest.raises(ValueError, match=r"step\(\) needs bs" if source == "grad" else "drop bs"):
        optimizer.step(**STEP[other])
    with pytest.raises(RuntimeError, match=f"was made from '{source}' and is now updated from '{other}'"):
        update_hessian(optimizer, [torch.ones_like(p) for p in held(optimizer)], other)
    assert_equal(optimizer, before)


@pytest.mark.parametrize("bs", [0, -1, float("nan")])
def test_bs_must_be_positive(bs):
    with pytest.raises(ValueError, match=f"bs must be positive, found {bs}"):
        SophiaG(parameters()).step(bs=bs)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "got 0 estimates for 2 parameters"),
        ([(4, 3)], "got 1 estimates for 2 parameters"),
        ([(4, 3), (5,), (5,)], "got 3 estimates for 2 parameters"),
        ([(4, 3), (1,)], r"Estimate 1 has shape \(1,\), its parameter has \(5,\)"),
        ([(3, 4), (5,)], r"Estimate 0 has shape \(3, 4\), its parameter has \(4, 3\)"),
    ],
)
def test_wrong_estimates_change_nothing(shapes, message):
    optimizer = SophiaG(parameters())
    train(optimizer, range(2))
    before = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.update_hessian([torch.ones(shape) for shape in shapes])
    assert_equal(optimizer, before)


def test_update_hessian_needs_gradients():
    optimizer = SophiaG(parameters())
    with pytest.raises(RuntimeError, match=r"found no \.grad"):
        optimizer.update_hessian()
    train(optimizer, range(2), "estimates")  # the failed call has not decided for the other kind


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    start, optimizer = embedding.weight.detach().clone(), SophiaG(embedding.parameters())
    embedding(torch.tensor([1, 3])).sum().backward()
    for method in ("step", "update_hessian"):
        with pytest.raises(RuntimeError, match=rf"SophiaG\.{method}\(\) found a sparse gradient"):
            getattr(optimizer, method)()
    assert not optimizer.state and torch.equal(embedding.weight, start)


# As a torch optimizer


@both_sources
def test_closure(source):
    optimizer, plain = (SophiaG(parameters((6,)), lr=0.1) for _ in range(2))
    losses = []

    def evaluate(optimizer: SophiaG) -> Tensor:
        optimizer.zero_grad()
        losses.append(held(optimizer)[0].pow(4).sum())
        losses[-1].backward()  # fails unless gradients are enabled
        return losses[-1]

    for o in (optimizer, plain):
        train(o, range(1), source)
    assert optimizer.step(lambda: evaluate(optimizer), **STEP[source]) is losses[0]
    assert len(losses) == 1
    evaluate(plain)
    assert plain.step(**STEP[source]) is None
    assert_equal(optimizer, plain)


@pytest.mark.parametrize(
    "schedule",
    [lambda o: LambdaLR(o, lambda k: 0.5**k), lambda o: OneCycleLR(o, 0.3, total_steps=9, cycle_momentum=False)],
    ids=["LambdaLR", "OneCycleLR"],
)
def test_learning_rate_schedules(schedule):
    x = Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = SophiaG([x], lr=0.1, weight_decay=0.0)
    scheduler, rates = schedule(optimizer), []
    for _ in range(8):
        before, x.grad = x.detach().clone(), torch.ones_like(x)
        rates += scheduler.get_last_lr()
        optimizer.step()  # h is 0: every coordinate moves by lr
        torch.testing.assert_close(before - x.detach(), torch.full_like(before, rates[-1]))
        scheduler.step()
    assert len(set(rates)) == 8


def through_state_dict(optimizer: SophiaG) -> SophiaG:
    fresh = SophiaG(copies(optimizer))
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # load_state_dict itself shares the tensors
    return fresh


def through_a_file(optimizer: SophiaG) -> SophiaG:
    torch.save(optimizer.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    fresh = SophiaG(copies(optimizer))
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


def through_pickle(optimizer: SophiaG) -> SophiaG:
    return pickle.loads(pickle.dumps(optimizer))


@both_implementations
@both_sources
@pytest.mark.parametrize("copied", [through_state_dict, through_a_file, copy.deepcopy, through_pickle])
@pytest.mark.parametrize("done", [0, 7], ids=["at-the-start", "midway"])
def test_a_copy_continues_bit_for_bit(copied, done, source, foreach):
    settings = {"lr": 0.03, "betas": (0.8, 0.7), "rho": 0.2, "eps": 1e-4, "maximize": True, "bias_correction": True}
    optimizer = SophiaG(parameters(), foreach=foreach, **settings)
    train(optimizer, range(done), source)
    other = copied(optimizer)
    train(other, range(done, 16), source)
    train(optimizer, range(done, 16), source)  # second: it would see what the copy did to shared tensors
    assert_equal(other, optimizer)
    for key in (*settings, "foreach", "weight_decay"):
        assert other.param_groups[0][key] == optimizer.param_groups[0][key], key
    with pytest.raises(ValueError, match="bs"):  # the kind of h is remembered
        other.step(**STEP["estimates" if source == "grad" else "grad"])


@pytest.mark.parametrize("steps", [range(7), range(1, EVERY)], ids=["after-an-update", "before-any-update"])
def test_loads_the_state_of_the_official_release(steps):
    official = sophia_opt.SophiaG(parameters(), lr=0.03, betas=(0.9, 0.8), rho=0.2, weight_decay=0.01)
    train(official, steps, "grad")
    optimizer = SophiaG(copies(official), lr=1.0, rho=1.0)
    optimizer.load_state_dict(copy.deepcopy(official.state_dict()))
    if steps.start == 0:
        with pytest.raises(ValueError, match="needs bs"):
            optimizer.step()
    else:
        copy.deepcopy(optimizer).update_hessian([torch.ones_like(p) for p in held(optimizer)])  # h is not decided yet
    for o in (official, optimizer):
        train(o, range(steps.stop, 16), "grad")
    for state in optimizer.state.values():  # the official release does not count: a loaded h is mature
        counted = sum(k % EVERY == 0 for k in range(steps.stop, 16))
        assert state.pop("hessian_updates") == counted + (MATURE if steps.start == 0 else 0)
    assert_equal(optimizer, official, tolerance=1e-6)


@both_sources
def test_groups_can_be_added_later(source):
    early, late = parameters((4, 3), (5,))
    optimizer, alone = SophiaG([early], lr=0.01), SophiaG(parameters((4, 3)), lr=0.01)
    train(optimizer, range(4), source)
    optimizer.add_param_group({"params": [late], "lr": 0.2})
    train(optimizer, range(4, 16), source)
    train(alone, range(16), source)
    assert torch.equal(early, *held(alone))
    assert optimizer.state[late]["step"] == 12 and optimizer.state[late]["hessian_updates"] == 4
    assert optimizer.state[late]["hessian"].all()


COUNTERS = {
    "replaced": lambda optimizer, state: state.update(step=torch.tensor(5.0)),
    "moved": lambda optimizer, state: setattr(state["step"], "data", torch.tensor(5.0)),
    "shape of the official release": lambda optimizer, state: state.update(step=torch.tensor([5.0])),
    "one parameter less": lambda optimizer, state: setattr(held(optimizer)[1], "grad", None),
}


@pytest.mark.parametrize("change", COUNTERS)
def test_steps_are_counted_whatever_becomes_of_their_tensors(change):
    optimizer = SophiaG(parameters())
    twin = SophiaG(copies(optimizer))
    a, b = held(optimizer)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    for _ in range(2):
        optimizer.step()
    twin.load_state_dict(optimizer.state_dict())
    for p in held(twin):
        p.grad = torch.ones_like(p)
    twin.step()
    clone = copy.deepcopy(optimizer)
    COUNTERS[change](optimizer, optimizer.state[a])
    for _ in range(2):
        optimizer.step()
    counted = [optimizer.state[p]["step"].item() for p in (a, b)]
    assert counted == {"one parameter less": [4.0, 2.0]}.get(change, [7.0, 4.0])
    for other, steps in ((clone, 2), (twin, 3)):
        assert [other.state[p]["step"].item() for p in held(other)] == [steps, steps], "of its own"


@both_implementations
def test_frozen_and_late_parameters(foreach):
    settings = {"lr": 0.02, "rho": 0.1}
    frozen, late, always = parameters((3,), (4,), (5,), dtype=torch.float64)
    optimizer = SophiaG([frozen, late, always], foreach=foreach, **settings)
    start = [p.detach() for p in copies(optimizer)]
    frozen.requires_grad_(False)
    late.requires_grad_(False)
    train(optimizer, range(7))
    assert optimizer.state.keys() == {always} and torch.equal(late, start[1])
    late.requires_grad_(True)
    train(optimizer, range(7, 16))
    assert optimizer.state.keys() == {late, always} and torch.equal(frozen, start[0])
    assert_follows_the_paper(optimizer, 1, start[1], range(7, 16), **settings)
    assert_follows_the_paper(optimizer, 2, start[2], range(16), **settings)


@both_implementations
@both_sources
def test_gradient_scaler(source, foreach):
    def run(scaler: torch.amp.GradScaler, factors: tuple[float, ...]) -> SophiaG:
        (p,) = parameters((6,))
        optimizer = SophiaG([p], lr=0.02, rho=0.1, foreach=foreach)
        train(optimizer, range(1), source)
        for factor in factors:
            optimizer.zero_grad()
            scaler.scale((p * drawn(p, 1) * factor).sum()).backward()
            scaler.step(optimizer, **STEP[source])
            scaler.update()
        return optimizer

    scaled = run(torch.amp.GradScaler("cpu", init_scale=2.0**10), (1.0, float("inf"), 2.0, float("inf"), 3.0))
    assert_equal(scaled, run(torch.amp.GradScaler("cpu", enabled=False), (1.0, 2.0, 3.0)))  # infinite ones left out


def test_refuses_the_state_of_another_optimizer_and_stays_as_it_was():
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    other = torch.optim.AdamW([p])
    other.step()
    optimizer = SophiaG([p], rho=0.5)
    with pytest.raises(ValueError, match=r"not SophiaG's.*exp_avg_sq"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["rho"] == 0.5
    optimizer.step()


def test_a_closure_that_updates_h_needs_bs_too():
    p = Parameter(torch.ones(3))
    optimizer = SophiaG([p])

    def closure():
        p.grad = torch.ones(3)
        optimizer.update_hessian()
        return p.sum()

    with pytest.raises(ValueError, match="needs bs"):
        optimizer.step(closure)


@both_sources
@pytest.mark.parametrize(("average", "kept"), [("kernel", 2), ("row", 1)])
def test_estimates_are_averaged_over_kernels_or_rows(average, kept, source):
    shapes = [(4, 3, 3, 2), (4, 3), (5,), ()]
    optimizer, plain = (SophiaG(parameters(*shapes), hessian_average=a) for a in (average, None))
    for turn in range(2):
        sampled = [drawn(p, -1 - turn, i) for i, p in enumerate(held(optimizer))]
        means = [g.square().flatten(kept).mean(-1) if g.dim() > kept else g.square() for g in sampled]
        expected = [m.reshape(m.shape + (1,) * (g.dim() - m.dim())).expand_as(g) for m, g in zip(means, sampled)]
        update_hessian(optimizer, sampled, source)
        plain.update_hessian(expected)
    for p, q in zip(held(optimizer), held(plain)):
        torch.testing.assert_close(optimizer.state[p]["hessian"], plain.state[q]["hessian"])
    with pytest.raises(ValueError, match=r"Invalid hessian_average: found 'colum', expected None or .*'kernel'"):
        SophiaG(parameters(), hessian_average="colum")


# Curvature that never comes


def silent(optimizer: Optimizer, steps: int) -> int:
    """The number of warnings in some steps without a Hessian update."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            for p in held(optimizer):
                p.grad = torch.ones_like(p)
            optimizer.step()
    return sum("h was never updated" in str(warning.message) for warning in found)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SophiaG(p),
        lambda p: SophiaH(p, hessian_interval=None),
        lambda p: DecoupledSophia(p, lambda params: [None for _ in params]),
    ],
    ids=["SophiaG", "SophiaH", "DecoupledSophia"],
)
def test_an_h_that_is_never_updated_is_warned_of_once(make):
    optimizer = make(parameters())
    assert silent(optimizer, 30) == 1 and silent(optimizer, 30) == 0
    assert silent(make(parameters()), 30) == 1  # each optimizer by itself


@pytest.mark.parametrize("copied", [through_state_dict, copy.deepcopy, through_pickle])
def test_an_h_of_a_run_before_or_a_learning_rate_of_0_is_no_reason_to_warn(copied):
    optimizer = SophiaG(parameters())
    train(optimizer, range(3))
    assert silent(optimizer, 30) == silent(copied(optimizer), 30) == 0
    still = SophiaG(parameters(), lr=0.0)
    assert silent(still, 30) == 0
    still.param_groups[0]["lr"] = 0.1
    assert silent(still, 30) == 1


# States of others


@pytest.mark.parametrize("rho", [0.5, "auto"])
def test_a_state_of_the_official_release_keeps_the_settings_passed_here(rho):
    official = sophia_opt.SophiaG(parameters(), lr=0.03, rho=0.2)
    train(official, range(7), "grad")
    settings = {"bias_correction": True, "cautious": True, "hessian_average": "row", "clip_fraction": None}
    optimizer = SophiaG(copies(official), rho=rho, **settings)
    expected = {key: optimizer.param_groups[0][key] for key in settings}
    optimizer.load_state_dict(copy.deepcopy(official.state_dict()))
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in settings} == expected
    assert (group["lr"], group["rho"]) == (0.03, 0.2)  # what the checkpoint has
    train(optimizer, range(7, 9), "grad")
    assert (group["rho"] != 0.2) == (rho == "auto")


def test_a_loaded_h_of_the_official_release_is_mature():
    official = sophia_opt.SophiaG(parameters(), lr=0.03, betas=(0.9, 0.8), rho=0.2)
    train(official, range(7), "grad")
    optimizer = SophiaG(copies(official), bias_correction=True)
    optimizer.load_state_dict(copy.deepcopy(official.state_dict()))
    for o in (official, optimizer):
        train(o, range(7, 16), "grad")
    for p, q in zip(held(optimizer), held(official)):
        torch.testing.assert_close(p, q)


def test_hooks_convert_a_state_before_it_is_validated():
    source, optimizer = SophiaG(parameters()), SophiaG(parameters(), lr=0.5)
    train(source, range(4))
    foreign = copy.deepcopy(source.state_dict())
    for state in foreign["state"].values():
        state["curvature"] = state.pop("hessian")

    def convert(_, given):
        states = {
            i: {("hessian" if k == "curvature" else k): v for k, v in s.items()} for i, s in given["state"].items()
        }
        return {**given, "state": states}

    with pytest.raises(ValueError, match="not SophiaG's"):
        optimizer.load_state_dict(foreign)
    optimizer.register_load_state_dict_pre_hook(convert)
    optimizer.load_state_dict(foreign)
    for p, q in zip(held(optimizer), held(source)):
        assert torch.equal(optimizer.state[p]["hessian"], source.state[q]["hessian"])

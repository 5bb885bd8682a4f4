"""rho="auto": the clipped fraction holds its target, rho does not depend on scales, and is never moved by nonsense."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from yolo_sophia.optim import DecoupledSophia, SophiaG, SophiaH
from yolo_sophia.optim._auto_rho import SAMPLE, SMOOTHING, _stride, clip_quantile, smoothed

EVERY = 5


def make(clip_fraction: float | None = 0.3, kind: type = SophiaG, **options) -> SophiaG:
    noise = torch.Generator().manual_seed(3)
    params = [Parameter(torch.randn(shape, generator=noise)) for shape in [(40, 20, 3, 3), (40,), (30, 40)]]
    return kind(params, lr=1e-3, rho="auto", clip_fraction=clip_fraction, **options)


def train(optimizer: SophiaG, steps: range, scale: float = 1.0) -> list[float]:
    """Random gradients and estimates of the given scale; returns the clipped share, |update| = lr, of each step."""
    shares = []
    params = optimizer.param_groups[0]["params"]
    for step in steps:
        noise = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = scale * torch.randn(p.shape, generator=noise)
        if step % EVERY == 0:
            optimizer.update_hessian([scale * torch.rand(p.shape, generator=noise) for p in params])
        before = [p.detach().clone() for p in params]
        optimizer.step()
        lr, decay = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]
        moved = torch.cat([((1 - lr * decay) * b - p.detach()).flatten() / lr for b, p in zip(before, params)])
        shares.append(float((moved.abs() > 0.999).float().mean()))
    return shares


@pytest.mark.parametrize("power", [1, 0.5])
@pytest.mark.parametrize("clip_fraction", [0.1, 0.6, 0.95])
def test_the_first_measurement_is_exact_and_later_ones_hold_the_target(clip_fraction, power):
    optimizer = make(clip_fraction, bias_correction=True, hessian_power=power)
    shares = train(optimizer, range(100))
    assert shares[0] == pytest.approx(clip_fraction, abs=0.01)  # before the average has any memory
    assert sum(shares[-50:]) / 50 == pytest.approx(clip_fraction, abs=0.04)
    assert optimizer.param_groups[0]["rho_measurements"] == 100 / EVERY


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_steps_do_not_depend_on_the_scale_of_the_loss(scale):
    plain, scaled = make(), make()
    train(plain, range(12))
    train(scaled, range(12), scale)
    for p, q in zip(plain.param_groups[0]["params"], scaled.param_groups[0]["params"]):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


def test_rho_is_the_running_mean_of_the_logarithms_and_then_forgets():
    rho = 123.0  # not among the measurements, so it has no weight
    for n, q in enumerate([1.0, 4.0, 16.0]):
        rho = smoothed(rho, n, q)
    assert rho == pytest.approx(4.0)
    assert smoothed(1.0, 1000, math.e) == pytest.approx(math.exp(SMOOTHING))


def test_a_constant_target_is_approached_without_overshoot():
    rhos = [100.0]
    for n in range(10, 60):
        rhos.append(smoothed(rhos[-1], n, 2.0))
    assert all(a > b >= 2.0 for a, b in itertools.pairwise(rhos))


def quantile(g: Tensor, m: Tensor, h: Tensor, fraction: float = 0.5) -> float | None:
    return clip_quantile([g], [m], [h], [1.0], [0.9], fraction)


def test_what_gives_no_quantile_leaves_rho_alone():
    one, zero = torch.ones(100), torch.zeros(100)
    assert quantile(one, one, 2 * one) == pytest.approx(0.5)
    assert quantile(zero, zero, one) is None  # nothing moves
    assert quantile(one, one, zero) is None  # everything is clipped, whatever rho is
    assert quantile(one, one, -one) is None
    assert quantile(torch.full((100,), torch.nan), one, one) is None
    some = one.clone()
    some[0] = torch.nan
    assert quantile(some, one, one) is None
    optimizer = make()
    train(optimizer, range(3))
    before = optimizer.param_groups[0]["rho"]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
        optimizer.state[p]["exp_avg"].zero_()
    optimizer.update_hessian([torch.ones_like(p) for p in optimizer.param_groups[0]["params"]])
    optimizer.step()
    assert optimizer.param_groups[0]["rho"] == before


def test_the_sample_has_every_place_of_a_kernel_and_the_right_size():
    for coordinates in (10, SAMPLE - 1, 3 * SAMPLE, 3_157_200, 68_000_000):
        stride = _stride(coordinates)
        assert stride == 1 or math.gcd(stride, 9) == 1
        assert coordinates / stride <= 1.05 * SAMPLE
        assert stride <= 1.05 * coordinates / SAMPLE + 3


def test_a_sample_of_many_coordinates_is_near_their_quantile():
    noise = torch.Generator().manual_seed(0)
    tensors = [torch.rand(500, 100, 3, 3, generator=noise) for _ in range(2)]
    found = clip_quantile(tensors, tensors, [torch.ones_like(t) for t in tensors], [1.0] * 2, [0.9] * 2, 0.25)
    assert found == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("stride", [1, 5])
def test_the_quantile_is_that_of_all_tensors_with_their_own_factors_and_betas(stride, monkeypatch):
    monkeypatch.setattr("yolo_sophia.optim._auto_rho._stride", lambda _: stride)
    monkeypatch.setattr("yolo_sophia.optim._auto_rho.SPARSE", 10)
    noise, kinds = torch.Generator().manual_seed(0), [(7, 2.0, 0.9), (300, 1.0, 0.5), (1, 3.0, 0.9), (450, 0.5, 0.8)]
    g, m = ([torch.randn(n, 2, generator=noise) for n, _, _ in kinds] for _ in range(2))
    h = [torch.rand(n, 2, generator=noise) + 0.01 for n, _, _ in kinds]
    ratios = [(b * y + (1 - b) * x).abs() / (f * z) for x, y, z, (_, f, b) in zip(g, m, h, kinds)]
    ratio = torch.cat([r.flatten() for r in ratios])[::stride]
    expected = ratio.sort().values[int(0.7 * ratio.numel())]
    found = clip_quantile(g, m, h, [f for _, f, _ in kinds], [b for _, _, b in kinds], 0.3)
    assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_a_resumed_run_goes_on_with_its_rho(kind):
    options = {"hessian_interval": 10**6} if kind is SophiaH else {}
    whole, first = make(kind=kind, **options), make(kind=kind, **options)
    train(whole, range(23))
    train(first, range(11))
    rest = make(kind=kind, **options)
    with torch.no_grad():
        for p, q in zip(rest.param_groups[0]["params"], first.param_groups[0]["params"]):
            p.copy_(q)
    rest.load_state_dict(copy.deepcopy(first.state_dict()))
    train(rest, range(11, 23))
    assert rest.param_groups[0]["rho"] == whole.param_groups[0]["rho"] != 1.0
    for p, q in zip(rest.param_groups[0]["params"], whole.param_groups[0]["params"]):
        assert torch.equal(p, q)


def test_groups_of_one_fraction_share_one_rho_and_fixed_groups_keep_theirs():
    params = [Parameter(torch.ones(50)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:2]}, {"params": params[2:], "rho": 0.5}]
    optimizer = SophiaG(groups, rho="auto")
    for i, p in enumerate(params):
        p.grad = torch.randn(50, generator=torch.Generator().manual_seed(i))
    optimizer.update_hessian([torch.ones(50)] * 3)
    optimizer.step()
    first, second, fixed = (group["rho"] for group in optimizer.param_groups)
    assert first == second != 1.0
    assert fixed == 0.5


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda p: SophiaG([p], rho="automatic"), "Invalid rho: found 'automatic', expected a number > 0, or \"auto\""),
        (
            lambda p: SophiaG([p], rho="auto", clip_fraction=1.0),
            r"Invalid clip_fraction: found 1.0, expected a number in",
        ),
        (lambda p: SophiaG([p], rho=0.1, clip_fraction=0.5), "Invalid clip_fraction: found 0.5, expected None, as rho"),
        (lambda p: DecoupledSophia([p], lambda x: [], rho="auto"), "Invalid rho: found 'auto', expected a number > 0"),
    ],
)
def test_refusals(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it(Parameter(torch.ones(2)))


@pytest.mark.parametrize("maximize", [False, True])
def test_the_share_holds_whatever_the_sign(maximize):
    p = Parameter(torch.zeros(20000))
    optimizer = SophiaG([p], lr=0.0, rho="auto", clip_fraction=0.5, betas=(0.9, 0.9), maximize=maximize)
    noise = torch.Generator().manual_seed(0)
    for _ in range(8):
        g = torch.randn(20000, generator=noise) + 1
        p.grad = -g if maximize else g
        optimizer.update_hessian([torch.rand(20000, generator=noise) + 0.1])
        optimizer.step()
    assert clipped(optimizer, p) == pytest.approx(0.5, abs=0.02)


def clipped(optimizer: SophiaG, p: Parameter, chosen: slice | Tensor = slice(None)) -> float:
    """The share of some coordinates that the last step clipped."""
    state, rho = optimizer.state[p], optimizer.param_groups[0]["rho"]
    return float((state["exp_avg"].abs() >= rho * state["hessian"])[chosen].float().mean())


@pytest.mark.parametrize("signal", [0.0, 1.0, 100.0], ids=["noise", "both", "signal"])
@pytest.mark.parametrize("clip_fraction", [0.3, 0.6])
def test_the_share_holds_while_the_momentum_is_young(signal, clip_fraction):
    noise = torch.Generator().manual_seed(0)
    p, slope = Parameter(torch.zeros(20000)), signal * torch.randn(20000, generator=noise)
    optimizer = SophiaG([p], lr=0.0, rho="auto", clip_fraction=clip_fraction)
    optimizer.update_hessian([torch.rand(20000, generator=noise) + 0.1])
    shares = []
    for _ in range(80):
        p.grad = slope + torch.randn(20000, generator=noise)
        optimizer.step()
        shares.append(clipped(optimizer, p))
    assert max(abs(share - clip_fraction) for share in shares) < 0.1
    assert optimizer.param_groups[0]["rho_measurements"] == 1


@pytest.mark.parametrize("size", [2000, 5 * SAMPLE])
@pytest.mark.parametrize("still", ["no gradient and no h", "no gradient"])
def test_coordinates_that_do_not_move_do_not_count(still, size):
    noise, p, moving = torch.Generator().manual_seed(0), Parameter(torch.zeros(size)), slice(0, size // 50)
    optimizer = SophiaG([p], lr=0.0, rho="auto", clip_fraction=0.5)
    h, g = torch.rand(size, generator=noise) + 0.1, torch.zeros(size)
    if still == "no gradient and no h":
        h[size // 50 :] = 0
    g[moving] = torch.randn(size // 50, generator=noise)
    optimizer.update_hessian([h])
    p.grad = g
    optimizer.step()
    assert optimizer.param_groups[0]["rho_measurements"] == 1
    assert clipped(optimizer, p, moving) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("unknown", [0.0, 0.3, 0.9, 0.999])
def test_coordinates_without_curvature_use_up_at_most_half_of_the_share(unknown):
    noise, size = torch.Generator().manual_seed(0), 20000
    p, known = Parameter(torch.zeros(size)), torch.rand(size, generator=noise) >= unknown
    optimizer = SophiaG([p], lr=0.0, rho="auto", clip_fraction=0.6)
    optimizer.update_hessian([torch.where(known, torch.rand(size, generator=noise) + 0.1, 0)])
    p.grad = torch.randn(size, generator=noise)
    optimizer.step()
    expected = max((0.6 - unknown) / (1 - unknown), 0.3)
    assert clipped(optimizer, p, known) == pytest.approx(expected, abs=0.02 if unknown < 0.99 else 0.15)


def test_a_fixed_rho_beside_an_automatic_one_with_a_fraction():
    first, second = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    optimizer = SophiaG([{"params": [first]}, {"params": [second], "rho": 0.5}], rho="auto", clip_fraction=0.3)
    assert [group["clip_fraction"] for group in optimizer.param_groups] == [0.3, None]
    optimizer = SophiaG([{"params": [first]}, {"params": [second], "rho": "auto"}], rho=0.1, clip_fraction=0.3)
    assert [(group["rho"], group["clip_fraction"]) for group in optimizer.param_groups] == [(0.1, None), (1.0, 0.3)]

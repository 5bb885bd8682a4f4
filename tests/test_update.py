"""The single-tensor and the multi-tensor step: equal numbers, memory, dtypes of the states, names of version 0.1."""

from __future__ import annotations

import copy
import io
import weakref
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yolo_sophia.curvature import Hutchinson
from yolo_sophia.optim import DecoupledSophia, Sophia, SophiaG, SophiaH
from yolo_sophia.optim._hessian import move_hessians
from yolo_sophia.optim._step import choose_step, foreach_step, single_tensor_step

WAYS = [{"foreach": False}, {"foreach": True}]
SHAPES = [(300,), (), (7,), (0, 3), (2, 8, 3, 3), (16, 4, 3, 3), (5, 6), (40, 20)]


def laid_out(t: Tensor, i: int) -> Tensor:
    """One of four memory layouts."""
    if i % 4 == 1 and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if i % 4 == 2 and t.dim() == 2:
        return t.t().contiguous().t()
    return t.repeat_interleave(2, dim=-1)[..., ::2] if i % 4 == 3 and t.dim() > 1 else t


class Floored(SophiaG):
    """With the paper's denominator, max(rho h, eps)."""

    eps_is_minimum = True


@cache
def reference(**settings) -> list[Tensor]:
    return train(**settings, foreach=False)


def train(kind=SophiaG, dtype=torch.float32, steps=30, device="cpu", **settings) -> list[Tensor]:
    """Parameters and states after steps on drawn gradients: every layout, absent gradients, entries whose h is 0."""
    noise = torch.Generator().manual_seed(0)

    def draw(i: int, power: float = 1.0) -> Tensor:
        size = 10 ** (2 * torch.rand(SHAPES[i], generator=noise, dtype=torch.float64) - 1)
        value = (torch.randn(SHAPES[i], generator=noise, dtype=torch.float64) * size).pow(power)
        return laid_out(value.to(device, dtype), i + 1 if power == 1 and i % 2 else i)

    params = [Parameter(draw(i)) for i in range(len(SHAPES))]
    groups = [
        {"params": params[:3], "weight_decay": 0.0},
        {"params": params[3:5], "lr": 0.02},
        {"params": params[5:], "rho": 0.3, "betas": (0.8, 0.9)},
    ]
    optimizer = kind(groups, lr=0.01, bias_correction=True, **settings)
    for step in range(steps):
        if step % 10 == 3:
            estimates = [None if (step + i) % 4 == 0 else draw(i, 2.0) for i in range(len(SHAPES))]
            optimizer.update_hessian(None if e is None else e * (e > 0.01) for e in estimates)
        for i, p in enumerate(params):
            gradient = draw(i)
            p.grad = None if (step + i) % 5 == 0 else gradient
        optimizer.step()
    return [t.detach() for p in params for t in (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["hessian"])]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected):
        bound = 1e-12 if b.dtype == torch.float64 else max(1e-5, 4 * torch.finfo(b.dtype).eps)  # 16 bits: as stored
        torch.testing.assert_close(a, b, rtol=bound, atol=bound, check_stride=False)


# The numbers


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 100},
        {"steps": 100, "dtype": torch.float64},
        {"steps": 30, "dtype": torch.bfloat16},
        {"steps": 30, "dtype": torch.float16},
        {"steps": 30, "maximize": True},
        {"steps": 30, "kind": Floored, "eps": 0.05},
        {"steps": 100, "cautious": True},
        {"steps": 100, "hessian_power": 0.5},
        {"steps": 30, "cautious": True, "maximize": True, "kind": Floored, "eps": 0.05},
        {"steps": 30, "cautious": True, "maximize": True, "kind": Floored, "eps": 0.05, "hessian_power": 0.5},
    ],
    ids=["fp32", "fp64", "bf16", "fp16", "maximize", "floor", "cautious", "root", "all", "all-root"],
)
def test_multi_tensor_kernels_equal_the_single_tensor_step(settings):
    assert_close(train(**settings, foreach=True), reference(**settings))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_cautious_step_leaves_out_what_would_go_against_the_gradient(way, maximize):
    momentum, gradient = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
    p = Parameter(torch.zeros(5))
    optimizer = SophiaG([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0, maximize=maximize, cautious=True, **way)
    for p.grad in (100 * momentum, gradient):  # the first step decides the sign of m
        with torch.no_grad():
            p.zero_()
        optimizer.step()
    sign = 1 if maximize else -1
    assert p.tolist() == pytest.approx([0.1 * sign, 0.0, 0.0, -0.1 * sign, 0.0])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_root_divides_by_rho_times_the_root_of_h(way):
    h, p = torch.tensor([4.0, 0.25, 0.0]), Parameter(torch.zeros(3))
    optimizer = SophiaG([p], lr=1.0, betas=(0.0, 0.0), rho=0.5, weight_decay=0.0, hessian_power=0.5, **way)
    optimizer.update_hessian([h])
    p.grad = torch.tensor([0.1, -0.1, 0.1])
    optimizer.step()
    assert p.tolist() == pytest.approx([-0.1, 0.4, -1.0])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_nan_is_not_hidden(way):
    p = Parameter(torch.zeros(3))
    p.grad = torch.tensor([float("nan"), 1.0, float("inf")])
    optimizer = SophiaG([p], lr=0.5, **way)
    optimizer.step()
    assert p.isnan().tolist() == [True, False, False] and p[1:].tolist() == [-0.5, -0.5]


# Factors of lr within a parameter


def by_rows(kind: type[SophiaG], rows: bool, steps: int = 12, **settings) -> list[Tensor]:
    """Two matrices and a vector after some steps: as they are with `row_factors`, or each row with a group's lr."""
    noise = torch.Generator().manual_seed(0)
    factors = [torch.tensor([1.0, 20.0, 0.1, 0.0]).view(4, 1, 1, 1), torch.tensor([3.0, 1.0]), None]
    start = [torch.randn(shape, generator=noise) for shape in [(4, 3, 2, 2), (2,), (5, 3)]]
    params = [Parameter(p.to(settings.get("dtype", torch.float32))) for p in start]
    if rows:
        parts = [[Parameter(row) for row in p.detach().split(1)] for p in params]
        rates = [[0.01 * (1.0 if f is None else float(f[i])) for i in range(len(p))] for p, f in zip(params, factors)]
        groups = [{"params": [r], "lr": lr} for rs, lrs in zip(parts, rates) for r, lr in zip(rs, lrs)]
    else:
        parts, groups = [[p] for p in params], params
    settings.pop("dtype", None)
    optimizer = kind(groups, lr=0.01, betas=(0.8, 0.9), weight_decay=0.5, bias_correction=True, **settings)
    if not rows:
        optimizer.row_factors.update({p: f for p, f in zip(params, factors) if f is not None})
        assert "row_factors" not in optimizer.state_dict()
    for step in range(steps):
        drawn = [torch.randn(p.shape, generator=noise) for p in params]
        split = [piece for d, part in zip(drawn, parts) for piece in d.split(len(d) // len(part))]
        if step % 4 == 0:
            optimizer.update_hessian([g.square() for g in split])
        for p, g in zip((p for part in parts for p in part), split):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return [torch.cat([piece.detach() for piece in part]) for part in parts]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rho": "auto", "clip_fraction": 0.6},
        {"rho": "auto", "hessian_power": 0.5, "cautious": True},
        {"kind": Floored, "eps": 0.05, "maximize": True},
        {"dtype": torch.bfloat16},
    ],
    ids=["plain", "auto", "root-cautious", "floor-maximize", "bf16"],
)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_rows_with_factors_move_as_parameters_with_a_rate_of_their_own(way, settings):
    settings = {"kind": SophiaG, **settings, **way}
    assert_close(by_rows(rows=False, **settings), by_rows(rows=True, **settings))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_factor_of_1_changes_no_bit(way):
    results = []
    for factor in (None, torch.ones(6, 1)):
        p = Parameter(torch.linspace(-3, 3, 24).view(6, 4))
        optimizer = SophiaG([p], lr=0.013, **way)
        optimizer.row_factors.update({} if factor is None else {p: factor})
        optimizer.update_hessian([torch.linspace(0, 2, 24).view(6, 4)])
        for p.grad in torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0)):
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "make",
    [
        SophiaG,
        SophiaH,
        lambda params: Sophia(torch.nn.Identity(), None, params),
        lambda params: DecoupledSophia(params, lambda ps: [None] * len(ps)),
    ],
)
def test_every_class_has_row_factors(make):
    p = Parameter(torch.zeros(2, 3))
    optimizer = make([p])
    assert optimizer.row_factors == {}
    optimizer.row_factors[p] = torch.tensor([[1.0], [2.0]])
    optimizer.load_state_dict(optimizer.state_dict())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p + 1).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    moved = p.detach()[:, 0]
    assert moved[1] == 2 * moved[0] < 0


# The average h


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("average", [None, "kernel", "row"])
def test_h_by_multi_tensor_kernels_equals_h_tensor_by_tensor(average, squared, dtype):
    noise = torch.Generator().manual_seed(0)
    shapes = [*SHAPES, (4, 3, 1, 1), (3, 0, 3, 3), (6, 2, 3, 3)]
    hessians = [torch.rand(shape, generator=noise) for shape in shapes]
    values = [laid_out(torch.rand(shape, generator=noise).to(dtype), i) for i, shape in enumerate(shapes)]
    found, expected = copy.deepcopy(hessians), copy.deepcopy(hessians)
    for result, foreach in ((found, True), (expected, False)):
        move_hessians(result, values, 0.9, average=average, squared=squared, foreach=foreach)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    assert all(torch.equal(a, b) for a, b, h in zip(found, expected, hessians) if average is None or h.dim() < 2)


class Launches(TorchDispatchMode):
    """Counts the operators that compute or copy."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or "view" in func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("source", ["grad", "estimates"])
@pytest.mark.parametrize("average", [None, "kernel", "row"])
def test_the_launches_of_an_update_of_h_do_not_depend_on_the_number_of_tensors(average, source):
    def launches(tensors: int) -> int:
        params = [Parameter(torch.ones(4, 2, 3 if i % 2 else 1, 3)) for i in range(tensors)]
        optimizer = SophiaG(params, foreach=True, hessian_average=average)
        for p in params:
            p.grad = torch.ones_like(p)
        for mode in (Launches(), Launches()):  # the first update makes the states
            with mode:
                optimizer.update_hessian(None if source == "grad" else [p.grad for p in params])
        return mode.count

    assert launches(40) == launches(4) <= 12


# The choice


class Subclass(Tensor):
    """As DTensor, which has no multi-tensor kernels of its own."""


@pytest.mark.parametrize(
    ("foreach", "kinds", "expected"),
    [
        (None, [(False, Parameter)] * 2, single_tensor_step),
        (None, [(True, Parameter)] * 2, foreach_step),
        (None, [(False, Parameter), (True, Parameter)], single_tensor_step),
        (None, [(True, Subclass)], single_tensor_step),
        (True, [(False, Parameter)], foreach_step),
        (False, [(True, Parameter)], single_tensor_step),
    ],
)
def test_choice_of_the_implementation(foreach, kinds, expected, monkeypatch):
    params = [Parameter(torch.ones(1)) if kind is Parameter else torch.ones(1).as_subclass(kind) for _, kind in kinds]
    on_cuda = {id(p) for p, (is_cuda, _) in zip(params, kinds) if is_cuda}
    for kind in {kind for _, kind in kinds}:
        monkeypatch.setattr(kind, "is_cuda", property(lambda p: id(p) in on_cuda), raising=False)
    assert choose_step({"foreach": foreach}, params) is expected


# Memory


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors made under it: `peak` is the most that were alive at once."""

    def __init__(self):
        super().__init__()
        self.refs, self.known, self.peak = [], set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = {ref() for ref in self.refs} - {None}
        mine = {t.untyped_storage().data_ptr() for t in made}
        self.known |= {t.untyped_storage().data_ptr() for t in given} - mine
        out = func(*args, **(kwargs or {}))
        self.refs = [weakref.ref(t) for t in {*made, *(t for t in tree_leaves(out) if isinstance(t, Tensor))}]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (r() for r in self.refs)}
        self.peak = max(self.peak, sum(size for place, size in storages.items() if place not in self.known))
        return out


@pytest.mark.parametrize(("way", "limit"), [({"foreach": True}, 60 * 102), ({}, 100)], ids=["foreach", "default"])
def test_memory_of_a_step(way, limit):
    params = [Parameter(torch.ones(100 if i % 2 else 2, 1)) for i in range(120)]
    optimizer = SophiaG(params, **way)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    count = sum(p.numel() for p in params)
    assert sum(s[key].numel() for s in optimizer.state.values() for key in ("exp_avg", "hessian")) == 2 * count
    with Alive() as alive:
        optimizer.step()
    assert alive.peak <= 4 * (limit + 8), "8: scalars"  # 4 bytes


# Dtypes of the states


@pytest.mark.parametrize(
    ("dtype", "momentum"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("source", ["grad", "estimates"])
def test_h_keeps_what_half_precision_loses(dtype, momentum, source):
    """1e-8 and the square of 1e-4 are 0 in float16."""
    p = Parameter(torch.zeros(4, 3, 2, dtype=dtype))
    optimizer = SophiaG([p], hessian_average="row")
    p.grad = torch.full_like(p, 1e-4)
    optimizer.update_hessian(None if source == "grad" else [torch.full(p.shape, 1e-8)])
    optimizer.step(**({"bs": 1} if source == "grad" else {}))
    state = optimizer.state[p]
    assert state["hessian"].dtype == torch.promote_types(dtype, torch.float32) and state["exp_avg"].dtype == momentum
    torch.testing.assert_close(state["hessian"].double(), torch.full(p.shape, 1e-10).double(), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_states_of_version_01_in_other_dtypes_are_converted(dtype, stored):
    def make() -> SophiaG:
        optimizer = SophiaG([Parameter(torch.ones(50, dtype=dtype))], lr=0.01)
        for p in optimizer.param_groups[0]["params"]:
            optimizer.update_hessian([torch.rand(p.shape, generator=torch.Generator().manual_seed(0))])
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer

    optimizer = make()
    saved = optimizer.state_dict()
    h = saved["state"][0]["hessian"].to(stored)
    saved["state"][0] = {**saved["state"][0], "hessian": h, "exp_avg": saved["state"][0]["exp_avg"].to(stored)}
    saved["param_groups"][0] |= {"hessian_dtype": stored, "momentum_dtype": stored, "fused": True}
    torch.save(saved, buffer := io.BytesIO())
    buffer.seek(0)
    fresh = SophiaG([Parameter(torch.ones(50, dtype=dtype))])
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    state = next(iter(fresh.state.values()))
    assert torch.equal(state["hessian"], h.float()) and state["hessian"].dtype == torch.float32
    assert state["exp_avg"].dtype == next(iter(optimizer.state.values()))["exp_avg"].dtype
    assert not {"hessian_dtype", "momentum_dtype"} & fresh.param_groups[0].keys()
    assert fresh.param_groups[0]["fused"] is None


# Names of version 0.1


@pytest.mark.parametrize(
    ("kind", "old", "expected"),
    [
        (SophiaG, {"hessian_root": True}, {"hessian_power": 0.5}),
        (SophiaG, {"hessian_root": False}, {"hessian_power": 1}),
        (SophiaH, {"k": 7}, {"hessian_interval": 7}),
        (SophiaH, {"probes": 3}, {"n_samples": 3}),
        (SophiaH, {"hessian_root": True}, {"hessian_power": 0.5}),
        (lambda p, **old: DecoupledSophia(p, lambda params: [], **old), {"hessian_root": True}, {"hessian_power": 0.5}),
    ],
)
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_old_names_work_with_a_warning(kind, old, expected, where):
    ((key, value),) = expected.items()
    with pytest.warns(FutureWarning, match=rf"{next(iter(old))}=.*{key}={value}"):
        p = [Parameter(torch.ones(2))]
        optimizer = kind(p, **old) if where == "constructor" else kind([{"params": p, **old}])
    group = optimizer.param_groups[0]
    assert group[key] == value and next(iter(old)) not in group


def test_the_old_name_of_samples_reaches_the_estimator():
    with pytest.warns(FutureWarning, match="use n_samples=3"):
        optimizer = Sophia(torch.nn.Identity(), None, [Parameter(torch.ones(2))], probes=3)
    assert optimizer.hessian_estimator.n_samples == 3
    with pytest.warns(FutureWarning, match="n_samples="):
        assert Hutchinson(probes=4).n_samples == 4


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_unknown_names_are_refused(kind):
    for name in ("hessian_dtype", "floor"):
        with pytest.raises(TypeError, match=f"{kind.__name__}: unexpected argument '{name}', expected one of"):
            kind([Parameter(torch.ones(2))], **{name: None})


def test_a_checkpoint_of_version_01_is_translated():
    def make(**settings) -> SophiaH:
        p = Parameter(torch.ones(3))
        optimizer = SophiaH([p], lr=0.1, **settings)
        for _ in range(5):
            optimizer.step(lambda: (p**4).sum())
        return optimizer

    first = make(hessian_interval=3, n_samples=2, hessian_power=0.5)
    saved = copy.deepcopy(first.state_dict())
    for group in saved["param_groups"]:
        group["hessian_root"] = group.pop("hessian_power") == 0.5
        for new, old in (("hessian_interval", "k"), ("n_samples", "probes"), ("refresh_index", "refreshes")):
            group[old] = group.pop(new)
        del group["hessian_dropped"], group["hessian_updates"], group["rho_age"]
        group |= {"fused": False, "hessian_dtype": None, "momentum_dtype": None}
    second = SophiaH([Parameter(torch.ones(3))])
    second.load_state_dict(saved)
    expected = {key: value for key, value in first.param_groups[0].items() if key != "params"}
    found = {key: value for key, value in second.param_groups[0].items() if key != "params"}
    assert found == {**expected, "hessian_updates": 0} and second.refresh_due == first.refresh_due

"""Every implementation of the update rule against the reference; their memory, their compilers, their dtypes."""

from __future__ import annotations

import copy
import io
import weakref
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yolo_sophia.optim import SophiaG, chunked, compiler, fused
from yolo_sophia.optim.foreach import apply_rule, foreach_update
from yolo_sophia.optim.layout import Bucket
from yolo_sophia.optim.precision import round_at_random
from yolo_sophia.optim.reference import Rule, single_tensor_update
from yolo_sophia.optim.update import choose_update

REFERENCE = {"foreach": False}
ways = pytest.mark.parametrize("way", [{}, {"foreach": True}, {"fused": True}], ids=["chunked", "foreach", "fused"])
SHAPES = [(300,), (), (7,), (0, 3), (2, 8, 3, 3), (16, 4, 3, 3), (5, 6), (40, 20)]
LEAN = {"hessian_dtype": torch.bfloat16, "momentum_dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Let tensors of this size be cut and gathered."""
    monkeypatch.setattr(chunked, "CHUNK", 64)
    monkeypatch.setattr(chunked, "PER_THREAD", 64)
    monkeypatch.setattr(chunked, "SMALL", 40)


def laid_out(t: Tensor, i: int) -> Tensor:
    """One of four memory layouts."""
    if i % 4 == 1 and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if i % 4 == 2 and t.dim() == 2:
        return t.t().contiguous().t()
    return t.repeat_interleave(2, dim=-1)[..., ::2] if i % 4 == 3 and t.dim() > 1 else t


class Floored(SophiaG):
    """With the paper's denominator, max(rho h, eps)."""

    floor = True


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


@ways
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
        {"steps": 100, "hessian_root": True},
        {"steps": 30, "cautious": True, "maximize": True, "kind": Floored, "eps": 0.05},
        {"steps": 30, "cautious": True, "maximize": True, "kind": Floored, "eps": 0.05, "hessian_root": True},
    ],
    ids=["fp32", "fp64", "bf16", "fp16", "maximize", "floor", "cautious", "root", "all", "all-root"],
)
def test_equals_the_reference(way, settings):
    found, expected = train(**settings, **way), reference(**settings)
    assert_close(found, expected)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("way", [REFERENCE, {}, {"foreach": True}, {"fused": True}], ids=str)
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


@pytest.mark.parametrize("way", [REFERENCE, {}, {"foreach": True}, {"fused": True}], ids=str)
def test_the_root_divides_by_rho_times_the_root_of_h(way):
    h, p = torch.tensor([4.0, 0.25, 0.0]), Parameter(torch.zeros(3))
    optimizer = SophiaG([p], lr=1.0, betas=(0.0, 0.0), rho=0.5, weight_decay=0.0, hessian_root=True, **way)
    optimizer.update_hessian([h])
    p.grad = torch.tensor([0.1, -0.1, 0.1])
    optimizer.step()
    assert p.tolist() == pytest.approx([-0.1, 0.4, -1.0])


@ways
@pytest.mark.parametrize("settings", [LEAN, {"hessian_dtype": torch.bfloat16}, {"momentum_dtype": torch.bfloat16}])
def test_equals_the_reference_with_states_in_bfloat16(way, settings):
    found, expected = train(**settings, **way), reference(**settings)
    for i, (a, b) in enumerate(zip(found, expected)):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 if i % 3 == 0 else 1e-2, check_stride=False)


@ways
def test_nan_is_not_hidden(way):
    p = Parameter(torch.zeros(3))
    p.grad = torch.tensor([float("nan"), 1.0, float("inf")])
    optimizer = SophiaG([p], lr=0.5, **way)
    optimizer.step()
    assert p.isnan().tolist() == [True, False, False] and p[1:].tolist() == [-0.5, -0.5]


# The choice


@pytest.mark.parametrize(
    ("flags", "devices", "expected"),
    [
        ({}, ["cpu", "cpu"], chunked.chunked_update),
        ({}, ["cuda", "cuda"], foreach_update),
        ({}, ["cpu", "cuda"], single_tensor_update),
        ({}, ["mps"], single_tensor_update),
        ({"foreach": True}, ["cpu"], foreach_update),
        ({"foreach": False}, ["cuda"], single_tensor_update),
        ({"fused": True}, ["cpu"], fused.fused_update),
        ({"fused": True, "foreach": False}, ["cuda"], fused.fused_update),
    ],
)
def test_auto_preset(flags, devices, expected):
    params = [SimpleNamespace(device=torch.device(d)) for d in devices]
    assert choose_update({"foreach": None, "fused": False, **flags}, params) is expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fused": True, "foreach": True}, "Invalid foreach: found True, expected None or False beside fused=True"),
        ({"hessian_dtype": torch.float16}, r"Invalid hessian_dtype: found torch\.float16, expected None, torch\.bfl"),
        ({"momentum_dtype": "bfloat16"}, "Invalid momentum_dtype: found 'bfloat16'"),
    ],
    ids=str,
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        SophiaG([Parameter(torch.ones(2))], **settings)


# Compilers


@pytest.mark.parametrize(
    ("command", "message"),
    [("no-such-compiler", r"needs a C\+\+ compiler, found none \(CXX=no"), ("false", "could not compile .*Set CXX")],
)
def test_no_compiler_is_an_error(command, message, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", command)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fused._kernel.cache_clear()
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        SophiaG([Parameter(torch.ones(2))], fused=True)
    assert not list(tmp_path.rglob("*.so"))


def test_compiled_once_for_all_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    macros = {"PARAM": "float", "EXP_AVG": "float", "HESSIAN": "float"}
    library = compiler.build("fused.cpp", **macros)
    assert [*tmp_path.rglob("*.so")] == [library]
    monkeypatch.setattr(compiler.subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    assert compiler.build("fused.cpp", **macros) == library
    with pytest.raises(pytest.fail.Exception):
        compiler.build("fused.cpp", **{**macros, "HESSIAN": "bfloat16"})


def test_the_step_for_cuda_is_one_graph_whatever_the_learning_rate():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(apply_rule, backend=backend, fullgraph=True, dynamic=False)
    tensors = [[torch.randn(s) for s in ((4, 3), (5,))] for _ in range(3)] + [[torch.rand(4, 3), torch.rand(5)]]
    twins = copy.deepcopy(tensors)
    for lr, scale in ((0.1, 0.3), (0.2, 0.4), (0.3, 0.5)):
        rule = Rule(lr, 0.9, 0.1, 1e-15, False)
        with torch.no_grad():
            numbers = [torch.tensor(x) for x in (scale, rule.shrink, lr)]
            compiled(*tensors, *numbers, Rule(0.0, 0.9, 1.0, 1e-15, False))
        single_tensor_update(*twins, [scale] * 2, rule)
    assert len(graphs) == 1
    assert_close(tensors[0] + tensors[2], twins[0] + twins[2])


def test_the_step_for_cuda_has_no_limit_of_lists(monkeypatch):
    """Of one function, torch.compile takes eight variants: three models of three parameter groups are one too many."""
    fused._compiled.cache_clear()
    monkeypatch.setattr(fused.torch, "compile", partial(torch.compile, backend="eager"))
    for count in range(1, 12):
        tensors = [[torch.full((3,), x) for _ in range(count)] for x in (1.0, 1.0, 0.0, 0.0)]
        with torch.no_grad():
            fused._update_compiled(Bucket(1.0, *tensors), Rule(0.5, 0.9, 0.0, 1e-15, False))
        assert all(p.tolist() == [0.5] * 3 for p in tensors[0])
    fused._compiled.cache_clear()


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


@pytest.mark.parametrize(
    ("way", "limit"),
    [({}, 5 * 64), ({"foreach": True}, 60 * 100), (REFERENCE, 100), ({"fused": True}, 0)],
    ids=["chunked", "foreach", "reference", "fused"],
)
def test_memory_of_a_step(way, limit):
    torch.set_num_threads(threads := torch.get_num_threads())
    params = [Parameter(torch.ones(100 if i % 2 else 2, 1)) for i in range(120)]
    optimizer = SophiaG(params, **way)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    count = sum(p.numel() for p in params)
    assert sum(s[key].numel() for s in optimizer.state.values() for key in ("exp_avg", "hessian")) == 2 * count
    with Alive() as alive:
        optimizer.step()
    limit = limit * threads if way == {} else limit + 60 * 2 if way == {"foreach": True} else limit
    assert alive.peak <= 4 * (limit + 8), "8: scalars"  # 4 bytes


# Dtypes of the states


def test_rounding_at_random_keeps_the_expectation():
    value = torch.tensor([1.001, -3.1415927, 1e-30, 0.0, 2.0, -1.5])
    before = torch.get_rng_state()
    drawn = torch.stack([round_at_random(value, seed) for seed in range(2000)]).double()
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(drawn.mean(0), value.double(), rtol=2e-4, atol=0)
    assert torch.equal(drawn[:, 3:].float(), value[3:].expand(2000, 3))  # they need no rounding
    assert round_at_random(torch.tensor([float("inf"), float("nan")]), 0).isnan().tolist() == [False, True]


def test_a_slow_average_arrives_in_bfloat16():
    params = [Parameter(torch.ones(1000)) for _ in range(2)]
    optimizer = SophiaG(params, betas=(0.9, 0.99), hessian_dtype=torch.bfloat16)
    for k in range(600):
        optimizer.update_hessian([torch.full((1000,), 1.0 if k < 100 else 1.25)] * 2)
    h = [optimizer.state[p]["hessian"] for p in params]
    assert h[0].dtype == torch.bfloat16 and not torch.equal(*h), "the tensors are rounded alike"
    assert abs(h[0].float().mean() - 1.25) < 0.01  # to nearest, it stands at 1


@pytest.mark.parametrize("settings", [LEAN, {"hessian_dtype": torch.float32, "momentum_dtype": torch.float32}], ids=str)
def test_states_keep_their_dtype_through_a_file(settings):
    def steps(optimizer: SophiaG, numbers: range) -> list[Tensor]:
        (p,) = optimizer.param_groups[0]["params"]
        for k in numbers:
            noise = torch.Generator().manual_seed(k)
            optimizer.update_hessian([torch.rand(p.shape, generator=noise)])
            p.grad = torch.randn(p.shape, generator=noise).to(p.dtype)
            optimizer.step()
        return [p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["hessian"]]

    dtype = torch.float32 if settings is LEAN else torch.bfloat16  # wider and narrower than the states
    optimizer = SophiaG([Parameter(torch.ones(50, dtype=dtype))], lr=0.01, **settings)
    middle = steps(optimizer, range(5))
    torch.save(optimizer.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    fresh = SophiaG([Parameter(middle[0].clone())])
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    found, expected = steps(fresh, range(5, 9)), steps(optimizer, range(5, 9))
    assert {t.dtype for t in found[1:]} == set(settings.values()) and all(map(torch.equal, found, expected))

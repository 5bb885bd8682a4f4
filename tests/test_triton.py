"""The Triton kernel without a GPU: in Triton's interpreter, compiled for GPUs, and where Triton cannot be used."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_lr_factors import built
from torch import Tensor
from torch.nn import Parameter
from ultralytics.nn.tasks import DetectionModel

from yolo_sophia.integration.explicit import MARKER
from yolo_sophia.optim import SophiaG, SophiaH, _fused
from yolo_sophia.optim._fused import reason_against, uses_triton

triton_is_there = pytest.mark.requires(importlib.util.find_spec("triton") is not None, "torch's CPU builds lack Triton")
CUDA = torch.device("cuda:0")


# The numbers


@triton_is_there
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(marked, python):
    """See interpreted_triton.py."""
    file = Path(__file__).with_name("interpreted_triton.py")
    python("-m", "pytest", "-q", "-m", marked, str(file), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@triton_is_there
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtypes", "flags"),
    [(70, "fp32 fp32 fp32 fp32", True), (80, "bf16 bf16 bf16 fp32", False), (90, "fp16 fp16 fp32 fp32", True)],
)
def test_the_kernel_compiles_for_gpus(capability, dtypes, flags):
    """With 16-byte accesses where all coordinates of a program are there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from yolo_sophia.optim import _triton

    pointers = {"table": "*i64", "scalars": "*fp32", "owners": "*i32"}
    optional = {"found_inf": "*fp32", "grad_scale": "*fp32", "skipped": "*i32"}
    pointers |= optional if flags else {}
    names = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    constants = dict(zip("PGMH", (getattr(_triton.tl, names[d]) for d in dtypes.split())))
    constants |= {"ALIGNMENT": 16, "BLOCK": _fused.BLOCK} | {key: None for key in optional if not flags}
    signature = {key: pointers.get(key, "constexpr") for key in _triton.step.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(signature) if key in pointers}
    source = ASTSource(fn=_triton.step, signature=signature, constexprs=constants, attrs=aligned)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    assert f".target sm_{capability}" in code
    assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code
    assert ("cvt.rn.bf16" in code) == ("bf16" in dtypes), "rounded, not cut off"


# Where it cannot be used


@pytest.fixture
def on_cuda(monkeypatch):
    """Parameters seem to be on a GPU of capability 8.0; no reason is known yet."""
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", property(lambda p: True), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for cached in (reason_against, _fused._say_once):
        cached.cache_clear()
    yield monkeypatch
    for cached in (reason_against, _fused._say_once):
        cached.cache_clear()


def raises(error: Exception):
    def check(device: torch.device) -> None:
        raise error

    return check


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1)), "capability 6.1"),
        (lambda patch: patch.setattr(_fused.os, "name", "nt"), "Windows"),
        (
            lambda patch: patch.setattr(
                _fused, "_check_one_step", raises(RuntimeError("no C compiler\nfurther lines"))
            ),
            r"does not work here \(RuntimeError: no C compiler\)",
        ),
        (
            lambda patch: patch.setattr(_fused, "_check_one_step", raises(ImportError())),
            r"does not work here \(ImportError: no message\)",
        ),
        (lambda patch: patch.setattr(_fused, "_check_one_step", lambda device: None), None),
    ],
    ids=["old", "windows", "no compiler", "broken", "usable"],
)
def test_reasons(change, says, on_cuda):
    change(on_cuda)
    reason = reason_against(CUDA)
    assert reason is None if says is None else re.search(says, reason)


def test_triton_is_missing(monkeypatch, on_cuda):
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "yolo_sophia.optim._triton", raising=False)
    monkeypatch.delattr("yolo_sophia.optim._triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the only way to come so far without a GPU
    assert "does not work here (ModuleNotFoundError" in reason_against(torch.device("cpu"))


def test_a_wrong_result_is_a_reason(monkeypatch, on_cuda):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(_fused.FusedStep, "__call__", lambda *args: None)
    assert "differs from the reference" in reason_against(torch.device("cpu"))


class Subclass(Tensor):
    """As DTensor."""


@pytest.mark.parametrize(
    ("group", "reason", "kind", "expected"),
    [
        ({"fused": None, "foreach": None}, None, Parameter, True),
        ({"fused": None, "foreach": None}, "broken", Parameter, False),
        ({"fused": None, "foreach": True}, None, Parameter, False),
        ({"fused": None, "foreach": False}, None, Parameter, False),
        ({"fused": None, "foreach": None}, None, Subclass, False),
        ({"fused": False, "foreach": None}, None, Parameter, False),
        ({"fused": True, "foreach": None}, None, Parameter, True),
        ({"fused": True, "foreach": None}, "broken", Parameter, "broken"),
        ({"fused": True, "foreach": None}, None, Subclass, "subclass of Tensor"),
    ],
)
def test_choice(group, reason, kind, expected, on_cuda):
    on_cuda.setattr(_fused, "reason_against", lambda device: reason)
    params = [Parameter(torch.ones(2)) if kind is Parameter else torch.ones(2).as_subclass(kind)]
    if isinstance(expected, str):
        with pytest.raises(RuntimeError, match=f"fused=True: .*{expected}.*fused=None"):
            uses_triton(group, params)
    else:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert [uses_triton(group, params) for _ in range(3)] == [expected] * 3
        said = "Sophia steps with multi-tensor kernels (foreach) instead of one Triton kernel: broken."
        assert [str(w.message) for w in caught] == [said] * bool(reason), "once"


def test_not_into_a_cuda_graph(on_cuda):
    """A replay would copy the addresses and settings of the step that was captured."""
    on_cuda.setattr(_fused, "reason_against", lambda device: None)
    group, params = {"fused": None, "foreach": None}, [Parameter(torch.ones(2))]
    assert uses_triton(group, params)
    on_cuda.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not uses_triton(group, params)


def test_not_on_a_cpu():
    p = [Parameter(torch.ones(2))]
    assert not uses_triton({"fused": None, "foreach": None}, p) and "triton" not in repr(reason_against(p[0].device))
    optimizer = SophiaG(p)
    with pytest.raises(RuntimeError, match="fused=True: found parameters on 'cpu', expected 'cuda'"):
        SophiaG(p, fused=True)
    with pytest.raises(RuntimeError, match="fused=True: found parameters on 'cpu', expected 'cuda'"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "fused": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_fused_and_foreach_cannot_both_be_true(kind):
    with pytest.raises(ValueError, match=r"Invalid fused: found True, expected .* foreach=True"):
        kind([Parameter(torch.ones(2))], fused=True, foreach=True)


# `yolo train fused=...`


@pytest.mark.compat
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"fused": "AUTO"}, None),
        ({"fused": False}, False),
        ({"fused": True}, RuntimeError),
        ({"fused": True, "resume": True, MARKER: "detect-scratch:fused"}, None),  # on another machine
    ],
    ids=str,
)
def test_the_argument(given, expected, tiny_model, tmp_path):
    model = DetectionModel(str(tiny_model), nc=6, verbose=False)
    if expected is RuntimeError:
        with pytest.raises(RuntimeError, match="fused=True: found parameters on 'cpu', expected 'cuda'"):
            built(model, tmp_path, "SophiaG", **given)
    else:
        optimizer, *_ = built(model, tmp_path, "SophiaG", **given)
        assert {group["fused"] for group in optimizer.param_groups} == {expected}


# What a state holds


def test_loading_keeps_the_choice_and_the_counters_on_the_host():
    def make(**way) -> SophiaG:
        p = Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        return SophiaG([p], **way)

    saved = make(foreach=True)
    saved.step()
    for fused in (None, False, True):
        loaded = make()
        loaded.param_groups[0]["fused"] = fused  # the constructor refuses True on a CPU
        loaded.load_state_dict({**saved.state_dict()})
        assert loaded.param_groups[0]["fused"] is fused
        (state,) = loaded.state.values()
        assert state["step"].is_cpu and state["step"] == 1

"""The Triton kernel in Triton's interpreter, on CPU tensors, against the single-tensor step.

`test_triton.py` runs this file in a process with TRITON_INTERPRET=1, which Triton reads as it is imported.
"""

from __future__ import annotations

import csv
import math
import os
import weakref
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_numbers import at_call, clock, log, train  # noqa: F401
from test_update import Floored, assert_close, by_rows, laid_out, reference
from test_update import train as stepped_for
from torch import Tensor
from torch.nn import Parameter

from yolo_sophia.optim import SophiaG, SophiaH, _fused, _triton
from yolo_sophia.optim._schedule import HessianSchedule

assert os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLAGS = ("cautious", "root", "minimum", "maximize")
ROWS = ["21011", "20100", "00010", "01101", "10111", "11000"]
CASES = [(DTYPES[int(row[0])], *map(int, row[1:])) for row in ROWS]


def settings_of(dtype: torch.dtype, cautious: int, root: int, minimum: int, maximize: int) -> dict:
    kind = {"kind": Floored, "eps": 0.05} if minimum else {"kind": SophiaG}
    flags = {"cautious": bool(cautious), "hessian_power": 0.5 if root else 1, "maximize": bool(maximize)}
    return {"dtype": dtype, **kind, **flags}


def test_every_pair_of_dtype_and_flags_is_covered():
    for i, j in combinations(range(1 + len(FLAGS)), 2):
        pairs = product(DTYPES if i == 0 else (0, 1), (0, 1))
        assert {(case[i], case[j]) for case in CASES} == set(pairs), (i, j)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)).removeprefix("torch."))
def test_five_steps_equal_the_single_tensor_step(case):
    found = stepped_for(**settings_of(*case), steps=5, fused=True)
    assert_close(found, reference(**settings_of(*case), steps=5))


@pytest.mark.slow  # without bfloat16: the interpreter cuts it off where a GPU rounds (cvt.rn, see test_triton.py)
@pytest.mark.parametrize("case", [case for case in CASES if case[0] != torch.bfloat16], ids=str)
def test_a_hundred_steps_equal_the_single_tensor_step(case):
    found = stepped_for(**settings_of(*case), steps=100, fused=True)
    assert_close(found, reference(**settings_of(*case), steps=100))


# What the kernel takes


def filled(shapes: list[tuple[int, ...]], arrange=lambda t: t, **settings) -> SophiaG:
    """An optimizer with gradients and h."""
    noise = torch.Generator().manual_seed(0)
    params = [Parameter(arrange(torch.randn(shape, generator=noise))) for shape in shapes]
    optimizer = SophiaG(params, lr=0.1, **settings)
    optimizer.update_hessian([torch.rand(p.shape, generator=noise) for p in params])
    for p in params:
        p.grad = torch.empty_strided(p.shape, p.stride()).copy_(torch.randn(p.shape, generator=noise))
    return optimizer


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2),
    "part": lambda t: torch.cat([t, t])[3 : 3 + len(t)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_tensors_of_all_groups_are_one_launch(layout):
    optimizer = filled([(8, 4, 3, 3), (20, 30, 2, 2), (0, 3, 3, 3), (1, 1, 1, 1)], LAYOUTS[layout], fused=True)
    optimizer.add_param_group({"params": Parameter(torch.ones(3)), "lr": 0.2, "weight_decay": 0.0})
    optimizer.param_groups[1]["params"][0].grad = torch.ones(3)
    optimizer.step()
    assert len(optimizer._fused.launches) == 1 and optimizer._fused.rest == []


def test_dtypes_have_launches_of_their_own_and_the_rest_is_stepped_by_foreach():
    params = [torch.ones(5), torch.ones(5).half(), torch.ones(4, 3)[:, ::2], torch.ones(5).double(), torch.ones(6)[::2]]
    fused, single = ([Parameter(p.clone(memory_format=torch.preserve_format)) for p in params] for _ in range(2))
    fused[2].data, fused[4].data = params[2].clone().repeat_interleave(2, -1)[:, ::2], torch.ones(6)[::2]
    optimizers = [SophiaG(ps, lr=0.1, **way) for ps, way in ((fused, {"fused": True}), (single, {"foreach": False}))]
    for optimizer in optimizers:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    assert len(optimizers[0]._fused.launches) == 2 and optimizers[0]._fused.rest == [2, 3, 4]
    assert_close(fused, single)


def test_the_table():
    optimizer = filled([(2, 8, 3, 3), (2000,), (3,)], fused=True, bias_correction=True)
    optimizer.row_factors[optimizer.param_groups[0]["params"][0]] = torch.ones(2, 1, 1, 1)
    optimizer.step()
    (launch,) = optimizer._fused.launches
    params, table = optimizer.param_groups[0]["params"], launch._table
    assert table.shape[1] == _fused.COLUMNS == _triton.COLUMNS.value
    assert table[:, 0].tolist() == [p.data_ptr() for p in params]
    assert table[:, 1].tolist() == [p.grad.data_ptr() for p in params]
    assert table[:, 3].tolist() == [optimizer.state[p]["hessian"].data_ptr() for p in params]
    assert [bool(x) for x in table[:, 4]] == [True, False, False]
    assert table[:, 5].tolist() == [144, 2000, 3] and table[0, 6] == 72
    assert table[:, 8].tolist() == [0, 1, 3] and launch._owners.tolist() == [0, 1, 1, 2]
    assert set(table[:, 7].tolist()) == {0}, "one row of settings for a group"


def test_coordinates_beyond_two_to_the_31():
    count, first = 2**31 + 3000, 2**21 + 1  # memory that is not touched is not there
    p, g, m, h = (torch.empty(count, dtype=torch.bfloat16) for _ in range(4))
    end = slice(first * _fused.BLOCK, (first + 1) * _fused.BLOCK)
    for t, value in zip((p, g, m, h), (1.0, 1.0, 0.0, 0.0)):
        t[end.start - 4 :] = value
    step = _fused.FusedStep()
    columns = ([p], [g], [m], [h], [None])
    step.arrange(columns)
    (launch,) = step.launches
    launch._table[:, 8], launch.programs = -first, 1
    step(columns, [(_fused.StepOptions(0.5, 0.5, 0.0, 1e-12, False), [1.0])])
    assert (p[end] == 0.5).all() and (m[end] == 0.5).all()
    assert (p[end.start - 4 : end.start] == 1).all() and (p[end.stop :] == 1).all()


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=4),
    st.sampled_from([1, 500, 1024]),
    st.integers(0, 3),
)
@settings(max_examples=12)
def test_any_shape(shapes, long, layout):
    shapes = [*shapes, (long,)]
    results = []
    for way in ({"fused": True}, {"foreach": False}):
        optimizer = filled(shapes, lambda t: laid_out(t, layout), **way)
        optimizer.step()
        states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
        results.append([*optimizer.param_groups[0]["params"], *(s["exp_avg"] for s in states)])
    assert_close(*([t.detach() for t in result] for result in results))


def as_channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


CHANGES = {
    "parameter": lambda p, state: setattr(p, "data", as_channels_last(p.data)),
    "dtype": lambda p, state: setattr(p, "data", p.data.bfloat16()),
    "gradient": lambda p, state: setattr(p, "grad", as_channels_last(p.grad)),
    "momentum": lambda p, state: state.update(exp_avg=as_channels_last(state["exp_avg"])),
    "momentum in place": lambda p, state: setattr(state["exp_avg"], "data", state["exp_avg"].half()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_seen(change):
    results = []
    for way in ({"fused": True}, {"foreach": False}):
        optimizer = filled([(4, 3, 2, 2), (5,)], **way)
        p = params_of(optimizer)[0]
        for _ in range(2):
            optimizer.step()
            CHANGES[change](p, optimizer.state[p])
        optimizer.step()
        results.append(held(optimizer))
    assert_close(*results)


def test_gradients_are_not_kept():
    optimizer = filled([(4, 3, 2, 2), (5, 3)], lambda t: laid_out(t, 3), fused=True)
    assert not any(p.is_contiguous() for p in params_of(optimizer))
    for flag in (None, 0.0, 1.0):
        for p in params_of(optimizer):
            p.grad = torch.ones_like(p)
        grads = [weakref.ref(p.grad) for p in params_of(optimizer)]
        stepped(optimizer, flag)
        optimizer.zero_grad()
        assert not any(grad() is not None for grad in grads)


# Factors of lr within a parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_factors(dtype):
    given = {"kind": SophiaG, "dtype": dtype, "steps": 5}
    assert_close(by_rows(rows=False, fused=True, **given), by_rows(rows=False, foreach=False, **given))


@pytest.mark.parametrize(
    ("arrange", "factor", "taken"),
    [
        (lambda t: t, torch.tensor([[1.0], [2.0], [0.0]]), True),
        (lambda t: t, torch.tensor(3.0), True),
        (lambda t: t, torch.tensor([1.0, 2.0]), False),
        (lambda t: t, torch.tensor([[1.0], [2.0], [0.0]]).double(), False),
        (lambda t: t.t().contiguous().t(), torch.tensor([[1.0], [2.0], [0.0]]), False),
        (lambda t: t[:0], torch.ones(0, 1), None),
    ],
    ids=["rows", "number", "columns", "float64", "transposed", "empty"],
)
def test_factors_that_the_kernel_takes(arrange, factor, taken):
    results = []
    for way in ({"fused": True}, {"foreach": False}):
        optimizer = filled([(3, 2)], arrange, **way)
        (p,) = optimizer.param_groups[0]["params"]
        optimizer.row_factors[p] = factor
        optimizer.step()
        results.append(p.detach())
    assert_close(results[:1], results[1:])
    fused = filled([(3, 2)], arrange, fused=True)
    fused.row_factors[fused.param_groups[0]["params"][0]] = factor
    fused.step()
    assert bool(fused._fused.launches) is bool(taken) and bool(fused._fused.rest) is (taken is False)


# A gradient that is not finite


def held(optimizer: SophiaG) -> list[Tensor]:
    states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    return [t.detach().clone() for p, s in zip(optimizer.param_groups[0]["params"], states) for t in (p, *s_of(s))]


def s_of(state: dict) -> list[Tensor]:
    return [state["exp_avg"], state["hessian"], state["step"]]


def stepped(optimizer: SophiaG, found_inf: float | None = None, grad_scale: float | None = None) -> None:
    """A step as a GradScaler takes it."""
    optimizer.found_inf = None if found_inf is None else torch.tensor(found_inf)
    optimizer.grad_scale = None if grad_scale is None else torch.tensor(grad_scale)
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale


@pytest.mark.parametrize("extra", [[], [torch.ones(6)[::2]]], ids=["kernel", "rest"])
def test_found_inf_leaves_everything_as_it_is(extra):
    optimizer = filled([(40, 30), (5,)], fused=True)
    for t in extra:
        p = Parameter(torch.ones(3))
        p.data, p.grad = t, torch.ones(3)
        optimizer.add_param_group({"params": p})
    optimizer.param_groups[0] |= {"hessian_age": 0}
    stepped(optimizer, 0.0)
    before = held(optimizer)
    for flag in (1.0, 1.0):
        stepped(optimizer, flag)
        optimizer.param_groups[0]["hessian_age"] += not optimizer.step_was_skipped
    stepped(optimizer, 0.0)
    optimizer.param_groups[0]["hessian_age"] += 1
    saved = optimizer.state_dict()
    assert {float(s["step"]) for s in saved["state"].values()} == {2.0}
    assert optimizer.param_groups[0]["hessian_age"] == 1
    assert optimizer.step_was_skipped is False
    twin = filled([(40, 30), (5,)], foreach=False)
    for _ in range(2):
        twin.step()
    assert_close([t for t in held(optimizer)], [t for t in held(twin)])
    assert not torch.equal(before[0], held(optimizer)[0])


def test_a_skipped_step_changes_no_bit():
    optimizer = filled([(40, 30), (5,)], fused=True)
    optimizer.step()
    before = held(optimizer)
    optimizer.param_groups[0]["params"][0].grad[0, 0] = torch.inf
    stepped(optimizer, 1.0)
    assert not optimizer.step_was_skipped, "nobody has waited for the flag"
    optimizer.count_skipped_steps()
    assert all(torch.equal(a, b) for a, b in zip(before, held(optimizer))) and optimizer.skipped_steps == 1


def test_grad_scale():
    results = []
    for scale in (None, 1024.0):
        optimizer = filled([(40, 30), (5,)], fused=True)
        for p in optimizer.param_groups[0]["params"]:
            p.grad *= scale or 1.0
        stepped(optimizer, 0.0, scale)
        results.append([*held(optimizer), *(p.grad for p in optimizer.param_groups[0]["params"])])
    assert_close(*results)


def test_grad_scaler_with_an_overflow():
    results = []
    for way in ({"fused": True}, {"foreach": False}):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2)
        optimizer = filled([(40, 30), (5,)], **way)
        assert optimizer._step_supports_amp_scaling == ("fused" in way)
        for step in range(5):
            optimizer.zero_grad()
            loss = sum((p * (torch.inf if step == 2 else step + 1)).square().sum() for p in params_of(optimizer))
            scaler.scale(loss).backward()
            if step % 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        optimizer.count_skipped_steps()
        results.append([*held(optimizer), torch.tensor(scaler.get_scale())])
        assert float(optimizer.state[params_of(optimizer)[0]]["step"]) == 4
    assert_close(*results)


def params_of(optimizer: SophiaG) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_rho_is_measured_on_unscaled_gradients_of_steps_that_are_taken():
    results = []
    for scale in (None, 64.0):
        optimizer = filled([(40, 30)], fused=True, rho="auto")
        grad = params_of(optimizer)[0].grad
        if scale:
            optimizer.param_groups[0]["params"][0].grad = torch.full_like(grad, torch.inf)
            stepped(optimizer, 1.0, scale)
            assert optimizer.step_was_skipped and optimizer.param_groups[0]["rho_measurements"] == 0
            optimizer.param_groups[0]["params"][0].grad = grad * scale
        stepped(optimizer, 0.0, scale)
        results.append([*held(optimizer), torch.tensor(optimizer.param_groups[0]["rho"])])
    assert_close(*results)


@pytest.mark.parametrize("change", ["another gradient", "another parameter"])
def test_steps_that_are_skipped_count_for_the_parameters_of_those_steps(change):
    shapes = [(6, 5), (6, 5), (7,)]
    optimizer = filled(shapes, fused=True)
    a, b, c = params_of(optimizer)
    grad, a.grad = a.grad, None
    stepped(optimizer, 1.0)  # b and c
    if change == "another gradient":
        a.grad, c.grad = grad, None
        b.grad = None if change == "another parameter" else b.grad
    else:
        a.grad, b.grad = grad, None
    stepped(optimizer, 0.0)
    optimizer.count_skipped_steps()
    taken = {"another gradient": [1, 1, 0], "another parameter": [1, 0, 1]}[change]
    assert [int(optimizer.state[p]["step"]) for p in (a, b, c)] == taken


def test_the_schedule_is_that_of_the_steps_taken():
    def run(fused: bool) -> tuple[list[int], int]:
        p = Parameter(torch.ones(4))
        optimizer = SophiaH([p], lr=0.01, hessian_interval=3, fused=fused or None)
        updated = []
        for step in range(12):
            skips = step in (0, 2, 3, 7)
            loss = (p**4).sum()
            due = HessianSchedule(optimizer).due
            if skips and not fused:  # a GradScaler does not call step
                continue
            if due and not skips:
                optimizer.refresh(loss)
                updated.append(step)
            p.grad = torch.ones(4)
            if fused:
                stepped(optimizer, float(skips))
            else:
                optimizer.step()
        return updated, int(optimizer.state_dict()["state"][0]["step"])

    assert run(True) == run(False)


def test_h_is_not_updated_in_a_step_that_is_skipped():
    p = Parameter(torch.ones(4))
    optimizer = SophiaH([p], lr=0.01, hessian_interval=3, fused=True)

    def step(flag: float) -> None:
        optimizer.found_inf = torch.tensor(flag)
        optimizer.step(closure)
        del optimizer.found_inf

    def closure() -> Tensor:
        optimizer.zero_grad()
        (loss := (p**4).sum()).backward()
        return loss

    step(1.0)
    assert optimizer.step_was_skipped and not optimizer.state.get(p, {}).get("hessian_updates")
    assert optimizer.param_groups[0]["hessian_age"] is None and torch.equal(p.detach(), torch.ones(4))
    step(0.0)
    assert optimizer.state[p]["hessian_updates"] == 1 and optimizer.param_groups[0]["hessian_age"] == 1


# Trainings


@pytest.mark.slow
def test_a_training_skips_the_step_that_is_not_finite(train, log):  # noqa: F811
    """Without a GradScaler; caution is off, as its jumps make roundings large.

    The second step's gradient is not finite, and the estimate of that step is dropped.
    """

    def at_start(trainer) -> None:
        p = next(p for p in trainer.model.parameters() if p.requires_grad)
        p.register_hook(at_call(3, lambda g: g, lambda g: torch.full_like(g, torch.inf)))

    def run(fused: bool) -> tuple[list, list, set, list]:
        del log[:]
        trainer = train(at_start, hessian_fraction=1.0, hessian_interval=1, cautious=False, fused=fused)
        assert bool(trainer.optimizer._fused.launches) == fused
        counts = [clock(trainer)[key] for key in ("hessian_updates", "hessian_dropped", "hessian_age", "refresh_index")]
        with trainer.csv.open(newline="") as file:
            rows = [
                [row[key] for key in row if "sophia/" in key and "seconds" not in key] for row in csv.DictReader(file)
            ]
        said = sorted(line for line in log if "skipped" in line)
        assert all(math.isfinite(float(x)) for row in rows for x in row)
        return [p.detach() for p in trainer.model.parameters()], counts, steps_of(trainer), said

    found, expected = run(fused=True), run(fused=False)
    assert found[1:] == expected[1:] and len(found[-1]) == 2
    for a, b in zip(found[0], expected[0]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-4)


def steps_of(trainer) -> set[float]:
    return {float(state["step"]) for state in trainer.optimizer.state.values()}

"""What only a GPU shows: kernels, waiting, half precision, compiled training, two ranks over NCCL.

`YOLO_SOPHIA_TEST_DEVICE=cpu pytest tests/test_cuda.py` runs the bodies that do not count kernels or waits on the CPU.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from test_update import assert_close, laid_out
from test_update import train as train_steps
from tiny_models import batch_of, build
from torch import Generator, Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from ultralytics import YOLO
from ultralytics.engine import trainer as engine

from yolo_sophia import install
from yolo_sophia.curvature import EmpiricalFisher, GaussNewtonBartlett
from yolo_sophia.integration.criteria import recorder_for
from yolo_sophia.optim import SophiaG, SophiaH
from yolo_sophia.optim._fused import reason_against, uses_triton
from yolo_sophia.optim._step import choose_step, foreach_step

DEVICE = torch.device(os.environ.get("YOLO_SOPHIA_TEST_DEVICE", "cuda:0"))
GPU = DEVICE.type == "cuda"
TWO_WAYS = ({"fused": True}, {"foreach": False})
STEPS = 100
SHAPES = [(300,), (), (7,), (0, 3), (2, 8, 3, 3), (16, 4, 3, 3), (5, 6), (40, 20), (1025,), (3, 1, 7, 7)]

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(GPU and not torch.cuda.is_available(), reason="needs a CUDA GPU, torch.cuda finds none"),
]
counts_on_the_gpu = pytest.mark.skipif(not GPU, reason="the CPU has no kernels to count or wait for")
install()


@pytest.fixture(autouse=True)
def _single_precision():
    """No TF32: equality to rounding is asked for."""
    with torch.backends.cudnn.flags(allow_tf32=False, benchmark=False):
        yield


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The step -------------------------------------------------------------------------------------------------------------


def steps(**settings) -> list[Tensor]:
    """Parameters, m and h after steps on drawn gradients, by the implementation given."""
    noise = Generator().manual_seed(0)

    def draw(i: int) -> Tensor:
        return laid_out(torch.randn(SHAPES[i], generator=noise).to(DEVICE), i)

    params = [Parameter(draw(i)) for i in range(len(SHAPES))]
    groups = [{"params": params[:4], "weight_decay": 0.0}, {"params": params[4:], "rho": 0.3}]
    optimizer = SophiaG(groups, lr=0.01, bias_correction=True, **settings)
    for step in range(STEPS):
        if step % 10 == 3:
            optimizer.update_hessian([(e := draw(i)).square() * (e.abs() > 0.1) for i in range(len(SHAPES))])
        for i, p in enumerate(params):
            p.grad = draw(i)
        optimizer.step()
    return [t.detach() for p in params for t in (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["hessian"])]


@pytest.mark.parametrize(
    "settings", [{}, {"cautious": True}, {"hessian_power": 0.5}, {"hessian_average": "kernel"}], ids=str
)
@pytest.mark.parametrize("way", [{"foreach": True}, pytest.param({"fused": True}, marks=counts_on_the_gpu)], ids=str)
def test_kernels_equal_the_single_tensor_step(settings, way):
    found, expected = steps(**way, **settings), steps(foreach=False, **settings)
    assert_close(found, expected)
    assert all(a.device.type == DEVICE.type and a.dtype == b.dtype for a, b in zip(found, expected))


@counts_on_the_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_triton_rounds_as_the_single_tensor_step(dtype):
    found, expected = (train_steps(dtype=dtype, device=DEVICE, steps=100, **way) for way in TWO_WAYS)
    assert_close(found, expected)


@counts_on_the_gpu
def test_the_default_is_triton():
    params = [Parameter(torch.ones(2, device=DEVICE))]
    assert reason_against(DEVICE) is None
    assert uses_triton({"fused": None, "foreach": None}, params)
    assert choose_step({"foreach": None}, params) is foreach_step


@counts_on_the_gpu
def test_tables_are_not_overwritten_before_they_are_read():
    """The host is many steps ahead of the device, each with other gradients and another lr."""
    results = []
    for way in TWO_WAYS:
        p = Parameter(torch.zeros(3000, device=DEVICE))
        optimizer = SophiaG([p], betas=(0.0, 0.9), weight_decay=0.0, **way)
        grads = [torch.full_like(p, 1.0 + i) for i in range(200)]
        torch.cuda._sleep(10**9)
        for i, p.grad in enumerate(grads):
            optimizer.param_groups[0]["lr"] = 0.001 * (i + 1)
            optimizer.step()
        results.append(p.detach())
    assert_close(*([r] for r in results))


@counts_on_the_gpu
def test_a_step_of_a_grad_scaler_waits_for_nothing():
    results = []
    for way in TWO_WAYS:
        p = Parameter(torch.ones(3000, device=DEVICE))
        optimizer, scaler = SophiaG([p], lr=0.01, **way), torch.amp.GradScaler("cuda", init_scale=16.0)
        factors = [torch.tensor(x, device=DEVICE) for x in (1.0, 2.0, math.inf, 3.0, 4.0)]
        for i, factor in enumerate(factors):
            with no_waiting() if i and "fused" in way else contextlib.nullcontext():
                optimizer.zero_grad()
                scaler.scale((p * factor).square().sum()).backward()
                scaler.step(optimizer)
                scaler.update()
        optimizer.count_skipped_steps()
        assert optimizer.state[p]["step"] == 4 and scaler.get_scale() == 8
        results.append([p.detach(), optimizer.state[p]["exp_avg"]])
    assert_close(*results)


@counts_on_the_gpu
@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"rho": "auto", "betas": (0.1, 0.9)}], ids=str)
@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_a_step_waits_for_nothing(kind, settings):
    params = [Parameter(torch.randn(s, device=DEVICE)) for s in [(8, 3, 3, 3), (8,), (300,)]]
    optimizer = kind(
        params, bias_correction=True, **settings, **({"hessian_interval": None} if kind is SophiaH else {})
    )
    optimizer.row_factors[params[0]] = torch.rand(8, 1, 1, 1, device=DEVICE)
    optimizer.update_hessian([torch.rand_like(p) for p in params])
    for waits in (contextlib.nullcontext, no_waiting, no_waiting):  # the first step measures rho; m is mature then
        for p in params:
            p.grad = torch.randn_like(p)
        with waits():
            optimizer.step()
    if settings.get("rho") == "auto":
        assert optimizer.param_groups[0]["rho_measurements"] == 1


@counts_on_the_gpu
@pytest.mark.parametrize("average", [None, "kernel", "row"])
def test_an_update_of_h_waits_for_nothing(average):
    params = [Parameter(torch.randn(s, device=DEVICE)) for s in [(8, 3, 3, 3), (4, 8, 3, 3), (8, 8, 1, 1), (8,)]]
    optimizer = SophiaG(params, hessian_average=average)
    for waits in (contextlib.nullcontext, no_waiting):
        estimates = [torch.rand_like(p) for p in params]
        with waits():
            optimizer.update_hessian(estimates)


@counts_on_the_gpu
@pytest.mark.parametrize(
    ("flags", "limit"), [({}, 1), ({"foreach": True}, 2 * 48), ({"foreach": False}, math.inf)], ids=str
)
def test_kernels_of_a_step(flags, limit):
    groups = [
        {"params": [Parameter(torch.randn(8, 4 + i % 3, 3, 3, device=DEVICE)) for i in range(60)]},
        {"params": [Parameter(torch.randn(8 + i % 3, device=DEVICE)) for i in range(60)], "weight_decay": 0.0},
    ]
    optimizer = SophiaG(groups, **flags)
    for p in (p for group in groups for p in group["params"]):
        p.grad = torch.randn_like(p)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    others = ("Mem", "ProfilerStep", "Optimizer.step")
    kernels = Counter(name[:90] for name in names if not name.startswith(others))
    print(f"\nkernels of a step over 2 groups of 60 parameters, {flags}: {sum(kernels.values())}")  # noqa: T201
    for name, n in kernels.items():
        print(f"  {n:5} {name}")  # noqa: T201
    assert kernels, "the profiler saw no kernel"
    assert sum(kernels.values()) <= limit, kernels


# Estimates ------------------------------------------------------------------------------------------------------------


class Dice(TorchFunctionMode):
    """Draws on the CPU, from one generator, for whatever device: the same labels there and here."""

    DRAWS = (torch.rand, torch.randn, torch.randint, torch.bernoulli)

    def __init__(self):
        super().__init__()
        self.generator = Generator().manual_seed(0)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in self.DRAWS:
            return func(*args, **kwargs)
        tensors = [a for a in args if isinstance(a, Tensor)]
        device = tensors[0].device if tensors else kwargs.pop("device", "cpu")
        moved = [a.cpu() if isinstance(a, Tensor) else a for a in args]
        return func(*moved, **{**kwargs, "generator": self.generator}).to(device)


@pytest.mark.parametrize("task", ["detect", "classify"])
@pytest.mark.parametrize("estimator", [GaussNewtonBartlett, EmpiricalFisher])
def test_estimate_equals_that_of_the_cpu_for_the_same_labels(task, estimator):
    def estimate(device) -> tuple[list[str], list[Tensor]]:
        model = build(task).to(device)
        if hasattr(model, "criterion"):
            del model.criterion  # holds tensors of the device it was made on
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch_of(task).items()}
        model.criterion = model.init_criterion()
        recorder = recorder_for(model, model.criterion)
        recorder.start()
        model(batch)
        names, params = zip(*model.named_parameters())
        kept = [i for i, p in enumerate(params) if p.requires_grad]
        with Dice():
            values = estimator()(recorder.terms(), [params[i] for i in kept])
        return [names[i] for i in kept], values

    (names, found), (_, expected) = estimate(DEVICE), estimate("cpu")
    for name, a, b in zip(names, found, expected):
        assert (a is None) == (b is None), name
        if b is not None:
            off = ((a.cpu() - b).norm() / b.norm().clamp(min=1e-30)).item()
            assert off < 2e-3, f"{name}: the estimate is off by {off:.1e} of its norm"


def test_sophia_h_on_a_closure():
    noise = Generator().manual_seed(0)
    x, w = torch.randn(64, 5, generator=noise).to(DEVICE), Parameter(torch.zeros(5, device=DEVICE))
    target = x @ torch.arange(5.0, device=DEVICE)
    optimizer = SophiaH([w], lr=0.1, rho=1.0, weight_decay=0.0, hessian_interval=2, n_samples=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x @ w - target).square().mean() / 2
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(100)]
    assert losses[-1] < 0.1 * losses[0], losses
    h = optimizer.state[w]["hessian"] / (1 - 0.99 ** optimizer.state[w]["hessian_updates"])
    torch.testing.assert_close(h, (x.T @ x / 64).diagonal().detach(), rtol=0.1, atol=0.05)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tiny_data, small_model, tmp_path, monkeypatch):
    """Train the small model under Ultralytics and look at what is left: finite, with Hessian updates."""
    monkeypatch.setattr(engine, "check_amp", lambda model: True)  # it would download a model

    def run(model=None, seen=None, **settings):
        given = {
            "data": str(tiny_data),
            "imgsz": 64,
            "epochs": 4,
            "batch": 8,
            "nbs": 8,
            "workers": 0,
            "device": 0 if GPU else "cpu",
            "optimizer": "SophiaG",
            "hessian_interval": 2,
            "plots": False,
            "val": False,
            "project": str(tmp_path),
            "name": "run",
            "exist_ok": True,
        }
        yolo = YOLO(str(model or small_model))
        last = SimpleNamespace(seen=0)
        yolo.add_callback("on_hessian_update", lambda trainer: setattr(last, "seen", last.seen + 1))
        for event, callback in seen or ():
            yolo.add_callback(event, callback)
        try:
            yolo.train(**({"resume": True} if settings.get("resume") else given | settings))
        except Interrupted:
            return tmp_path / "run/weights/last.pt"
        last.trainer = trainer = yolo.trainer
        last.group = trainer.optimizer.param_groups[0]
        assert last.seen > 0 and last.group["hessian_updates"] >= last.seen, f"{last.seen} Hessian updates"
        for state in trainer.optimizer.state.values():
            assert state["hessian"].device.type == DEVICE.type and state["hessian"].dtype == torch.float32
            assert state["hessian"].isfinite().all(), "h is not finite"
            assert state["exp_avg"].isfinite().all(), "m is not finite"
        assert any(state["hessian"].any() for state in trainer.optimizer.state.values()), "h is 0 everywhere"
        for name, p in trainer.model.named_parameters():
            assert p.isfinite().all(), f"{name} is not finite"
        return last

    return run


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("fraction", [0.25, 1.0], ids=["part", "whole"])
@pytest.mark.parametrize("amp", [False, True, "bf16"], ids=["fp32", "fp16", "bf16"])
def test_session(train, amp, fraction):
    if amp == "bf16" and not GPU:
        pytest.skip("Ultralytics keeps amp=bf16 for CUDA; tests/test_scale.py has a double")
    run = train(amp=amp, hessian_fraction=fraction, epochs=8 if amp is True else 2)
    assert run.trainer.scaler.is_enabled() == (amp is True and GPU)
    if run.trainer.scaler.is_enabled():
        assert run.trainer.scaler.get_scale() > 0 and math.isfinite(run.trainer.scaler.get_scale())


def test_a_step_of_a_training_waits_for_nothing(train):
    """Outside Hessian updates and measurements of rho, with AMP and without."""

    def watch(trainer) -> None:
        step, session = trainer.optimizer_step, trainer._sophia

        def watched() -> None:
            quiet = GPU and trainer.epoch > 0 and session.window.staged is None
            seen.append(quiet)
            with no_waiting() if quiet else contextlib.nullcontext():
                step()

        trainer.optimizer_step = watched

    for amp in (False, True):
        seen: list[bool] = []
        train(amp=amp, hessian_interval=3, sophia="published", seen=[("on_train_start", watch)])
        assert not GPU or seen.count(True) > 2, seen


def test_training_with_sophia_h(train):
    train(optimizer="SophiaH", amp=False, epochs=2)


def test_resume(train):
    def interrupt(trainer) -> None:
        if trainer.epoch == 1:
            raise Interrupted

    last = train(amp=True, seen=[("on_fit_epoch_end", interrupt)])
    saved = torch.load(last, weights_only=False)["optimizer"]
    updates, refreshes = (saved["param_groups"][0][key] for key in ("hessian_updates", "refresh_index"))
    run = train(model=last, resume=True)
    assert run.trainer.start_epoch == 2 and run.trainer.epoch == 3
    assert run.group["hessian_updates"] == updates + run.seen > updates
    assert run.group["refresh_index"] > refreshes


@pytest.mark.parametrize("fraction", [1.0, 0.25], ids=["whole", "part"])
def test_compiled_training(train, fraction):
    run = train(compile=True, amp=False, epochs=2, hessian_fraction=fraction)
    assert hasattr(run.trainer.model, "_orig_mod"), "Ultralytics did not compile the model"


@pytest.mark.skipif(not GPU or torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_over_nccl(tiny_data, small_model, tmp_path, python):
    """Ultralytics starts the ranks itself; the model's weights and the counters end as those of rank 0."""
    code = f"""
import yolo_sophia; yolo_sophia.install()
from ultralytics import YOLO
YOLO({str(small_model)!r}).train(data={str(tiny_data)!r}, imgsz=64, epochs=2, batch=8, nbs=8, workers=0, device=[0, 1],
    optimizer="SophiaG", hessian_interval=2, plots=False, amp=False, project={str(tmp_path)!r}, name="run")
"""
    python("-c", code)
    saved = torch.load(tmp_path / "run/weights/last.pt", weights_only=False)["train_results"]
    assert saved["sophia/refreshes"][-1] > 0 and saved["sophia/dropped"][-1] == 0

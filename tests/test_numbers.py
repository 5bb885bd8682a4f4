"""Numbers and data that go wrong: the training goes on, or stops as plain Ultralytics would; h stays finite, >= 0."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from quirks import needs_recovery
from torch import Tensor
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from yolo_sophia.optim import SophiaG
from yolo_sophia.shapes import generate

pytestmark = pytest.mark.slow
STEPS = 4


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What Ultralytics and we say."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(
        record.getMessage().rpartition("\ufe0f ")[2]
    )  # without the sign of a warning
    LOGGER.addHandler(handler)
    yield lines
    LOGGER.removeHandler(handler)


@pytest.fixture
def train(tiny_run, log) -> Callable[..., Any]:
    """Train SophiaG for an epoch of four steps, a refresh at each; the trainer comes back with nothing but finite."""

    def run(at_start: Callable[[Any], None] = lambda trainer: None, **settings: Any) -> Any:
        given = {**tiny_run, "epochs": 1, "warmup_epochs": 0, "optimizer": "SophiaG", "hessian_interval": 1, **settings}
        model = YOLO(given.pop("model"))
        model.add_callback("on_train_start", at_start)
        kept: list[Any] = []
        model.add_callback("on_fit_epoch_end", lambda trainer: kept.append(trainer))
        model.train(**given)
        trainer = kept[-1]
        check(trainer.optimizer)
        assert all(p.isfinite().all() for p in trainer.model.parameters())
        assert all(p.isfinite().all() for p in trainer.ema.ema.parameters())
        return trainer

    return run


def check(optimizer: SophiaG) -> None:
    for state in optimizer.state.values():
        assert state["exp_avg"].isfinite().all()
        assert state["hessian"].isfinite().all() and (state["hessian"] >= 0).all()
    assert all(0 < group["rho"] < math.inf for group in optimizer.param_groups)


def clock(trainer: Any) -> dict[str, Any]:
    return trainer.optimizer.param_groups[0]


def at_call(number: int, original: Callable, instead: Callable) -> Callable:
    """`original`, but at the call of this number `instead`, which gets what the original returns."""
    calls = iter(range(10**6))
    return lambda *args, **kwargs: (
        instead(original(*args, **kwargs)) if next(calls) == number else original(*args, **kwargs)
    )


# Not finite -----------------------------------------------------------------------------------------------------------


@pytest.mark.compat
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss(value, train, log, monkeypatch):
    """The refresh's own pass and the training's pass of the second step."""
    original, calls = DetectionModel.loss, []

    def loss(self, *args, **kwargs):
        total, items = original(self, *args, **kwargs)
        calls.append(self.training)
        return (total * value if sum(calls) in {3, 4} and self.training else total), items

    monkeypatch.setattr(DetectionModel, "loss", loss)
    trainer = train(batch=8, nbs=8, hessian_fraction=0.5, epochs=2)
    assert clock(trainer)["hessian_updates"] == 2 * 2 - 1  # the estimate went with the step
    assert clock(trainer)["hessian_dropped"] == 1
    assert "SophiaG: dropped a Hessian estimate with a step that was skipped (1 so far)" in log
    assert "SophiaG: skipped a step, for the gradient is not finite (1 so far)" in log
    steps = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {2 * 2 - 1}


@pytest.mark.compat
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradient(value, train, log):
    def at_start(trainer):
        trainer._p = next(p for p in trainer.model.parameters() if p.requires_grad)
        trainer._p.register_hook(at_call(1, lambda g: g, lambda g: torch.full_like(g, value)))

    trainer = train(at_start, hessian_fraction=1.0)
    # The hook hears the estimator's pass first, then the training's.
    assert clock(trainer)["hessian_updates"] == STEPS - 1 and clock(trainer)["hessian_dropped"] == 1
    assert "SophiaG: skipped a step, for the gradient is not finite (1 so far)" in log


def test_steps_that_fail_again_and_again_do_not_flood_the_log(train, log):
    def at_start(trainer):
        p = next(p for p in trainer.model.parameters() if p.requires_grad)
        p.register_hook(lambda g: torch.full_like(g, math.nan))
        trainer._start = {k: v.clone() for k, v in trainer.model.state_dict().items() if "num_batches" not in k}

    trainer = train(at_start, epochs=3, hessian_fraction=1.0)
    said = [line for line in log if ": skipped a step" in line]
    assert [line.rsplit("(")[-1] for line in said] == [f"{n} so far)" for n in (1, 2, 4, 8)]
    assert all(torch.equal(p, trainer._start[k]) for k, p in trainer.model.named_parameters())


def test_a_large_gradient_is_no_overflow(train, log):
    def at_start(trainer):
        next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(lambda g: g * 1e25)

    trainer = train(at_start, hessian_interval=100)
    assert not [line for line in log if "skipped a step" in line]
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {STEPS}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_estimate(value, train, log):
    def at_start(trainer):
        def poisoned(found):
            found = list(found)
            found[3] = torch.full_like(found[3], value)
            return found

        trainer._sophia.estimator = at_call(1, trainer._sophia.estimator, poisoned)

    trainer = train(at_start)
    assert (clock(trainer)["hessian_updates"], clock(trainer)["hessian_dropped"]) == (STEPS - 1, 1)
    assert "SophiaG: dropped a Hessian estimate that is not finite (1 so far)" in log
    with trainer.csv.open(newline="") as file:
        assert [float(row["sophia/dropped"]) for row in csv.DictReader(file, skipinitialspace=True)] == [1]


@needs_recovery
def test_weights(train, log):
    """Of the second epoch; m and h come back from last.pt (tests/test_session.py compares them)."""

    def at_start(trainer):
        trainer.scaler.scale = at_call(STEPS, trainer.scaler.scale, lambda loss: spoil(trainer, loss))

    def spoil(trainer: Any, loss: Tensor) -> Tensor:
        trainer.model.get_parameter("model.0.conv.weight").data[0] = math.nan
        return loss

    trainer = train(at_start, epochs=3)
    assert any("recovering from last.pt" in line for line in log)
    assert any("skipped a step" in line for line in log)
    assert clock(trainer)["hessian_updates"] == 3 * STEPS and clock(trainer)["hessian_dropped"] == 0


# Zero and scale -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.04, "auto"])
@pytest.mark.parametrize("estimate", [0.0, 1.0])
def test_zero_gradients(rho, estimate):
    p = torch.nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    start = p.detach().clone()
    optimizer = SophiaG([p], lr=0.1, rho=rho, weight_decay=0.0, bias_correction=True, hessian_average="row")
    for _ in range(5):
        p.grad = torch.zeros_like(p)
        optimizer.update_hessian([torch.full_like(p, estimate)])
        optimizer.step()
    assert torch.equal(p, start)
    check(optimizer)


def test_scale_of_the_loss(train):
    """m and h have it, powers of two exactly, so that rho and the step are what they were."""
    scales, gains, seen = (1.0, 2.0**20, 2.0**-20), {"box": 7.5, "cls": 0.5, "dfl": 1.5}, []

    def at_start(trainer):
        first = len(seen)

        def look(trainer):
            if len(seen) == first:
                state = trainer.optimizer.state
                m, h = (torch.cat([s[key].flatten() for s in state.values()]) for key in ("exp_avg", "hessian"))
                seen.append((m, h, torch.cat([p.detach().flatten() for p in state]), clock(trainer)["rho"]))

        trainer.add_callback("on_train_batch_end", look)

    for scale in scales:
        train(at_start, **{key: value * scale for key, value in gains.items()})
    (m, h, p, rho), *others = seen
    for scale, (other_m, other_h, q, other_rho) in zip(scales[1:], others):
        assert torch.equal(other_m, m * scale) and torch.equal(other_h, h * scale)
        assert other_rho == pytest.approx(rho, rel=1e-6)
        sure = m.abs() * min(scale, 1) > 1e-12  # elsewhere eps = 1e-15 has a say
        assert sure.float().mean() > 0.3
        torch.testing.assert_close(q[sure], p[sure], rtol=0, atol=1e-5)  # lr is 2e-3


# Data -----------------------------------------------------------------------------------------------------------------


def data_set(folder: Path, images: int, change: Callable[[list[Path]], Any]) -> Path:
    root = generate(folder / "set", train=images, val=2, size=64)
    change(sorted((root / "labels" / "train").iterdir()))
    path = folder / "set.yaml"
    names = [f"c{i}" for i in range(9)]  # the last three never occur
    path.write_text(yaml.safe_dump({"path": str(root), "train": "images/train", "val": "images/val", "names": names}))
    return path


def empty(paths: list[Path]) -> None:
    for path in paths:
        path.write_text("")


@pytest.mark.parametrize(
    ("images", "change", "batch"),
    [
        pytest.param(4, empty, 2, id="background only"),
        pytest.param(4, lambda paths: empty(paths[:1]), 1, id="an empty label file, batch 1"),
        pytest.param(4, lambda paths: paths[0].unlink(), 4, id="no label file"),
        pytest.param(1, lambda paths: None, 1, id="one image"),
    ],
)
def test_data(images, change, batch, train, tmp_path):
    """With classes that never occur in every one of them."""
    data = data_set(tmp_path, images, change)
    trainer = train(data=str(data), batch=batch, nbs=batch, epochs=2)
    assert clock(trainer)["hessian_dropped"] == 0
    assert clock(trainer)["hessian_updates"] == 2 * images // batch
    head = trainer.model.model[-1]
    never = head.cv3[0][-1].bias  # of 9 classes at the finest scale
    assert (trainer.optimizer.state[never]["hessian"][6:] > 0).all()  # sampled labels have every class


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.compat
@pytest.mark.parametrize("fraction", [1.0, 0.5], ids=["all images", "half of them"])
def test_out_of_memory_in_a_refresh(fraction, train, log):
    """Of the second epoch, where Ultralytics would give up; batches of 16, a step each."""
    images, estimate = [], None

    def at_start(trainer):
        nonlocal estimate
        estimate, trainer._sophia.estimator = trainer._sophia.estimator, failing

        def see(trainer):
            images.append(trainer._sophia.window.staged_images)

        trainer.add_callback("on_hessian_update", see)

    calls = iter(range(100))

    def failing(*args):
        found = estimate(*args)
        if next(calls) in {1, 2}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return found

    trainer = train(at_start, batch=16, nbs=16, epochs=5, hessian_fraction=fraction)
    assert trainer.batch_size == 16
    assert (clock(trainer)["hessian_updates"], clock(trainer)["hessian_dropped"]) == (3, 2)
    assert clock(trainer)["refresh_index"] == 5  # what was drawn keeps its number
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {5}
    begun = int(16 * fraction)
    assert images == [begun, 4, 4]
    said = [line for line in log if "out of memory" in line]
    assert said == [
        f"SophiaG: out of memory in a Hessian update on {n} of 16 images; it is skipped, and the next one takes {m}"
        for n, m in ((begun, max(begun // 2, 4)), (max(begun // 2, 4), 4))
    ]
    assert not any("not finite" in line for line in log)


def test_another_error_in_a_refresh_is_not_hidden(train):
    def at_start(trainer):
        def failing(*args):
            raise RuntimeError("shapes do not fit")

        trainer._sophia.estimator = failing

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(at_start)

"""What a SophiaG training does in this process: what it shows, what it leaves alone, and how it gets over failures."""

from __future__ import annotations

import csv
import hashlib
import inspect
import logging
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from quirks import needs_recovery
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER
from ultralytics.utils.patches import torch_load

from yolo_sophia.curvature import Hutchinson
from yolo_sophia.integration import monitor
from yolo_sophia.integration import window as accumulation
from yolo_sophia.integration.auto_lr import NEW_RATE, ultralytics_rate
from yolo_sophia.optim import SophiaG, SophiaH
from yolo_sophia.presets import load_preset

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from verify_bit_identity import largest_difference

pytestmark = [pytest.mark.slow, pytest.mark.compat]

COLUMNS = (
    "clip_fraction",
    "grad_norm",
    "momentum_norm",
    "hessian_norm",
    "update_norm",
    "rho",
    "refreshes",
    "dropped",
    "refresh_seconds",
)
BASE = {"imgsz": 64, "epochs": 1, "batch": 4, "nbs": 4, "device": "cpu", "plots": False, "val": False, "seed": 0}
SCRATCH = load_preset("detect-scratch").settings
STEPS = 4  # per epoch: 16 images in batches of 4, a step each


@dataclass
class Run:
    """A finished training and what went past while it ran."""

    model: YOLO
    trainer: Any = None
    log: str = ""
    batches: list[str] = field(default_factory=list)  # hash of each training batch
    start: dict[str, torch.Tensor] = field(default_factory=dict)  # parameters before the first step
    buffers: list[list[torch.Tensor]] = field(default_factory=list)  # BatchNorm's, after each batch
    lrs: list[dict[str, float]] = field(default_factory=list)  # by kind of group, at each batch
    norms: list[float] = field(default_factory=list)  # of the gradient that a step gets
    figures: list[tuple[float, ...]] = field(default_factory=list)  # clip fraction, norms of m and h, after each step
    metrics: list[dict[str, float]] = field(default_factory=list)  # what loggers read at each epoch's end
    hessians: list[list[torch.Tensor]] = field(default_factory=list)  # h after each update

    @property
    def rows(self) -> list[dict[str, float]]:
        with self.trainer.csv.open(newline="") as file:
            return [{k.strip(): float(v) for k, v in row.items()} for row in csv.DictReader(file)]

    @property
    def clock(self) -> dict[str, Any]:
        return self.trainer.optimizer.param_groups[0]


class Watching(DetectionTrainer):
    """Hands every training batch to `see`."""

    def preprocess_batch(self, batch):
        batch = super().preprocess_batch(batch)
        for see in self.callbacks["see_batch"]:
            see(batch)
        return batch


def figures(optimizer: SophiaG) -> tuple[float, ...]:
    """Clip fraction and norms of m and h, the plain way: over one long vector."""
    m, h, bound = [], [], []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p in optimizer.state:
                state = optimizer.state[p]
                corrected = state["hessian"] / (1 - group["betas"][1] ** state["hessian_updates"])
                m.append(state["exp_avg"].flatten())
                h.append(corrected.flatten())
                bound.append(group["rho"] * h[-1] + group["eps"])
    m, h, bound = torch.cat(m), torch.cat(h), torch.cat(bound)
    return (m.abs() >= bound).double().mean().item(), m.norm().item(), h.norm().item()


def watch(run: Run) -> dict[str, Callable]:
    """Callbacks that fill a `Run`."""

    def see_batch(batch):
        digest = hashlib.sha256()
        for key in ("img", "cls", "bboxes", "batch_idx"):
            digest.update(batch[key].contiguous().numpy().tobytes())
        run.batches.append(digest.hexdigest())

    def on_train_start(trainer):
        run.start = {k: p.detach().clone() for k, p in trainer.model.named_parameters()}
        trainer.optimizer.register_step_pre_hook(
            lambda *_: run.norms.append(
                torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).norm().item()
            )
        )

    def on_train_batch_end(trainer):
        run.buffers.append([b.clone() for b in trainer.model.buffers()])
        names = ("bias", "weight", "bn")  # Ultralytics before 8.4 names no groups
        groups = zip(names, trainer.optimizer.param_groups)
        run.lrs.append({group.get("param_group", name): group["lr"] for name, group in groups})
        if isinstance(trainer.optimizer, SophiaG) and trainer.optimizer.state:
            run.figures.append(figures(trainer.optimizer))

    def on_hessian_update(trainer):
        run.hessians.append([s["hessian"].clone() for s in trainer.optimizer.state.values()])

    def on_fit_epoch_end(trainer):
        run.metrics.append(dict(trainer.metrics))

    def while_running(callback):
        return lambda argument: callback(argument) if run.trainer is None else None

    callbacks = (see_batch, on_train_start, on_train_batch_end, on_hessian_update, on_fit_epoch_end)
    return {callback.__name__: while_running(callback) for callback in callbacks}


@pytest.fixture(scope="module")
def train(tiny_data, tiny_model, tmp_path_factory) -> Callable[..., Run]:
    """Train SophiaG on the tiny set with other settings than `BASE`'s; `callbacks` go to the model."""

    def run_training(trainer=Watching, callbacks=(), optimizer="SophiaG", model=None, **settings) -> Run:
        run = Run(model or YOLO(tiny_model))
        for event, callback in [*watch(run).items(), *callbacks]:
            run.model.add_callback(event, callback)
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        LOGGER.addHandler(handler)
        project = str(tmp_path_factory.mktemp("runs"))
        try:
            ours = {"hessian_warmup": 0} if "sophia" in optimizer.lower() else {}  # refreshes by the interval alone
            given = BASE | ours | settings
            run.model.train(trainer=trainer, **given, optimizer=optimizer, data=str(tiny_data), project=project)
        finally:
            LOGGER.removeHandler(handler)
        run.trainer, run.log = run.model.trainer, "\n".join(lines)
        return run

    return run_training


@pytest.fixture(scope="module")
def sophia(train) -> Run:
    """Three epochs with validation and plots; the Hessian is refreshed at every fifth of the 12 steps."""
    return train(epochs=3, val=True, plots=True, hessian_interval=5, rho=0.3)


@pytest.fixture(scope="module")
def adamw(train) -> Run:
    """The same with AdamW."""
    return train(optimizer="AdamW", epochs=3, val=True, lr0=0.001, momentum=0.9)


# What one sees --------------------------------------------------------------------------------------------------------


def test_results_csv_and_loggers_get_the_figures(sophia):
    rows = sophia.rows
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [key for key in rows[0] if key.startswith("sophia/")] == [f"sophia/{name}" for name in COLUMNS]
    for epoch, (row, metrics) in enumerate(zip(rows, sophia.metrics), 1):
        assert 0 <= row["sophia/clip_fraction"] <= 1
        assert row["sophia/rho"] == 0.3
        assert row["sophia/refreshes"] == math.ceil(epoch * STEPS / 5)
        assert row["sophia/dropped"] == 0
        assert all(row[f"sophia/{name}"] > 0 for name in ("momentum_norm", "hessian_norm"))
        for name in COLUMNS:  # what TensorBoard, W&B and the others log; the file has six digits
            assert metrics[f"sophia/{name}"] == pytest.approx(row[f"sophia/{name}"], rel=1e-4, nan_ok=True)


def test_columns_stay_in_place_in_epochs_without_validation(train):
    rows = train(epochs=4, hessian_interval=1, rho=0.3).rows
    for epoch, row in enumerate(rows, 1):
        assert (row["sophia/rho"], row["sophia/refreshes"]) == (0.3, epoch * STEPS)
        assert 0 < row["lr/pg0"] == row["lr/pg1"] == row["lr/pg2"] <= 0.01


def test_each_epoch_has_a_gradient_norm_however_few_its_steps(train):
    run = train(epochs=4, batch=8, nbs=8, hessian_interval=10)  # two steps an epoch, and a sample at every tenth
    assert all(row["sophia/grad_norm"] > 0 for row in run.rows)


def test_figures_are_those_of_the_sampled_steps(train, monkeypatch):
    monkeypatch.setattr(monitor, "SAMPLE_EVERY", 3)
    run = train(epochs=2, hessian_interval=2, warmup_epochs=0)
    for row, first in zip(run.rows, (0, STEPS)):  # the first and the fourth step of an epoch of four
        sampled = torch.tensor([run.figures[i] for i in (first, first + 3)], dtype=torch.float64)
        shown = [row[f"sophia/{name}"] for name in ("clip_fraction", "momentum_norm", "hessian_norm")]
        assert shown == pytest.approx(sampled.mean(0).tolist(), rel=1e-4)
        assert row["sophia/grad_norm"] == pytest.approx((run.norms[first] + run.norms[first + 3]) / 2, rel=1e-4)


def test_on_hessian_update_is_a_callback_of_ultralytics(sophia):
    assert len(sophia.hessians) == sophia.clock["hessian_updates"] == math.ceil(3 * STEPS / 5)


def test_picture_beside_results_png(sophia):
    picture = sophia.trainer.save_dir / "sophia.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (sophia.trainer.save_dir / "results.png").is_file()
    assert picture in sophia.trainer.plots


def test_start_line_says_what_is_used_and_why(sophia):
    assert "preset 'detect-scratch', chosen for a training from scratch of 12 steps" in sophia.log
    (line,) = [line for line in sophia.log.splitlines() if "SophiaG:" in line]
    for part in (
        "preset 'detect-scratch' (studied)",
        "hessian_estimator=gnb (preset)",
        "hessian_interval=5 (explicit)",
        "rho=0.3 (explicit)",
        f"lr0={SCRATCH['lr0']} (preset)",
    ):
        assert part in line
    (line,) = [line for line in sophia.log.splitlines() if "optimizer:" in line and "parameter groups" in line]
    assert f"SophiaG(lr={SCRATCH['lr0']}" in line
    assert "AdamW" not in line


def test_second_training_with_adamw_has_no_trace_of_sophia(sophia, train, tiny_model):
    sophia.model.overrides.setdefault("model", str(tiny_model))  # 8.3.253 to 8.4.100 lose it, and end in a KeyError
    run = train(model=sophia.model, optimizer="AdamW", lr0=0.001, plots=True)
    assert type(run.trainer.optimizer) is torch.optim.AdamW
    assert not run.hessians
    assert not [key for key in run.rows[0] if "sophia" in key]
    assert not [key for metrics in run.metrics for key in metrics if "sophia" in key]
    assert "ophia" not in run.log
    assert not {"_sophia", "preprocess_batch", "optimizer_step", "save_metrics", "plot_metrics"} & set(
        vars(run.trainer)
    )
    assert "scale" not in vars(run.trainer.scaler)
    assert not (run.trainer.save_dir / "sophia.png").exists()
    text = (run.trainer.save_dir / "args.yaml").read_text()
    assert not [word for word in ("sophia", "rho:", "hessian", "beta2") if word in text.replace("yolo_sophia", "")]


# What it leaves alone -------------------------------------------------------------------------------------------------


def test_data_stream_is_that_of_adamw(sophia, adamw):
    assert len(sophia.batches) == 3 * STEPS
    assert len(set(sophia.batches)) == 3 * STEPS  # the hash sees the augmentation
    assert sophia.batches == adamw.batches


@pytest.mark.parametrize("batch", [4, 8], ids=["estimates on all images", "on four of eight"])
def test_refresh_leaves_batchnorm_buffers_alone(train, batch):
    settings = {"warmup_epochs": 0, "batch": batch, "nbs": batch, "epochs": batch // 4}
    always, seldom = (train(hessian_interval=k, bn_momentum=0.03, **settings) for k in (1, 10**6))
    assert (len(always.hessians), len(seldom.hessians)) == (STEPS, 1)
    # Both refresh before the first step, so the weights are alike up to the second forward pass; there only one does.
    for i in (0, 1):
        assert all(map(torch.equal, always.buffers[i], seldom.buffers[i]))
    assert not all(map(torch.equal, always.buffers[2], seldom.buffers[2]))
    plain = train(optimizer="AdamW", **settings)
    assert all(map(torch.equal, always.buffers[0], plain.buffers[0]))


def test_gradient_reaches_the_step_unclipped(train, adamw):
    run = train(warmup_epochs=0)
    assert max(adamw.norms) <= 10.001  # Ultralytics' clip
    assert max(run.norms) > 10.1
    beta1 = run.clock["betas"][0]
    assert run.figures[0][1] == pytest.approx((1 - beta1) * run.norms[0], rel=1e-5)


def test_trainer_with_its_own_optimizer_step_keeps_it(train):
    class Clipping(Watching):
        def optimizer_step(self):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update(self.model)

    run = train(trainer=Clipping, hessian_interval=2)
    assert run.norms == pytest.approx([0.1] * STEPS, rel=1e-3)
    assert run.clock["hessian_updates"] == len(run.hessians) == 2
    assert all(h.isfinite().all() for h in run.hessians[-1])


# Settings -------------------------------------------------------------------------------------------------------------


def test_bias_groups_start_without_the_sgd_warmup(sophia, train):
    assert sophia.lrs[0] == {"weight": 0, "bn": 0, "bias": 0}
    assert all(lrs["bias"] == lrs["weight"] for lrs in sophia.lrs)
    typed = train(epochs=2, warmup_bias_lr=0.1)
    assert typed.lrs[0]["bias"] == 0.1
    assert typed.lrs[0]["weight"] == 0


def test_empirical_fisher_gives_another_curvature(sophia, train):
    run = train(hessian_estimator="empirical_fisher")
    assert "hessian_estimator=empirical_fisher (explicit)" in run.log
    first, other = (torch.cat([h.flatten() for h in r.hessians[0]]) for r in (sophia, run))
    assert run.batches[0] == sophia.batches[0]
    assert other.isfinite().all()
    assert (other >= 0).all()
    assert ((first - other).norm() / first.norm()).item() > 0.1


def test_momentum_of_batchnorm_is_set_where_it_is_asked_for(sophia, train):
    def momenta(run: Run) -> set[float]:
        return {m.momentum for m in run.trainer.model.modules() if isinstance(m, torch.nn.BatchNorm2d)}

    assert momenta(train(bn_momentum=0.2)) == {0.2}
    assert momenta(sophia) == {SCRATCH["bn_momentum"]}
    assert momenta(train(optimizer="torch.optim.AdamW", bn_momentum=0.2)) == {0.2}


@pytest.mark.parametrize("optimizer", ["SophiaG", "torch.optim.AdamW", "SGD"])
def test_the_head_learns_at_a_rate_of_its_own_where_it_is_asked_for(train, optimizer):
    run = train(optimizer=optimizer, lr_factors={"head": 4.0})
    groups, model = run.trainer.optimizer.param_groups, run.trainer.model
    rates = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    head = {id(p) for p in model.model[-1].parameters()}
    lr0 = run.trainer.args.lr0
    assert {rate for p, rate in rates.items() if p in head} == {4 * lr0}
    assert {rate for p, rate in rates.items() if p not in head} == {lr0}
    assert rates.keys() == {id(p) for p in model.parameters()}
    first, last = groups[1], groups[-1]
    assert last["lr"] == pytest.approx(4 * first["lr"])  # the schedule is the same
    plain = train(optimizer=optimizer).trainer.optimizer.param_groups
    assert {group["initial_lr"] for group in plain} == {lr0}
    assert len(plain) == 3
    decays = [sum(p.numel() for g in found for p in g["params"] if g["weight_decay"]) for found in (groups, plain)]
    assert decays[0] == decays[1]


def test_auto_gives_what_is_new_its_own_rate(train):
    run = train(sophia="detect-finetune", lr_factors={"new": "auto"})
    args, groups = run.trainer.args, run.trainer.optimizer.param_groups
    lr, factor = ultralytics_rate(6), NEW_RATE / args.lr0
    assert (args.lr0, args.lr_factors) == (lr, {"new": pytest.approx(factor, rel=1e-3)})
    assert {g["initial_lr"] for g in groups if g["params"]} == {lr * args.lr_factors["new"]}  # from scratch
    assert "others" not in run.log and "6 new, 0 copied by name" in run.log
    trained = train(lr0=0.05, warmup_epochs=0).trainer.last
    again = train(sophia="detect-finetune", lr_factors={"new": "auto"}, model=YOLO(trained))
    assert {g["initial_lr"] for g in again.trainer.optimizer.param_groups if g["params"]} == {again.trainer.args.lr0}
    assert re.search("class rows: [01] new, [56] copied by name", again.log)  # in four steps, a row may stay as it was
    resumed = torch_load(run.trainer.last, weights_only=False)["train_args"]
    assert resumed["lr_factors"] == args.lr_factors  # the number
    assert "model.22.cv3.0.2.weight" in resumed["sophia_new_rows"]


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_sophia_h_differentiates_the_loss_twice(train, monkeypatch, fraction):
    made, estimate, plain = [], Hutchinson.__call__, {"beta2": 0.5, "hessian_average": "element"}

    def recording(self, loss, params, generator):
        estimates = estimate(self, loss, params, generator)
        made.append((loss.detach(), [e if e is None else e.clone() for e in estimates]))
        return estimates

    monkeypatch.setattr(Hutchinson, "__call__", recording)
    run = train(optimizer="sophiah", batch=8, nbs=8, hessian_interval=1, hessian_fraction=fraction, **plain)
    assert "SophiaH:" in run.log and "hessian_estimator=hutchinson (optimizer)" in run.log
    assert type(run.trainer.optimizer) is SophiaH and run.clock["hessian_updates"] == len(made) == 2
    assert run.clock["hessian_dropped"] == 0 and all(loss.dim() == 0 for loss, _ in made)
    expected = [e * 0.5 / fraction for e in made[0][1] if e is not None]  # of 8 images from 8 or 4, b2 = 0.5
    for h, e in zip(run.hessians[0], expected):
        torch.testing.assert_close(h, e)
    h = torch.cat([h.flatten() for h in run.hessians[-1]])
    assert h.isfinite().all() and 0.05 < float((h < 0).float().mean()) < 0.95
    assert run.rows[0]["sophia/clip_fraction"] >= float((h < 0).float().mean()) / 2  # a negative h counts as clipped


def test_frozen_layers(train):
    run = train(freeze=5, warmup_epochs=0)
    frozen = {name for name in run.start if int(name.split(".")[1]) < 5 or ".dfl." in name}
    assert len(frozen) > 20
    for name, p in run.trainer.model.named_parameters():
        assert torch.equal(p, run.start[name]) == (name in frozen), name
        assert (p in run.trainer.optimizer.state) == (name not in frozen), name


# Failures that Ultralytics gets over ----------------------------------------------------------------------------------


def once(original: Callable, failure: Callable[[], Any], call: int = 0) -> Callable:
    """`original`, but for one call, which does `failure` instead."""
    calls = iter(range(10**6))
    return lambda *args, **kwargs: failure() if next(calls) == call else original(*args, **kwargs)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.requires(hasattr(DetectionTrainer, "_build_train_pipeline"), reason="this Ultralytics has no restart")
@pytest.mark.parametrize("where", ["first forward", "second forward"])
def test_out_of_memory_restart(train, monkeypatch, where):
    counts, optimizers = [], []
    reduce = accumulation.reduce_over_ranks
    monkeypatch.setattr(
        accumulation,
        "reduce_over_ranks",
        lambda e, window, staged, *rest: counts.append((sum(window), staged)) or reduce(e, window, staged, *rest),
    )

    def on_train_start(trainer):
        optimizers.append(trainer.optimizer)
        # The first call is the refresh's own pass.
        trainer.model.predict = once(trainer.model.predict, out_of_memory, 2 if where == "second forward" else 1)

    # Windows of two batches of 8; after the restart of four batches of 4.
    run = train(
        callbacks=[("on_train_start", on_train_start)], batch=8, nbs=16, epochs=2, warmup_epochs=0, hessian_interval=1
    )
    assert run.trainer.batch_size == 4
    assert "out of memory" in run.log
    again = "build_optimizer" in inspect.getsource(DetectionTrainer._build_train_pipeline)  # so did the first versions
    assert (run.trainer.optimizer is optimizers[0]) == (not again)
    assert counts == [(16, 4), (16, 4)]
    assert run.clock["hessian_updates"] == run.rows[-1]["sophia/refreshes"] == 2
    # An estimate that was drawn and lost in the restart keeps its number: its noise is not drawn again.
    assert run.clock["refresh_index"] == (2 if again else 3)
    assert all(h.isfinite().all() for h in run.hessians[-1])
    assert isinstance(run.trainer.model.criterion.bce, torch.nn.Module)  # nothing listens to it any more


@needs_recovery
@pytest.mark.parametrize("interval", [3, 1])
def test_nan_recovery(train, monkeypatch, interval):
    recovered, batches = [], []

    class Recovering(Watching):
        def _load_checkpoint_state(self, ckpt):
            super()._load_checkpoint_state(ckpt)
            saved = torch_load(self.last, map_location="cpu")["optimizer"]
            loaded = self.optimizer.state_dict()
            for group in [*saved["param_groups"], *loaded["param_groups"]]:
                group.pop("fused", None)  # Ultralytics adds this key as it loads
            recovered.append((largest_difference(saved, loaded), dict(self.optimizer.param_groups[0])))

    def poisoned(self, batch, preds=None):
        total, items = loss(self, batch, preds)
        bad = self.training and not recovered and len(batches) in {2 * STEPS - 1, 2 * STEPS}  # second epoch, last two
        return (total * math.nan if bad else total), items

    loss = DetectionModel.loss
    monkeypatch.setattr(DetectionModel, "loss", poisoned)
    run = train(trainer=Recovering, callbacks=[("see_batch", batches.append)], epochs=3, hessian_interval=interval)
    (((tensors, difference), clock),) = recovered
    assert len(batches) == 4 * STEPS
    assert "dropped a Hessian estimate with a step that was skipped" in run.log  # a refresh was due on a bad batch
    assert tensors > 500
    assert difference == 0
    assert clock["hessian_updates"] == clock["refresh_index"] == math.ceil(STEPS / interval)
    # From there on the counters are those of a run to which nothing happened.
    assert run.clock["hessian_updates"] == run.clock["refresh_index"] == math.ceil(3 * STEPS / interval)
    assert run.clock["hessian_dropped"] == 0
    assert all(h.isfinite().all() and (h >= 0).all() for h in run.hessians[-1])
    assert [row["epoch"] for row in run.rows] == [1, 2, 3]
    assert all(math.isfinite(value) for row in run.rows for value in row.values())
    # The first step of an epoch is sampled; that of the bad epoch is not in the row of its repetition.
    assert run.rows[1]["sophia/grad_norm"] == pytest.approx(run.norms[2 * STEPS - 2], rel=1e-4)  # two made no step

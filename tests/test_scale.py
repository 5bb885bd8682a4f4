"""Scale of h in real trainings: E[h_hat] is the diagonal of the sum of the losses that this step's gradient comes from.

The rule: what a test compares with is counted by `Watched` (images that passed `preprocess_batch`), never by the
session. With beta2 = 0 the h after an update is the committed estimate itself.
"""

from __future__ import annotations

import copy
import csv
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import curvature_oracle as oracle
import pytest
import torch
from torch import Tensor
from ultralytics.models.yolo.detect import DetectionTrainer

pytestmark = [pytest.mark.slow, pytest.mark.compat]

SOPHIA = {"optimizer": "SophiaG", "sophia": "published", "hessian_interval": 1, "beta2": 0.0, "warmup_epochs": 0.0}


@pytest.fixture(autouse=True)
def _installed():
    from yolo_sophia import install, installed, uninstall

    before = installed()
    install()
    yield
    if not before:
        uninstall()


class Stop(Exception):
    """Ends a training where the test has seen enough, as a crash does."""


@dataclass
class Commit:
    """One update of h.

    Attributes:
        index: Number of the estimate.
        step: Optimizer steps before it.
        counted: Images of each micro-batch since the last step.
        images: The session's own (images of the window, images estimated).
        raw: The estimator's answer, flat.
        h: h after the update, flat.
        grad: Gradient of the window, flat.
    """

    index: int
    step: int
    counted: list[int]
    images: tuple[int, int]
    raw: Tensor
    h: Tensor
    grad: Tensor


class Watched(DetectionTrainer):
    """A trainer that counts for itself."""

    stop_after = math.inf  # commits

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.counted: list[int] = []
        self.windows: list[list[int]] = []  # of the steps taken
        self.commits: list[Commit] = []
        self.estimates: list[list[Tensor | None]] = []  # the estimator's answers
        self.scales: list[float] = []  # what it was to scale its cotangents by
        self.before_first: list[Tensor] = []
        self.wrap_estimator: Callable[[Callable], Callable] = lambda estimator: estimator
        self.add_callback("on_train_start", lambda trainer: trainer.watch())
        self.add_callback("on_hessian_update", Watched.note)

    def watch(self) -> None:
        estimator = self.wrap_estimator(self._sophia.estimator)

        def remember(terms, params, generator, scale=1.0):
            self.scales.append(scale)
            found = estimator(terms, params, generator, scale)
            self.estimates.append([None if e is None else e.clone() for e in found])
            return found

        self._sophia.estimator = remember
        self.optimizer.register_step_post_hook(lambda *_: (self.windows.append(self.counted), self.restart_count()))
        self.before_first = [p.detach().clone() for p in self.params]

    def restart_count(self) -> None:
        self.counted = []

    def note(self) -> None:
        session, raw = self._sophia, self.estimates[-1]
        self.commits.append(
            Commit(
                index=session.schedule["refresh_index"] - 1,
                step=len(self.windows),
                counted=list(self.counted),
                images=(sum(session.window.batches), session.window.staged_images),
                raw=torch.cat(
                    [torch.zeros_like(p).flatten() if e is None else e.flatten() for e, p in zip(raw, self.params)]
                ),
                h=self.state("hessian"),
                grad=torch.cat([p.grad.flatten() for p in self.params]),
            )
        )
        if len(self.commits) >= self.stop_after:
            raise Stop

    @property
    def params(self) -> list[Tensor]:
        """Trained parameters in the order of the groups; all others (the DFL bins) take no part in anything here."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def state(self, key: str) -> Tensor:
        return torch.cat([self.optimizer.state[p][key].flatten() for p in self.params]).clone()

    def preprocess_batch(self, batch):
        batch = super().preprocess_batch(batch)
        self.counted.append(len(batch["img"]))
        return batch


def train(trainer_class: type[Watched], run: dict, wrap_estimator: Callable | None = None, **changes: Any) -> Watched:
    trainer = trainer_class(overrides={**run, **SOPHIA, **changes})
    if wrap_estimator:
        trainer.wrap_estimator = wrap_estimator
    try:
        trainer.train()
    except Stop:
        pass
    return trainer


def check_factors(trainer: Watched, estimated: int | None = None) -> list[float]:
    """Every update of h is the estimate times images counted over images estimated; returns these factors.

    Without their number, all images of the first micro-batch were estimated.
    """
    factors = []
    for commit in trainer.commits:
        images = estimated or commit.counted[0]
        assert commit.images == (sum(commit.counted), images)
        factors.append(sum(commit.counted) / images)
        torch.testing.assert_close(commit.h, commit.raw * factors[-1], rtol=1e-6, atol=0)
        assert commit.raw.any()
    return factors


def test_four_copies_of_a_micro_batch_give_four_times_its_h(tiny_run):
    class Copies(Watched):
        stop_after, first = 1, None

        def preprocess_batch(self, batch):
            if Copies.first is None:
                Copies.first = copy.deepcopy(batch)
            return super().preprocess_batch(copy.deepcopy(Copies.first))

    (one,) = train(Copies, tiny_run, nbs=4).commits
    (four,) = train(Copies, tiny_run, nbs=16).commits
    assert (one.counted, four.counted) == ([4], [4] * 4)
    torch.testing.assert_close(four.h, 4 * one.h, rtol=1e-6, atol=0)
    assert four.h.any()
    # As the objective: its gradient is four times that of one, too.
    torch.testing.assert_close(four.grad, 4 * one.grad, rtol=1e-3, atol=1e-5 * float(four.grad.abs().max()))


def watched(model: torch.nn.Module, micro: list[dict[str, Tensor]]) -> type[Watched]:
    """A trainer of this model on these micro-batches: windows of all of them, each beginning one further on."""

    class Rotated(Watched):
        stop_after, calls = len(micro), 0

        def get_model(self, cfg=None, weights=None, verbose=True):
            return copy.deepcopy(model)

        def preprocess_batch(self, batch):
            window, place = divmod(self.calls, len(micro))
            self.calls += 1
            batch = micro[(window + place) % len(micro)]
            self.counted.append(len(batch["img"]))
            return dict(batch)

    return Rotated


def expectation(_):
    """In the place of an estimator, what it gives in expectation over the sampled labels."""

    def estimator(terms, params, generator, scale=1.0):
        flat = oracle.expected_estimate(terms, params)
        return [x.view_as(p) for x, p in zip(flat.split([p.numel() for p in params]), params)]

    return estimator


def exact_diagonal(trainer: Watched, run: oracle.Pass, batch: dict[str, Tensor]) -> Tensor:
    """The diagonal from the loss formula, flat, in the order of the trainer's parameters."""
    order = [id(p) for p in trainer.params]
    place = {name: order.index(id(p)) for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert sorted(place) == sorted(run.names)
    exact = oracle.exact_diagonals(run, batch)
    parts = sum(exact[t] for t in run.terms).split([p.numel() for p in run.params])
    return torch.cat([part for _, part in sorted(zip((place[n] for n in run.names), parts))])


STILL = {"lr0": 0.0, "warmup_bias_lr": 0.0, **oracle.GAINS}  # the model does not move


def test_expectation_is_the_diagonal_of_the_sum_of_unequal_micro_batches(tiny_run):
    """Over which micro-batch is the first one, and over all sampled labels."""
    with oracle.float64():
        micro = [oracle.random_batch(seed=i, images=2, boxes=n, size=32) for i, n in enumerate((1, 3, 8))]
        model = oracle.tiny_detector()
        trainer = train(watched(model, micro), tiny_run, expectation, nbs=12, epochs=5, **STILL)
        assert check_factors(trainer) == [3.0] * 3

        runs = [oracle.forward(model, batch) for batch in micro]
        totals = [float(oracle.formula(run, batch).target_scores.sum()) for run, batch in zip(runs, micro)]
        exact = [exact_diagonal(trainer, run, batch) for run, batch in zip(runs, micro)]
        mean = sum(commit.h for commit in trainer.commits) / 3
        torch.testing.assert_close(mean, sum(exact), rtol=1e-6, atol=1e-9)

        # The three differ, so none of them alone would do, nor the same images as one batch.
        assert max(totals) > 2 * min(totals)
        for commit, one in zip(trainer.commits, exact):
            torch.testing.assert_close(commit.h, 3 * one, rtol=1e-6, atol=1e-9)
            assert abs(float(commit.h.sum() / mean.sum()) - 1) > 0.05
        merged = {key: torch.cat([batch[key] for batch in micro]) for key in micro[0]}
        merged["batch_idx"] = torch.cat([batch["batch_idx"] + 2 * i for i, batch in enumerate(micro)])
        one_batch = exact_diagonal(trainer, oracle.forward(model, merged), merged)
        assert abs(float(one_batch.sum() / mean.sum()) - 1) > 0.05


def test_expectation_of_a_part_is_its_diagonal_times_the_images(tiny_run):
    with oracle.float64():
        batch = oracle.random_batch(images=6, boxes=2, size=32)
        model = oracle.tiny_detector()
        trainer = train(watched(model, [batch]), tiny_run, expectation, nbs=4, hessian_fraction=0.5, **STILL)
        assert check_factors(trainer, estimated=4) == [6 / 4]
        part = {**{key: batch[key][:8] for key in ("batch_idx", "cls", "bboxes")}, "img": batch["img"][:4]}
        exact = exact_diagonal(trainer, oracle.forward(model, part), part)
        torch.testing.assert_close(trainer.commits[0].h, 6 / 4 * exact, rtol=1e-6, atol=1e-9)


def test_factor_follows_accumulation_through_warm_up(tiny_run):
    trainer = train(Watched, tiny_run, batch=2, nbs=8, epochs=3, warmup_epochs=2.0)
    factors = check_factors(trainer)
    assert len(factors) == len(trainer.windows) and [c.counted for c in trainer.commits] == trainer.windows
    # Before 8.4 the ramp takes at least 100 batches: this run sees its beginning only.
    assert factors == sorted(factors) and set(factors) in ({1.0, 2.0, 3.0, 4.0}, {1.0, 2.0})


@pytest.mark.parametrize(
    ("fraction", "estimated", "factors"), [(1.0, None, [12 / 6, 10 / 4, 10 / 6]), (0.25, 4, [12 / 4, 10 / 4, 10 / 4])]
)
def test_short_last_batch_counts_images(tiny_run, fraction, estimated, factors):
    trainer = train(Watched, tiny_run, batch=6, nbs=12, epochs=2, hessian_fraction=fraction)
    assert trainer.windows == [[6, 6], [4, 6], [6, 4]]
    assert check_factors(trainer, estimated) == factors


def test_a_last_batch_of_too_few_images_gives_no_estimate(tiny_run):
    """BatchNorm's statistics over one image would bias h; the next micro-batch gives the estimate."""
    trainer = train(Watched, tiny_run, batch=5, nbs=5, epochs=2)
    assert trainer.windows == [[5], [5], [5], [1]] * 2
    assert [commit.step for commit in trainer.commits] == [0, 1, 2, 4, 5, 6]
    joined = train(Watched, tiny_run, batch=5, nbs=20, epochs=2, fraction=0.4)  # 6 images: batches of 5 and 1
    assert all(commit.images[1] == 5 for commit in joined.commits)
    small = train(Watched, tiny_run, batch=1, nbs=1, epochs=1)
    assert check_factors(small) == [1.0] * 16


def test_cleared_gradients_begin_a_new_window(tiny_run):
    """Ultralytics clears them after a failed epoch and when it ran out of memory: the estimate goes with them."""

    def clear(trainer):
        if len(trainer.estimates) == 1 and not trainer.windows and len(trainer.counted) == 2:
            trainer.optimizer.zero_grad()
            trainer.restart_count()

    class Clears(Watched):
        def watch(self):
            super().watch()
            self.add_callback("on_train_batch_end", clear)

    trainer = train(Clears, tiny_run, nbs=16)
    assert trainer.windows == [[4, 4], [4] * 4] and len(trainer.estimates) == 3
    assert check_factors(trainer) == [2.0, 4.0]


def test_first_step_after_resume_has_one_micro_batch(tiny_run):
    def crash(trainer):
        if trainer.epoch == 1:
            raise Stop

    class Crashes(Watched):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback("on_train_epoch_start", crash)

    first = train(Crashes, tiny_run, nbs=16, epochs=3)
    assert check_factors(first) == [4.0]
    resumed = Watched(overrides={"resume": str(first.last)})
    resumed.train()
    assert resumed.windows[:2] == [[4], [4] * 4]
    assert check_factors(resumed)[:2] == [1.0, 4.0]
    assert resumed.commits[0].step == 0 and resumed.optimizer.param_groups[0]["hessian_updates"] == 1 + len(
        resumed.commits
    )


def test_refreshes_are_counted_in_optimizer_steps_and_come_before_the_first(tiny_run):
    trainer = train(Watched, tiny_run, nbs=8, epochs=4, hessian_interval=3)
    assert len(trainer.windows) == 8 and all(window == [4, 4] for window in trainer.windows)
    assert [commit.step for commit in trainer.commits] == [0, 3, 6]
    assert len(trainer.estimates) == 3
    assert check_factors(trainer) == [2.0] * 3

    warm = train(Watched, tiny_run, nbs=8, epochs=4, hessian_interval=3, hessian_warmup=3)
    assert [commit.step for commit in warm.commits] == [0, 1, 2, 5]

    class FirstOnly(Watched):
        stop_after = 1

    stopped = train(FirstOnly, tiny_run)
    assert not stopped.state("exp_avg").any() and stopped.state("hessian").any()
    assert all(torch.equal(p, q) for p, q in zip(stopped.params, stopped.before_first))


# Steps and estimates that do not happen -------------------------------------------------------------------------------


class Overflowing(torch.amp.GradScaler):
    """An enabled scaler on the CPU; the gradients of chosen steps are infinite."""

    def __init__(self, poisoned: tuple[int, ...]):
        super().__init__("cpu", enabled=True)
        self.poisoned, self.calls = poisoned, 0

    def unscale_(self, optimizer):
        if self.calls in self.poisoned:
            optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = math.inf
        self.calls += 1
        super().unscale_(optimizer)


class Scaled(Watched):
    """Trains with an `Overflowing` scaler, and keeps what each batch left behind."""

    poisoned: tuple[int, ...] = ()

    def build_optimizer(self, *args, **kwargs):
        self.scaler = Overflowing(self.poisoned)  # before the session binds itself to it
        return super().build_optimizer(*args, **kwargs)

    def watch(self):
        super().watch()
        self.left: list[dict] = []
        self.add_callback("on_train_batch_end", Scaled.keep)

    def keep(self):
        state = {key: self.state(key) for key in ("exp_avg", "hessian")} if self.optimizer.state else {}
        weights = torch.cat([p.detach().flatten() for p in self.params]).clone()
        self.left.append(
            {**state, "weights": weights, **self.optimizer.param_groups[0], "scale": self.scaler.get_scale()}
        )


def test_overflow_discards_the_estimate_and_touches_neither_m_nor_h(tiny_run):
    class Poisoned(Scaled):
        poisoned = (0, 3)

    trainer = train(Poisoned, tiny_run)
    start = torch.cat([p.flatten() for p in trainer.before_first])
    left = trainer.left
    assert len(left) == 8 and len(trainer.windows) == 6

    # The first step: nothing is there yet, and nothing comes.
    assert "hessian" not in left[0] and torch.equal(left[0]["weights"], start)
    assert (left[0]["hessian_age"], left[0]["hessian_updates"], left[0]["refresh_index"]) == (None, 0, 1)
    # Its estimate was made before the overflow was known, and its index is spent: the next has other noise.
    assert (left[1]["hessian_age"], left[1]["hessian_updates"], left[1]["refresh_index"]) == (1, 1, 2)
    assert [left[i]["scale"] for i in (0, 2, 3)] == [2.0**15, 2.0**15, 2.0**14]

    for key in ("exp_avg", "hessian", "weights", "hessian_age", "hessian_updates"):
        before, after, later = (left[i][key] for i in (2, 3, 4))
        if isinstance(before, Tensor):
            assert torch.equal(after, before) and not torch.equal(later, before), key
        else:
            assert after == before, key
    assert left[3]["refresh_index"] == left[2]["refresh_index"] + 1
    assert left[4]["hessian_updates"] == left[3]["hessian_updates"] + 1

    # Each of the eight micro-batches was estimated, and six estimates were committed: the ones of their own steps.
    assert len(trainer.estimates) == 8 and len(trainer.commits) == 6
    assert all(float(c.h.sum()) == pytest.approx(float(c.raw.sum())) for c in trainer.commits)
    assert left[-1]["hessian_dropped"] == 8 - 6


@pytest.mark.parametrize("batch", [4, 8], ids=["all images", "a part"])
def test_loss_scale_is_not_in_h(tiny_run, batch):
    class Once(Scaled):
        stop_after = 1

    class Plain(Watched):
        stop_after = 1

    scaled, plain = (train(kind, tiny_run, batch=batch, nbs=batch) for kind in (Once, Plain))
    assert scaled.scales == [scaled.scaler.get_scale()] == [2.0**16]
    assert plain.scales == [1.0] and not plain.scaler.is_enabled()
    torch.testing.assert_close(scaled.commits[0].h, plain.commits[0].h, rtol=1e-5, atol=0)


def test_estimate_that_overflows_is_made_at_a_smaller_scale(tiny_run):
    """With the same labels: h is that of a run without a loss scale. The scale found is where the next one begins."""

    def narrow(estimator):
        def overflowing(terms, params, generator, scale=1.0):
            found = estimator(terms, params, generator, scale)
            if scale > 2.0**12:
                next(e for e in found if e is not None).view(-1)[0] = math.inf
            return found

        return overflowing

    class Two(Scaled):
        stop_after = 2

    class Plain(Watched):
        stop_after = 2

    scaled, plain = train(Two, tiny_run, narrow), train(Plain, tiny_run)
    assert scaled.scales == [2.0**16, 2.0**13, 2.0**10, 2.0**10]
    for a, b in zip(scaled.commits, plain.commits):
        torch.testing.assert_close(a.h, b.h, rtol=1e-3, atol=1e-6 * float(b.h.max()))
    assert scaled.optimizer.param_groups[0]["hessian_dropped"] == 0


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float16, 4), (torch.bfloat16, 8)], ids=["fp16-whole", "bf16-part"])
def test_half_precision(tiny_run, monkeypatch, dtype, batch):
    """The loop of Ultralytics with autocast on the CPU, which it keeps for CUDA; in float16 with a scaler.

    Its first steps overflow, those after them are as on any device.
    """
    from ultralytics.engine import trainer as engine

    heard = []

    class Half(Scaled if dtype is torch.float16 else Watched):
        def watch(self):
            super().watch()
            self.model.model[0].register_forward_hook(lambda module, x, out: heard.append(out.dtype))

    # Without noise and without moves, so that h differs by rounding alone.
    settings = {
        **STILL,
        "hessian_estimator": "empirical_fisher",
        "batch": batch,
        "nbs": batch,
        "epochs": 12 * batch // 16,
    }
    single = train(Watched, tiny_run, **settings)
    monkeypatch.setattr(engine, "autocast", lambda *args, **kwargs: torch.autocast("cpu", dtype))
    half = train(Half, tiny_run, **settings)
    assert set(heard) <= {dtype, torch.float32} and dtype in heard  # validation is in single precision
    assert len(half.windows) == len(half.commits) >= 4 and len(single.commits) == 12
    assert all(c.h.isfinite().all() and (c.h >= 0).all() and c.h.dtype == torch.float32 for c in half.commits)
    exact = {c.index: float(c.h.sum()) for c in single.commits}
    ratios = [float(c.h.sum()) / exact[c.index] for c in half.commits]
    # Rounding can also move an assignment, that of bfloat16 (8 bits) often.
    assert statistics.median(ratios) == pytest.approx(1, abs=0.1 if dtype is torch.float16 else 0.25), ratios
    # No estimate was dropped but for a step that was skipped, which halves the scale.
    skipped = round(16 - math.log2(half.scaler.get_scale())) if half.scaler.is_enabled() else 0
    assert half.optimizer.param_groups[0]["hessian_dropped"] == skipped == 12 - len(half.windows)
    assert half.scaler.is_enabled() == (skipped > 0) == (dtype is torch.float16)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_estimate_that_is_not_finite_is_dropped_and_counted(tiny_run, value):
    calls = []

    def spoil(estimator):
        def spoiled(*args, **kwargs):
            found = estimator(*args, **kwargs)
            calls.append(len(calls))
            if len(calls) == 3:
                next(e for e in found if e is not None).view(-1)[-1] = value
            return found

        return spoiled

    hs = []

    class Keeps(Watched):
        def watch(self):
            super().watch()
            self.add_callback("on_train_batch_end", lambda t: hs.append(t.state("hessian")))

    trainer = train(Keeps, tiny_run, spoil)
    assert len(trainer.windows) == 8 and len(calls) == 8  # training went on to its end, and so did the estimates
    assert [commit.step for commit in trainer.commits] == [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(hs[2], hs[1]) and not torch.equal(hs[3], hs[2])
    assert all(h.isfinite().all() for h in hs)
    clock = trainer.optimizer.param_groups[0]
    assert (clock["hessian_dropped"], clock["hessian_updates"], clock["refresh_index"]) == (1, 7, 8)
    with trainer.csv.open(newline="") as file:
        rows = [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(file)]
    assert [float(row["sophia/dropped"]) for row in rows] == [1, 1]

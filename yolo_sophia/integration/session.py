"""Sophia inside Ultralytics' training loop: when h is refreshed, from which micro-batches, and at which scale.

The rule: the curvature belongs to the objective that the optimizer's `step` sees, the sum of the losses of all
micro-batches accumulated for it. An estimate is made on the first micro-batch of a window, on a part of its images in
a small pass of their own (`part.py`) or on all of them through the graph of the ordinary forward pass, and staged; the
step scales it up to the images of the whole window and commits it, a step that is skipped discards it. Everything is
bound to the one trainer that asked; nothing is attached to the model.

Places in Ultralytics this depends on (engine/trainer.py, _do_train): `preprocess_batch` before the forward pass,
`scaler.scale(loss).backward()` after it, `optimizer_step`, `save_metrics` and `save_model` once an epoch, `final_eval`
and `plot_metrics` at the end.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER, RANK

from yolo_sophia.curvature import Estimator, Hutchinson
from yolo_sophia.curvature.noise import noise_seed
from yolo_sophia.integration.checkpoints import final_eval_atomically, save_atomically
from yolo_sophia.integration.criteria import CriterionRecorder, measured_images_exponent
from yolo_sophia.integration.modules import is_compiled, unwrap
from yolo_sophia.integration.monitor import Monitor
from yolo_sophia.integration.subsample import images_in_part, loss_of_part
from yolo_sophia.optim.base import SophiaBase

TRIES = 4
"""Scales to try for an estimate in float16, each an eighth of the one before."""


class Session:
    """Hessian updates of one trainer.

    Args:
        trainer: Its `preprocess_batch`, `optimizer_step`, `save_metrics`, `plot_metrics`, `save_model`, `final_eval`
            and its scaler's `scale` are wrapped on the instance.
        optimizer: The trainer's optimizer, with the keys of `build.CLOCK`, `hessian_interval`, `hessian_warmup` and
            `hessian_fraction` in its groups.
        estimator: What makes the estimates: from loss terms, or (Hutchinson's) from the loss itself.
    """

    def __init__(self, trainer: BaseTrainer, optimizer: SophiaBase, estimator: Estimator | Hutchinson):
        self.trainer, self.optimizer, self.estimator = trainer, optimizer, estimator
        self.monitor = Monitor(optimizer)
        self._built = [{key: own for key, own in g.items() if key != "params"} for g in optimizer.param_groups]
        self.recorder = CriterionRecorder(unwrap(trainer.model))
        self.loss_exponent: int | None = None  # of the number of images; measured for Hutchinson's estimates
        self.largest_scale = math.inf  # for estimates in float16
        self.listening = False  # whether the pass that is under way gives an estimate
        self.skipped = False  # whether memory did not suffice for the one that is staged
        self.steps_skipped = 0
        self.staged: list[Tensor | None] | None = None
        self.unreached: list[Tensor] = []
        self.staged_images = self.batch_images = 0
        self.window_batches: list[int] = []  # images of each micro-batch accumulated for the next step
        self._bound: list[tuple[Any, str]] = []
        self._bind(trainer, "preprocess_batch", self._preprocess_batch)
        self._bind(trainer.scaler, "scale", self._scale)
        self._bind(trainer, "optimizer_step", self._optimizer_step)
        self._bind(trainer, "save_metrics", self._save_metrics)
        self._bind(trainer, "plot_metrics", self._plot_metrics)
        self._bind(trainer, "save_model", lambda save: save_atomically(trainer, save))
        self._bind(trainer, "final_eval", final_eval_atomically)
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._commit()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
            optimizer.register_load_state_dict_post_hook(lambda *_: self._after_load()),
        ]

    def _bind(self, owner: Any, name: str, replacement: Callable) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: replacement(original, *args, **kwargs))
        self._bound.append((owner, name))

    def detach(self) -> None:
        """Give the trainer its own methods back."""
        for owner, name in self._bound:
            vars(owner).pop(name, None)
        for hook in self._hooks:
            hook.remove()
        self._disarm()

    def _disarm(self) -> None:
        self.recorder.stop()

    # The clock ------------------------------------------------------------------------------------------------------

    @property
    def clock(self) -> dict[str, Any]:
        """The group that is read; all are written alike."""
        return self.optimizer.param_groups[0]

    def _tick(self, **changes: Any) -> None:
        for group in self.optimizer.param_groups:
            group.update(changes)

    def _due(self) -> bool:
        """In each of the first `hessian_warmup` steps, then every `hessian_interval` steps."""
        age, interval = self.clock["hessian_age"], self.clock["hessian_interval"]
        return age is None or age >= interval or self.clock["refresh_index"] < self.clock["hessian_warmup"]

    # One micro-batch ------------------------------------------------------------------------------------------------

    def _preprocess_batch(self, original: Callable, batch: dict[str, Any]) -> dict[str, Any]:
        """Before the forward pass: estimate on a part of this micro-batch, or listen to the criterion, if it is due."""
        batch = original(batch)
        self.listening = False
        self.batch_images = batch["img"].shape[0]
        # Gradients are what a window is made of: where there are none, whoever cleared them, a new window begins.
        if not any(p.grad is not None for p in self._parameters()):
            self.window_batches, self.staged = [], None
        if self.staged is None and not self.window_batches and self._due():
            start = time.perf_counter()
            model = unwrap(self.trainer.model)
            self.staged_images = images_in_part(self.batch_images, self.clock["hessian_fraction"])
            self._listen(model, batch)
            # A compiled graph is used up by its first backward pass (donated buffers), and in DistributedDataParallel
            # with static_graph, which Ultralytics asks for then, the first one of all sets off the reduction.
            if self.staged_images < self.batch_images or is_compiled(self.trainer.model):
                try:
                    self._estimate(lambda: loss_of_part(model, batch, self.staged_images))
                finally:
                    self._disarm()
            self.monitor.refresh_seconds += time.perf_counter() - start
        return batch

    def _listen(self, model: Any, batch: dict[str, Any]) -> None:
        """The next forward pass gives an estimate: record the model's loss, where the estimator takes loss terms."""
        self.listening = True
        if self.recorder.model is not model:
            self.recorder = CriterionRecorder(model)
        if not isinstance(self.estimator, Hutchinson):
            self.recorder.start(batch, self.staged_images)
        elif self.loss_exponent is None and self.staged_images >= 2:
            self.loss_exponent = measured_images_exponent(model, batch, self.staged_images)

    def _scale(self, original: Callable, loss: Any) -> Any:
        """Between forward and backward pass, outside autocast: estimate through the graph that is there."""
        self.window_batches.append(self.batch_images)
        if self.listening:
            start = time.perf_counter()
            self._estimate(lambda: loss)
            self.monitor.refresh_seconds += time.perf_counter() - start
        return original(loss)

    def _estimate(self, loss: Callable[[], Tensor]) -> None:
        """Stage an estimate from the pass that was listened to; out of memory costs the estimate, not the training."""
        self.listening, self.skipped = False, False
        try:
            self._stage(loss())
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            self.skipped = True
        if self.skipped:  # here, where the traceback no longer holds the graph
            self._disarm()
            torch.cuda.empty_cache()
            # Staged all the same, so that all ranks reduce and drop it together.
            self.staged = [torch.full_like(p, torch.nan) if p.requires_grad else None for p in self._parameters()]
            self._tick(refresh_index=self.clock["refresh_index"] + 1)
            self._take_fewer_images()

    def _take_fewer_images(self) -> None:
        fraction = self.clock["hessian_fraction"] / 2
        fewer = images_in_part(self.batch_images, fraction)
        if fewer < self.staged_images:
            self._tick(hessian_fraction=fraction)
        LOGGER.warning(
            f"{type(self.optimizer).__name__}: out of memory in a Hessian refresh on {self.staged_images} of "
            f"{self.batch_images} images; it is skipped, and the next one takes {min(fewer, self.staged_images)}"
        )

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _stage(self, loss: Tensor) -> None:
        """Keep an estimate from the pass that gave this loss."""
        index, everything = self.clock["refresh_index"], self._parameters()
        params = [p for p in everything if p.requires_grad]
        if loss.detach().isfinite().all():
            seed = noise_seed(self.trainer.args.seed, max(RANK, 0), index)
            if isinstance(self.estimator, Hutchinson):
                estimates = iter(self.estimator(loss, params, torch.Generator(loss.device).manual_seed(seed)))
            else:
                estimates = iter(self._estimates(loss, params, seed))
        else:  # nothing can be sampled from NaN; staged all the same, so that all ranks reduce and drop it together
            self._disarm()
            estimates = (torch.full_like(p, torch.nan) for p in params)
        # No path from the terms (no foreground: the box branch) means that the curvature is 0, not that it is unknown.
        found = [next(estimates) if p.requires_grad else None for p in everything]
        self.unreached = [p for p, e in zip(everything, found) if e is None and p.requires_grad]
        self.staged = [_or_zeros(e, p) if p.requires_grad else None for p, e in zip(everything, found)]
        self._tick(refresh_index=index + 1)

    def _estimates(self, loss: Tensor, params: list[Tensor], seed: int) -> list[Tensor | None]:
        """Estimates from the recorded terms; in float16, at a scale at which they do not overflow.

        The loss scale settles where the gradient just does not overflow. The sampled cotangents do not shrink as the
        loss is fitted, so at that scale they may: then the same labels are pulled back at a smaller one.
        """
        terms, scaler, device = self.recorder.terms(loss), self.trainer.scaler, loss.device
        if not scaler.is_enabled():
            return self.estimator(terms, params, torch.Generator(device).manual_seed(seed), 1.0)
        scale = min(scaler.get_scale(), self.largest_scale)
        for attempt in range(TRIES):
            found = self.estimator(terms, params, torch.Generator(device).manual_seed(seed), scale)
            if all_finite([e for e in found if e is not None]):
                if attempt:
                    self.largest_scale = scale
                break
            scale /= 8
        return found

    # One optimizer step ---------------------------------------------------------------------------------------------

    def _optimizer_step(self, original: Callable) -> None:
        """`BaseTrainer.optimizer_step` without its clip of the gradient norm at 10.

        That clip rescales m, by another factor at each step, but not h, and rho loses its meaning; Sophia's own clip
        bounds each coordinate. A trainer class with its own `optimizer_step` keeps it, and so does a package that has
        replaced the method of Ultralytics' class. A gradient that is not finite makes no step, with and without a
        scaler: in m, Inf would stay for good, and the clip would hide it.
        """
        trainer = self.trainer
        if is_ultralytics_own(type(trainer).optimizer_step):
            trainer.scaler.unscale_(trainer.optimizer)
            if trainer.scaler.is_enabled() or self._gradient_is_finite():
                trainer.scaler.step(trainer.optimizer)
            else:
                self.steps_skipped += 1
                self._warn_of(self.steps_skipped, "skipped a step, for the gradient is not finite")
            trainer.scaler.update()
            trainer.optimizer.zero_grad()
            if trainer.ema:
                trainer.ema.update(trainer.model)
        else:
            original()
        if self.staged is not None:
            self._drop("with a step that was skipped")
        self.window_batches = []

    def _gradient_is_finite(self) -> bool:
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        # The sum of squares is ten times as fast as the largest entry, but overflows from 2e19 on.
        orders = (2, torch.inf)
        return not grads or any(torch.stack(torch._foreach_norm(grads, ord=n)).sum().isfinite() for n in orders)

    def _warn_of(self, count: int, event: str) -> None:
        """Log an event that may come at every step: the first time, then whenever the count has doubled."""
        if count & (count - 1) == 0:
            LOGGER.warning(f"{type(self.optimizer).__name__}: {event} ({count} so far)")

    def _commit(self) -> None:
        """Before the parameters move: scale the staged estimate to the window, and update h with it."""
        if self.staged is not None:
            start = time.perf_counter()
            estimates = [e for e in self.staged if e is not None]
            hutchinson = isinstance(self.estimator, Hutchinson)
            exponent = self.loss_exponent if hutchinson else self.recorder.estimate_exponent
            factor, known = reduce_over_ranks(
                estimates,
                self.window_batches,
                self.staged_images,
                1 if exponent is None else exponent,
                self.recorder.known,
            )
            torch._foreach_mul_(estimates, factor)
            if known != self.recorder.known:
                self.recorder.reject("found on another rank")
            if known is None:
                self._drop("that was made from different terms on the ranks")
            elif all_finite(estimates):
                if self.clock["hessian_updates"] == 0:
                    self._warn_of_the_unreached()
                self.optimizer.update_hessian(self.staged)
                self._tick(hessian_age=0, hessian_updates=self.clock["hessian_updates"] + 1)
                self.trainer.run_callbacks("on_hessian_update")
            else:
                self._drop("that is not finite")
            self.staged = None
            self.monitor.refresh_seconds += time.perf_counter() - start
        if RANK in {-1, 0}:  # the others write no row
            self.monitor.before_step()

    def _drop(self, why: str) -> None:
        """Count the staged estimate as dropped; where memory did not suffice for it, that has been said."""
        self.staged = None
        self._tick(hessian_dropped=self.clock["hessian_dropped"] + 1)
        if not self.skipped:
            self._warn_of(self.clock["hessian_dropped"], f"dropped a Hessian estimate {why}")

    def _warn_of_the_unreached(self) -> None:
        """Say which parameters have a gradient but no path to the terms: the model's loss adds something of its own."""
        unreached = {id(p) for p in self.unreached if p.grad is not None and p.grad.any()}
        names = [name for name, p in unwrap(self.trainer.model).named_parameters() if id(p) in unreached]
        if names:
            LOGGER.warning(
                f"SophiaG: {len(names)} parameters are trained by a loss whose curvature is not known here, so each of "
                f"their steps is lr times a sign: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            )

    def _after_step(self) -> None:
        self.monitor.after_step()
        if self.clock["hessian_age"] is not None:
            self._tick(hessian_age=self.clock["hessian_age"] + 1)

    def _after_load(self) -> None:
        """After a resume or NaN recovery: what a checkpoint of an older version lacks is as it was built here."""
        for group, built in zip(self.optimizer.param_groups, self._built):
            for key, value in built.items():
                group.setdefault(key, value)
        # NaN recovery redoes an epoch from the checkpoint: what was sampled in the bad one is no part of its row.
        self.monitor.reset()

    # One epoch ------------------------------------------------------------------------------------------------------

    def _save_metrics(self, original: Callable, metrics: dict[str, Any]) -> None:
        """Add Sophia's figures to results.csv and to the metrics that loggers read."""
        figures = self.monitor.epoch()
        # In epochs without validation Ultralytics passes the last metrics again, ours among them: keep ours last, as in
        # the first row, for it writes the columns in the order of the mapping.
        metrics = {key: value for key, value in metrics.items() if key not in figures}
        self.trainer.metrics.update(figures)
        original({**metrics, **figures})

    def _plot_metrics(self, original: Callable) -> None:
        """Draw sophia.png beside results.png."""
        from yolo_sophia.integration.plotting import plot_sophia

        original()
        try:
            picture = plot_sophia(self.trainer.csv)
        except (OSError, ValueError) as error:  # a picture is no reason to end a training, as with results.png
            LOGGER.warning(f"sophia.png was not drawn: {error}")
        else:
            self.trainer.on_plot(picture)


def is_ultralytics_own(method: Callable) -> bool:
    """Whether a method is that of Ultralytics' source: no subclass' own, and not replaced by somebody."""
    return getattr(method, "__globals__", None) is vars(sys.modules[BaseTrainer.__module__])


def _or_zeros(estimate: Tensor | None, p: Tensor) -> Tensor:
    return torch.zeros_like(p) if estimate is None else estimate


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether the sums of tensors that have no negative entry are finite; waits for the device."""
    return not tensors or bool(torch.stack([t.sum() for t in tensors]).sum().isfinite())


def reduce_over_ranks(
    estimates: list[Tensor], window_batches: list[int], staged_images: int, exponent: int, known: bool
) -> tuple[float, bool | None]:
    """Sum estimates over the ranks, in place, and return the factor from the estimated images to the window's.

    Ultralytics multiplies the loss by the number of ranks and DDP averages the gradients, so the objective is the sum
    over ranks, and squares of the ranks' own pull-backs add up. A value that is not finite on one rank is on all.

    Args:
        estimates: Per-parameter estimates of this rank, any shapes.
        window_batches: Images of each micro-batch accumulated for the step on this rank.
        staged_images: Images that the estimates were made from on this rank.
        exponent: e in the growth of an estimate with the number of images n, as n ** e: -1, 0 or 1.
        known: Whether this rank knows the form of the loss.

    Returns:
        The factor, and whether the form of the loss is known: None where the ranks differ.
    """
    ranks, exponents = 1, (-1, 0, 1)
    window = [sum(float(n) ** e for n in window_batches) for e in exponents]
    staged = [float(staged_images) ** e for e in exponents]
    counts = torch.tensor([*window, *staged, exponent, known], dtype=torch.float64)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        flat = torch.cat([e.reshape(-1) for e in estimates])
        dist.all_reduce(flat)
        for e, part in zip(estimates, flat.split([e.numel() for e in estimates])):
            e.copy_(part.view_as(e))
        counts = counts.to(flat.device, torch.float32)
        dist.all_reduce(counts)
        ranks = dist.get_world_size()
    *sums, exponent_sum, votes = counts.tolist()
    place = exponents.index(round(exponent_sum / ranks))
    return sums[place] / sums[place + 3], None if 0 < votes < ranks else votes > 0

"""Sophia inside Ultralytics' training loop: what is bound to one trainer, and when it acts.

When a Hessian update is due, an estimate is made before the training's own forward pass (`estimate.py`) and staged for
the optimizer's step (`window.py`). A session relies on three calls: the trainer's `preprocess_batch` before each
forward pass, the optimizer's `step`, and the model's loss.
"""

from __future__ import annotations

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
from yolo_sophia.integration.binding import Binding
from yolo_sophia.integration.checkpoints import final_eval_atomically, save_atomically
from yolo_sophia.integration.estimate import EstimatePass, LossProbe, not_finite
from yolo_sophia.integration.measured_lr import RateMeasurement
from yolo_sophia.integration.modules import is_compiled, unwrap
from yolo_sophia.integration.monitor import Monitor
from yolo_sophia.integration.skipping import Skipping, warn_of
from yolo_sophia.integration.subsample import MIN_IMAGES, images_in_part
from yolo_sophia.integration.window import Window
from yolo_sophia.optim._base import SophiaBase
from yolo_sophia.optim._schedule import HessianSchedule

STEPS_WITHOUT_BATCH = 3
"""Steps without a batch in `preprocess_batch` before it is an error."""


class Session:
    """Hessian updates of one trainer.

    Args:
        trainer: The methods named at the top of this module are wrapped on the instance.
        optimizer: The trainer's optimizer, with the keys of `HessianSchedule` and `hessian_fraction` in its groups.
        estimator: What makes the estimates: from loss terms or, for Hutchinson's, from the loss itself.

    Attributes:
        schedule: When a Hessian update is due.
        window: The micro-batches of the next step.
        skipping: Takes the steps whose gradient is finite.
        passes: Makes the estimates.
        rate: Measures the learning rate of a run that has none yet.
    """

    def __init__(self, trainer: BaseTrainer, optimizer: SophiaBase, estimator: Estimator | Hutchinson):
        self.trainer, self.optimizer, self.estimator = trainer, optimizer, estimator
        self.monitor = Monitor(optimizer)
        self.schedule = HessianSchedule(optimizer)
        self.window = Window()
        self.skipping = Skipping(optimizer)
        self.passes = EstimatePass(unwrap(trainer.model))
        self.rate = RateMeasurement(trainer, optimizer)
        self._built = [{key: own for key, own in g.items() if key != "params"} for g in optimizer.param_groups]
        self._never_updated: list[tuple[int, Tensor]] | None = None  # None: look them up
        self._parameter_count = 0
        self._probe: LossProbe | None = None
        self._probed = self._searched_unreached = self._out_of_memory = False
        self._steps_without_batch = 0
        self._preprocess = Binding(trainer, "preprocess_batch", self._preprocess_batch)
        self._bindings = [
            self._preprocess,
            Binding(trainer, "run_callbacks", self._run_callbacks),
            Binding(trainer, "optimizer_step", self._optimizer_step),
            Binding(trainer, "save_metrics", self._save_metrics),
            Binding(trainer, "plot_metrics", self._plot_metrics),
            Binding(trainer, "save_model", lambda save: save_atomically(trainer, save)),
            Binding(trainer, "final_eval", final_eval_atomically),
        ]
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
            optimizer.register_load_state_dict_post_hook(lambda *_: self._after_load()),
        ]

    def detach(self) -> None:
        """Restore the trainer's own methods."""
        for binding in self._bindings:
            binding.release()
        for hook in self._hooks:
            hook.remove()
        self._remove_probe()

    @property
    def name(self) -> str:
        """Of the optimizer, for messages."""
        return type(self.optimizer).__name__

    # One micro-batch ------------------------------------------------------------------------------------------------

    def _run_callbacks(self, original: Callable, event: str) -> None:
        """After the callbacks of any event, which may replace methods of the trainer: bind again."""
        original(event)
        self._preprocess.bind()
        self.rate.after_event(event)

    def _preprocess_batch(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Before the forward pass: count the images, and estimate if a Hessian update is due."""
        batch = original(*args, **kwargs)
        model = unwrap(self.trainer.model)
        if torch.is_grad_enabled() and model.training:  # else it is no training pass
            self._before_pass(model, batch)
        return batch

    def _before_pass(self, model: torch.nn.Module, batch: Any) -> None:
        parameters = self._parameters()
        # Gradients are what a window is made of: where there are none, whoever cleared them, a new window begins.
        if all(p.grad is None for p in parameters):
            self.window.restart()
            self._remove_probe()
        elif self._probe is not None:
            self._check_loss()
        images = self._images_of(batch)
        self.window.add(images)
        self._steps_without_batch = 0
        if self._estimate_is_due(parameters, images):
            start = time.perf_counter()
            self._estimate(model, batch, parameters)
            self.monitor.hessian_seconds += time.perf_counter() - start
            if not self._probed and not is_compiled(self.trainer.model):  # a compiled model would be compiled again
                self._probe = LossProbe(model)

    def _images_of(self, batch: Any) -> int:
        images = batch.get("img") if isinstance(batch, dict) else None
        if not isinstance(images, Tensor):
            raise RuntimeError(
                f"optimizer={self.name} estimates the curvature from the batches that the trainer's preprocess_batch "
                f'returns: found {type(batch).__name__}, expected a dictionary with the images as "img". Return one, '
                "or use another optimizer."
            )
        return len(images)

    def _estimate_is_due(self, parameters: list[Tensor], images: int) -> bool:
        """Whether to estimate on this micro-batch: by the schedule, or for a parameter that never had an update."""
        if self._never_updated is None or self._parameter_count != len(parameters):
            states, self._parameter_count = self.optimizer.state, len(parameters)
            updated = [p in states and states[p]["hessian_updates"] > 0 for p in parameters]
            self._never_updated = [(i, p) for i, p in enumerate(parameters) if not updated[i]]
        if not self.window.lacks(self._never_updated) and (self.window.staged is not None or not self.schedule.due):
            return False
        # BatchNorm's statistics over the few images of a short last batch would bias h. All ranks must decide alike.
        distributed = dist.is_available() and dist.is_initialized()
        return distributed or images >= min(MIN_IMAGES, self.window.largest_batch)

    def _estimate(self, model: torch.nn.Module, batch: dict[str, Any], parameters: list[Tensor]) -> None:
        """Stage an estimate. Running out of memory costs the estimate, not the training."""
        if self.passes.recorder.model is not model:
            self._check_parameters(model, parameters)
            self.passes = EstimatePass(model)
        images = images_in_part(len(batch["img"]), self.schedule["hessian_fraction"])
        seed = noise_seed(self.trainer.args.seed, max(RANK, 0), self.schedule.estimated())
        try:
            scaler = getattr(self.trainer, "scaler", None)
            estimates = self.passes(self.estimator, batch, images, parameters, seed, scaler)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            estimates = None
        self._out_of_memory = estimates is None
        if self._out_of_memory:  # here, where the traceback no longer holds the graph
            torch.cuda.empty_cache()
            estimates = not_finite(parameters)  # staged all the same, so that all ranks drop it together
            self._take_fewer_images(len(batch["img"]), images)
        self.window.stage(estimates, images)

    def _check_parameters(self, model: torch.nn.Module, parameters: list[Tensor]) -> None:
        own = {id(p) for p in model.parameters()}
        if not any(id(p) in own for p in parameters):
            raise RuntimeError(
                f"optimizer={self.name}: found none of the optimizer's parameters in trainer.model, which has been "
                "replaced; expected the model that the optimizer was built for. Load weights into that model instead, "
                "or use the trainer's get_model."
            )

    def _take_fewer_images(self, batch_images: int, images: int) -> None:
        fraction = self.schedule["hessian_fraction"] / 2
        fewer = images_in_part(batch_images, fraction)
        if fewer < images:
            self.schedule.set(hessian_fraction=fraction)
        LOGGER.warning(
            f"{self.name}: out of memory in a Hessian update on {images} of {batch_images} images; it is skipped, and "
            f"the next one takes {min(fewer, images)}"
        )

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # One optimizer step ---------------------------------------------------------------------------------------------

    def _optimizer_step(self, original: Callable) -> None:
        """`BaseTrainer.optimizer_step` without its clip of the gradient norm, and without a step if it is not finite.

        The clip rescales m but not h, by another factor at each step, so rho would lose its meaning. Inf would stay in
        m, and Sophia's own clip would hide it. A trainer class with an `optimizer_step` of its own keeps it.
        """
        trainer = self.trainer
        if is_ultralytics_own(type(trainer).optimizer_step):
            trainer.scaler.unscale_(trainer.optimizer)
            self.skipping.step(trainer.scaler)
            trainer.scaler.update()
            trainer.optimizer.zero_grad()
            if trainer.ema:
                trainer.ema.update(trainer.model)
        else:
            original()
        if self.window.staged is not None:
            self._drop("with a step that was skipped")
        self.window.restart()

    def _before_step(self) -> None:
        """Update h with the staged estimate, before the parameters move."""
        if not self.window.batches:
            self._check_batches()
        if self._probe is not None:
            self._check_loss()
        if self.window.staged is not None:
            start = time.perf_counter()
            found_inf = self.optimizer.found_inf
            if found_inf is not None and bool(found_inf):
                self._drop("with a step that was skipped")
            else:
                self._update_hessian()
            self.monitor.hessian_seconds += time.perf_counter() - start
        if RANK in {-1, 0}:  # the others write no row
            self.monitor.before_step()

    def _update_hessian(self) -> None:
        recorder = self.passes.recorder
        known = self.window.scale(self.passes.exponent, recorder.known)
        if known != recorder.known:
            recorder.reject("found on another rank")
        if known is None:
            self._drop("that was made from different terms on the ranks")
        elif self.window.is_finite():
            self._warn_of_the_unreached()
            self.optimizer.update_hessian(self.window.staged, reduce=False)
            self._never_updated = None
            self.schedule.updated()
            self.trainer.run_callbacks("on_hessian_update")
        else:
            self._drop("that is not finite")
        self.window.discard()

    def _drop(self, why: str) -> None:
        """Count the staged estimate as dropped. Running out of memory has its own warning."""
        self.window.discard()
        count = self.schedule.dropped()
        if not self._out_of_memory:
            warn_of(count, f"{self.name}: dropped a Hessian estimate {why}")

    def _warn_of_the_unreached(self) -> None:
        """Name the parameters with a gradient but no path to the terms; once, at the first estimate with all terms."""
        if self._searched_unreached or not self.passes.complete:
            return
        self._searched_unreached = True
        unreached = {id(p) for p in self.passes.unreached if p.grad is not None and p.grad.any()}
        names = [name for name, p in unwrap(self.trainer.model).named_parameters() if id(p) in unreached]
        if names:
            LOGGER.warning(
                f"{self.name}: {len(names)} parameters are trained by a loss whose curvature is not known here, so "
                "they are updated with the sign of the momentum: "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            )

    def _check_batches(self) -> None:
        """Of a step without a batch: stop if h can never be updated, warn if it is updated no longer."""
        self._preprocess.bind()
        if all(p.grad is None for p in self._parameters()):
            return
        self._steps_without_batch += 1
        if self._steps_without_batch != STEPS_WITHOUT_BATCH:
            return
        found = f"optimizer={self.name}: found {STEPS_WITHOUT_BATCH} steps of {type(self.trainer).__name__} without a "
        found += "call of its preprocess_batch, where batches for Hessian updates are taken. "
        remedy = "Call trainer.preprocess_batch(batch) before each forward pass, or use another optimizer."
        if self.schedule["hessian_updates"] == 0:
            raise RuntimeError(f"{found}Without them every step is lr times the sign of the momentum. {remedy}")
        LOGGER.warning(f"{found}The curvature is no longer updated. {remedy}")

    def _check_loss(self) -> None:
        """After the first training pass: RuntimeError if it was made without the model's loss."""
        if not self._remove_probe():
            raise RuntimeError(
                f"optimizer={self.name} estimates the curvature of the model's own loss, and "
                f"{type(self.trainer).__name__} trains with another one: found a forward pass without model(batch) or "
                "model.loss(batch, predictions). Return your criterion from the model's init_criterion, or use another "
                "optimizer."
            )

    def _remove_probe(self) -> bool:
        """End the search for a call of the model's loss, and return whether there was one."""
        if self._probe is not None:
            self._probe.remove()
            self._probed |= self._probe.seen
            self._probe = None
        return self._probed

    def _after_step(self) -> None:
        self.window.restart()
        if not self.optimizer.step_was_skipped:
            self.monitor.after_step()
            self.schedule.stepped()
            self.rate.after_step()

    def _after_load(self) -> None:
        """After a resume or NaN recovery: what a checkpoint of an older version lacks is as it was built here."""
        for group, built in zip(self.optimizer.param_groups, self._built):
            for key, value in built.items():
                group.setdefault(key, value)
        self.rate.after_load()
        self._never_updated = None
        # NaN recovery redoes an epoch from the checkpoint: what was sampled in the bad one is no part of its row.
        self.monitor.reset()

    # One epoch ------------------------------------------------------------------------------------------------------

    def _save_metrics(self, original: Callable, metrics: dict[str, Any]) -> None:
        """Add Sophia's figures to results.csv and to the metrics that loggers read."""
        self.skipping.count(self.trainer.scaler)
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

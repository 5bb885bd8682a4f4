"""`lr0: auto`: the learning rate of a run, decided from how far its localization loss falls in the first steps.

Weights that know the images have little to gain there, whatever the classes are called, and want a low rate. Class
losses do not tell the two apart: they fall with every new class row. The run takes `auto_lr.START_STEPS` steps at
`auto_lr.START`. The ratio of the loss then to the loss at the start gives the rate for the rest of the run. What was
measured so far is kept in the first parameter group, hence in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER, RANK, colorstr

from yolo_sophia.integration.auto_lr import START, START_STEPS, factor_for, rate_of, ultralytics_rate
from yolo_sophia.integration.resolution import save_arguments, trained_classes
from yolo_sophia.optim._base import SophiaBase
from yolo_sophia.options import NEW

KEY = "lr_measurement"
"""Key of the first parameter group; its value is None once the rate is known."""

WINDOW = 20
"""Steps whose mean is the loss at the start and at the end."""

LOCALIZATION = frozenset({"box_loss", "dfl_loss", "l1_loss", "giou_loss"})
"""Terms of Ultralytics' losses that judge where objects are."""


class RateMeasurement:
    """Measures and sets the learning rate of one trainer, from `begin` or from a checkpoint of such a run on.

    Args:
        trainer: With `loss_items` and `loss_names` after each batch.
        optimizer: The trainer's optimizer.
    """

    def __init__(self, trainer: BaseTrainer, optimizer: SophiaBase):
        self.trainer, self.optimizer = trainer, optimizer
        self._batches: list[float] = []
        self._stepped = False

    @property
    def state(self) -> dict[str, Any] | None:
        """Losses by step, steps at the full rate, lr0, and the groups whose rate stays; None if nothing is measured."""
        return self.optimizer.param_groups[0].get(KEY)

    def begin(self, fixed: Iterable[int]) -> None:
        """Measure from the next step on.

        Args:
            fixed: Indices of the parameter groups whose rate does not depend on the result.
        """
        self.optimizer.param_groups[0][KEY] = {
            "losses": [],
            "full_steps": 0.0,
            "lr0": START,
            "fixed": list(fixed),
        }

    def after_step(self) -> None:
        """A step was taken."""
        self._stepped = True

    def after_event(self, event: str) -> None:
        """After a callback event of the trainer."""
        if self.state is None:
            return
        if event == "on_train_epoch_start" and self._mosaic_closes():
            self.begin(self.state["fixed"])  # images change in kind: losses before and after do not compare
        elif event == "on_train_batch_end":
            self._after_batch(self.state)

    def after_load(self) -> None:
        """After a state was loaded: the scheduler follows its rates. A batch that was begun is forgotten."""
        self._batches, self._stepped = [], False
        self._update_scheduler()

    def _mosaic_closes(self) -> bool:
        return self.trainer.epoch == self.trainer.epochs - self.trainer.args.close_mosaic

    def _after_batch(self, state: dict[str, Any]) -> None:
        loss = self._localization_loss()
        if loss is None:
            classes = trained_classes(self.trainer)
            self._finish(ultralytics_rate(classes), f"for {classes} classes, as this loss does not localize")
            return
        self._batches.append(loss)
        if not self._stepped:
            return
        state["losses"].append(sum(self._batches) / len(self._batches))
        self._batches, self._stepped = [], False
        moving = [g for i, g in enumerate(self.optimizer.param_groups) if i not in state["fixed"]]
        # In the warm-up biases may have a higher rate than the rest.
        state["full_steps"] += min(float(g["lr"]) / g["initial_lr"] for g in moving)
        if state["full_steps"] >= START_STEPS and len(state["losses"]) >= 2 * WINDOW:
            ratio, steps = self._ratio(state["losses"]), len(state["losses"])
            self._finish(rate_of(ratio), f"as the localization loss is {ratio:.3f} of its start after {steps} steps")

    def _localization_loss(self) -> float | None:
        """Sum of the localization terms of the last batch; None where there is no such term."""
        items = self.trainer.loss_items  # a dictionary since 8.4
        if not isinstance(items, Mapping):
            items = dict(zip(self.trainer.loss_names, torch.as_tensor(items).reshape(-1)))
        found = [float(value) for name, value in items.items() if name in LOCALIZATION]
        return sum(found) if found else None

    def _ratio(self, losses: list[float]) -> float:
        """Loss at the end over loss at the start, the mean over the processes of a multi-GPU run."""
        first, last = sum(losses[:WINDOW]), sum(losses[-WINDOW:])
        sums = torch.tensor([first, last], device=self.trainer.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        first, last = sums.tolist()
        return last / first if first > 0 else 1.0

    def _finish(self, rate: float, why: str) -> None:
        """Set the rate, and record it in the run's arguments."""
        args, groups = self.trainer.args, self.optimizer.param_groups
        fixed, factor = set(self.state["fixed"]), rate / self.state["lr0"]
        for i, group in enumerate(groups):
            if i not in fixed:
                group["lr"] *= factor
                group["initial_lr"] *= factor
        groups[0][KEY] = None
        self._update_scheduler()
        args.lr0 = rate
        if fixed:
            args.lr_factors = {**args.lr_factors, NEW: factor_for(rate)}
        save_arguments(self.trainer)
        if RANK in {-1, 0}:
            name = type(self.optimizer).__name__
            LOGGER.info(f"{colorstr(f'{name}:')} lr0={rate:g} from now on, {why}")

    def _update_scheduler(self) -> None:
        scheduler = getattr(self.trainer, "scheduler", None)
        if scheduler is not None and KEY in self.optimizer.param_groups[0]:
            scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]

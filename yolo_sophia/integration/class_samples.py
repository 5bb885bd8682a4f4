"""Samples of the last class convolutions of a detection head: their inputs, with the targets of the criterion.

Passes without gradients are made on batches of the training. The targets are those that the criterion's own assigner
gives its class loss. The model, and the training's loader and data set, are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from yolo_sophia.curvature.autocast import no_autocast
from yolo_sophia.integration.criteria.recorder import Recorder
from yolo_sophia.integration.modules import class_layers, head_of
from yolo_sophia.integration.subsample import loss_of_part

BRANCHES = {"cv3": "one2many", "one2one_cv3": "one2one"}
"""Class branches of a head, each with the criterion that trains it where there are two."""


class ScoreRecorder(Recorder):
    """Records the class scores of a criterion and their targets."""

    recorded_callables = ("bce",)

    def read(self) -> tuple[Tensor, Tensor]:
        """Scores before the sigmoid and targets of the recorded call, shape (B, A, classes). Stops the recording."""
        calls = self._calls
        self.stop()
        scores, targets = self._only(calls, "bce").args[:2]
        return scores.float(), targets.float()


@dataclass
class ClassSamples:
    """The samples of a last class convolution.

    Attributes:
        conv: The convolution.
        rows: Indices of its rows that are fitted, shape (R,).
        inputs: Inputs of anchors, shape (N, C) for each batch.
        targets: Targets of the rows, shape (N, R) for each batch.
        weights: How many anchors each sample stands for, shape (N,) for each batch.
        assigned: Samples so far that are assigned to an object, of any class.
    """

    conv: nn.Conv2d
    rows: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    assigned: int = 0

    def add(self, inputs: Tensor, scores: Tensor, targets: Tensor, background: int) -> None:
        """Add samples of a batch: all anchors that are assigned to an object, and some of the background.

        An anchor of the background is kept with a probability, half of it by its highest score in the fitted rows and
        half uniform, and stands for 1 / probability anchors (Poisson sampling). So none stands for more than twice
        what it would in a uniform sample.

        Args:
            inputs: Shape (N, C).
            scores: Of all classes, before the sigmoid, shape (N, classes).
            targets: Of all classes, shape (N, classes).
            background: Anchors of the background to keep, in the mean.
        """
        is_assigned = targets.any(1)
        score = scores[:, self.rows].sigmoid().amax(1).masked_fill(is_assigned, 0)
        uniform = (~is_assigned).float()
        chance = 0.5 * background * (score / score.sum().clamp(min=1e-30) + uniform / uniform.sum().clamp(min=1))
        chance = chance.clamp(max=1).masked_fill(is_assigned, 1)
        kept = torch.rand(len(chance), device=chance.device) < chance
        self.inputs.append(inputs[kept].float())
        self.targets.append(targets[kept][:, self.rows])
        self.weights.append(1 / chance[kept])
        self.assigned += int(is_assigned.sum())

    @property
    def bytes_each(self) -> int:
        """Memory of one sample."""
        return 4 * (self.conv.in_channels + len(self.rows) + 1)

    @property
    def positives(self) -> Tensor:
        """Sum of the targets of each row so far, shape (R,)."""
        return sum((targets.sum(0) for targets in self.targets), torch.zeros(len(self.rows), device=self.rows.device))


def class_convolutions(model: nn.Module) -> dict[str, dict[str, nn.Conv2d]]:
    """The last class convolutions of a detection head by branch, and by their names in the model, level by level.

    Empty for a head whose classes are not scored by convolutions of size 1 x 1 alone.
    """
    found: dict[str, dict[str, nn.Conv2d]] = {}
    for name, layer in class_layers(model).items():
        branch = next((part for part in name.split(".") if part in BRANCHES), None)
        if branch is None or not isinstance(layer, nn.Conv2d) or layer.kernel_size != (1, 1) or layer.bias is None:
            return {}
        found.setdefault(branch, {})[name] = layer
    return found


class Collector:
    """Collects samples in passes over batches.

    Args:
        model: The bare model.
        rows: The rows to fit, shape (R,), by the name of the convolution in the model.
        train_mode: Puts the model into the mode that it is trained in.

    Attributes:
        samples: The samples, by the name of the convolution. Those of a branch that the criterion does not train are
            left out.
        objects: Objects in the batches so far.
    """

    def __init__(self, model: nn.Module, rows: Mapping[str, Tensor], train_mode: Callable[[], Any]):
        self.model, self.train_mode = model, train_mode
        self.criterion = model.init_criterion()
        self.branches = class_convolutions(model)
        self.objects = 0
        if hasattr(self.criterion, "one2many") and hasattr(self.criterion, "one2one"):
            parts = {branch: getattr(self.criterion, BRANCHES[branch]) for branch in self.branches}
        else:
            parts = {"cv3": self.criterion}
        self._recorders = {branch: ScoreRecorder(part) for branch, part in parts.items()}
        convs = {name: conv for branch in self._recorders for name, conv in self.branches[branch].items()}
        self.samples = {name: ClassSamples(convs[name], own) for name, own in rows.items() if name in convs}

    @torch.no_grad()
    def collect(self, batch: dict[str, Any], background: int) -> None:
        """Collect the samples of a batch.

        Args:
            batch: A preprocessed batch of the trainer.
            background: Anchors of the background to keep for each layer, in the mean.

        Raises:
            RuntimeError: The criterion does not compute its class loss, as a criterion of Ultralytics does, from the
                outputs of the convolutions.
        """
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        with ExitStack() as stack:
            for branch, recorder in self._recorders.items():
                recorder.start()
                stack.callback(recorder.stop)
                for name, conv in self.branches[branch].items():
                    hook = conv.register_forward_hook(
                        lambda _, args, output, name=name: seen.update({name: (_flat(args[0]), _flat(output))})
                    )
                    stack.callback(hook.remove)
            stack.enter_context(self._in_training())
            stack.enter_context(no_autocast(batch["img"].device))
            loss_of_part(self.model, batch, len(batch["img"]))
            try:
                found = {branch: recorder.read() for branch, recorder in self._recorders.items()}
            except RuntimeError as error:
                raise RuntimeError(f"fit_head=True: {error}. Remove fit_head.") from None
        self.objects += len(batch["cls"])
        for branch, (scores, targets) in found.items():
            levels = [name for name in self.branches[branch] if name in seen]
            if not levels or not torch.equal(torch.cat([seen[name][1] for name in levels], 1).float(), scores):
                raise RuntimeError(
                    f"fit_head=True: found class scores in the loss of {type(self.model).__name__} that are not the "
                    f"outputs of the last class convolutions of {type(head_of(self.model)).__name__}. Remove fit_head."
                )
            sizes = [seen[name][0].shape[1] for name in levels]
            for name, score, target in zip(levels, scores.split(sizes, 1), targets.split(sizes, 1)):
                if name in self.samples:
                    flat = (x.flatten(0, 1) for x in (seen[name][0], score, target))
                    self.samples[name].add(*flat, background)

    def anchors_per_object(self, name: str) -> float:
        """Anchors that the criterion of a convolution has assigned to an object in the mean, at least 1."""
        branch = next(own for own in self.branches.values() if name in own)
        count = sum(self.samples[other].assigned for other in branch if other in self.samples)
        return max(count / max(self.objects, 1), 1.0)

    @contextmanager
    def _in_training(self) -> Iterator[None]:
        """The model as it is trained; its modes and criterion are restored."""
        model = self.model
        modes = {module: module.training for module in model.modules()}
        own = (vars(model)["criterion"],) if "criterion" in vars(model) else ()
        self.train_mode()
        model.criterion = self.criterion
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            vars(model).pop("criterion", None)
            vars(model).update(zip(["criterion"], own))


def _flat(x: Tensor) -> Tensor:
    """From shape (B, C, H, W) to (B, H W, C)."""
    return x.flatten(2).transpose(1, 2)


def separate_loader(loader: Any, seed: int) -> Iterable[dict[str, Any]]:
    """A loader like a training's, with its data set and augmentation, that shares no state with it.

    The seed is that of the order of the images.
    """
    dataset = separate_dataset(loader.dataset)
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        shuffle=True,
        drop_last=len(dataset) > loader.batch_size,  # BatchNorm's statistics of a short batch are others
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator().manual_seed(seed),
    )


def separate_dataset(dataset: Any) -> Any:
    """A copy of a data set of Ultralytics whose use changes nothing in the original.

    Images and labels are shared. What an access changes are the lists, such as that of recent images for the mosaic,
    and the transforms, which refer to the data set and may hold random states.
    """
    twin = copy(dataset)
    vars(twin).update({name: copy(own) for name, own in vars(dataset).items() if isinstance(own, list)})
    if hasattr(dataset, "transforms"):
        twin.transforms = deepcopy(dataset.transforms, {id(dataset): twin})
    return twin

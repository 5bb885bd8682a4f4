"""`fit_head=True`: the new class rows are fitted before the first optimizer step.

A new class row starts from random weights and a bias that expects almost no object. It belongs to the last layer, so
its best values for the inputs that the weights give follow from a logistic regression. Samples are collected over at
most one epoch (class_samples.py), and the rows solved for (curvature/logistic.py). There are two rounds, because the
assigner and the sampling of the background read the scores: the rows are fitted on the first batches, and once more on
all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from ultralytics.utils import LOGGER, RANK, colorstr

from yolo_sophia.curvature.logistic import fit_rows
from yolo_sophia.curvature.noise import forked, noise_seed
from yolo_sophia.integration.class_samples import ClassSamples, Collector, class_convolutions, separate_loader
from yolo_sophia.integration.modules import head_of, trained_part
from yolo_sophia.integration.provenance import provenance_of, starts_from_weights

MEMORY = 2**27
"""Bytes of all samples, half of them for the background."""

ENOUGH = 4096
"""Positives of every new class at which no more batches are read."""

FIRST_ROUND = 0.25
"""Share of the batches in the first round."""

LOGIT_DEVIATION = 3.0
"""Standard deviation of a logit under the prior. The choice is measured in docs/benchmarks/2026-11-30-fit-head.md."""

PASSES_PER_STEP = 3
"""Forward passes that the forward and backward pass of a training step count as."""


def fit_before_training(trainer: Any) -> None:
    """Fit the new class rows when the training begins, unless it is resumed.

    Args:
        trainer: The trainer, in its `build_optimizer`.

    Raises:
        ValueError: The head is not one that can be fitted.
    """
    if not class_convolutions(trainer.model):
        raise ValueError(
            "fit_head=True fits the last class layers of a detection head, which it expects to be 1 x 1 convolutions "
            "with an output for each class, as in Detect, Segment, Pose and OBB; found "
            f"{type(head_of(trainer.model)).__name__}. Remove fit_head."
        )
    callbacks = trainer.callbacks["on_train_start"]
    if fit_head not in callbacks:  # Ultralytics before 8.4 may build the optimizer again
        callbacks.insert(0, fit_head)


@torch.no_grad()
def fit_head(trainer: Any) -> None:
    """Callback for `on_train_start`: the first process of several fits, and hands the rows to all."""
    if trainer.resume:
        return
    model = trained_part(trainer.model)
    rows = new_class_rows(model)
    if RANK in {-1, 0}:
        line = fit(trainer, model, rows) if rows else "no class row is new, or everything is: nothing to fit"
        LOGGER.info(f"{colorstr('fit_head:')} {line}")
    convs = {name: conv for own in class_convolutions(model).values() for name, conv in own.items() if name in rows}
    ema = getattr(trainer, "ema", None)  # Ultralytics before 8.4 has one on the first process alone
    averaged = trained_part(ema.ema) if ema else None
    for name, conv in convs.items():
        for parameter in (conv.weight, conv.bias):
            if RANK != -1:
                dist.broadcast(parameter, src=0)
        if averaged is not None:
            averaged.get_submodule(name).load_state_dict(conv.state_dict())


def new_class_rows(model: nn.Module) -> dict[str, Tensor]:
    """Indices of the new rows of the last class convolutions that are trained, by their names in the bare model.

    None of a model without weights: its random layers below the rows change at every step.
    """
    if not starts_from_weights(model):
        return {}
    new, found = provenance_of(model).new, {}
    for own in class_convolutions(model).values():
        for name, conv in own.items():
            rows = [new.get(f"{name}.{parameter}", ()) for parameter in ("weight", "bias")]
            rows = sorted({row for own in rows for row in (range(conv.out_channels) if own is None else own)})
            if rows and conv.weight.requires_grad:
                found[name] = torch.tensor(rows, device=conv.weight.device)
    return found


def fit(trainer: Any, model: nn.Module, rows: dict[str, Tensor]) -> str:
    """Collect samples and fit the rows.

    Args:
        trainer: The trainer, before its first step.
        model: Its bare model.
        rows: What to fit, as `new_class_rows` returns it.

    Returns:
        What was fitted and at what cost, for the log.
    """
    start, seconds, seed = time.perf_counter(), [], noise_seed(trainer.args.seed, 0)
    with forked(seed):
        collector = Collector(model, rows, getattr(trainer, "_model_train", model.train))
        samples = list(collector.samples.values())
        if not samples:
            return "the new class rows are in a branch that is not trained: nothing to fit"
        initial = [(one.conv.weight.clone(), one.conv.bias.clone()) for one in samples]
        loader = separate_loader(trainer.train_loader, seed)
        size = max(one.bytes_each for one in samples)
        background = max(MEMORY // 2 // (size * len(samples) * len(loader)), 1)
        for batch in loader:
            batch = trainer.preprocess_batch(batch)
            began = time.perf_counter()
            collector.collect(batch, background)
            seconds.append(time.perf_counter() - began)
            if size * sum(one.assigned for one in samples) > MEMORY // 2 or has_enough(samples):
                break
            if len(seconds) == max(round(FIRST_ROUND * len(loader)), 1) < len(loader):
                solve(collector)
        solve(collector)
    positives = sum(float(one.positives.sum()) for one in samples)
    losses = [sum(class_loss(one, *own) for one, own in zip(samples, initial))]
    losses.append(sum(class_loss(one, one.conv.weight, one.conv.bias) for one in samples))
    before, after = (loss / max(positives, 1.0) for loss in losses)
    step = PASSES_PER_STEP * trainer.accumulate * statistics.median(seconds)
    return (
        f"{sum(len(one.rows) for one in samples)} new class rows in {len(samples)} layers fitted to {positives:,.0f} "
        f"positives of {len(seconds)} batches; class loss per positive {before:.2f} -> {after:.2f}; took "
        f"{time.perf_counter() - start:.1f} s, about {(time.perf_counter() - start) / step:.0f} optimizer steps"
    )


def has_enough(samples: Iterable[ClassSamples]) -> bool:
    """Whether each new class has `ENOUGH` positives, over all levels."""
    by_class: dict[int, float] = {}
    for one in samples:
        for row, count in zip(one.rows.tolist(), one.positives.tolist()):
            by_class[row] = by_class.get(row, 0.0) + count
    return min(by_class.values()) >= ENOUGH


def solve(collector: Collector) -> None:
    """Write the rows that the samples give into the model.

    The anchors of one object are much alike and count as one observation: the prior is as strong as that many times the
    one that has `LOGIT_DEVIATION`.
    """
    for name, one in collector.samples.items():
        conv = one.conv
        precision = collector.anchors_per_object(name) * conv.in_channels / LOGIT_DEVIATION**2
        inputs, targets, weights = map(torch.cat, (one.inputs, one.targets, one.weights))
        rows, bias = conv.weight[one.rows].flatten(1).float(), conv.bias[one.rows].float()
        rows, bias = fit_rows(inputs, targets, weights, rows, bias, precision)
        if rows.isfinite().all() and bias.isfinite().all():  # else the weights are not: the training will show it
            conv.weight[one.rows] = rows[..., None, None].to(conv.weight.dtype)
            conv.bias[one.rows] = bias.to(conv.bias.dtype)


@torch.no_grad()
def class_loss(samples: ClassSamples, weight: Tensor, bias: Tensor) -> float:
    """Binary cross-entropy of the fitted rows, summed over the anchors that the samples stand for.

    Args:
        samples: The samples.
        weight: Of the convolution, shape (classes, C, 1, 1).
        bias: Of the convolution, shape (classes,).
    """
    rows, loss = samples.rows, 0.0
    for inputs, targets, weights in zip(samples.inputs, samples.targets, samples.weights):
        logits = torch.addmm(bias[rows].float(), inputs, weight[rows].flatten(1).float().t())
        each = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        loss += float((weights[:, None] * each).sum())
    return loss

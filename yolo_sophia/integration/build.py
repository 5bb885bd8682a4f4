"""Builds the optimizers that Ultralytics does not know, and divides the parameter groups of any optimizer by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER, RANK, colorstr

from yolo_sophia.curvature import ESTIMATORS, Hutchinson
from yolo_sophia.integration.arguments import NEW_ROWS, canonical_optimizer
from yolo_sophia.integration.auto_lr import MEASURED
from yolo_sophia.integration.checkpoints import KEEP_FLOAT32, reworded
from yolo_sophia.integration.external_optimizer import constructor, is_path
from yolo_sophia.integration.lr_factors import Split, assign, numbers, split, table, warm_up_biases
from yolo_sophia.integration.modules import is_compiled
from yolo_sophia.integration.provenance import decode, encode, provenance_of
from yolo_sophia.integration.resolution import decide, save_arguments
from yolo_sophia.integration.row_rates import attach, check_rescalable
from yolo_sophia.integration.session import Session
from yolo_sophia.optim import SophiaG, SophiaH
from yolo_sophia.optim._base import SophiaBase
from yolo_sophia.optim._schedule import COUNTERS
from yolo_sophia.optim._state import StatefulOptimizer
from yolo_sophia.options import ALL, AUTO, NEW, STEP_OPTIONS


def build(trainer: BaseTrainer, original: Callable, call: dict[str, Any]) -> torch.optim.Optimizer:
    """Build the optimizer of a run that has arguments of this package.

    Args:
        trainer: The trainer; its arguments are final.
        original: Ultralytics' own `build_optimizer`.
        call: Arguments of the call to it.
    """
    if canonical_optimizer(call["name"]):
        return build_sophia(trainer, original, call)
    return (build_other if is_path(call["name"]) else build_own)(trainer, original, call)


def build_sophia(trainer: BaseTrainer, original: Callable, call: dict[str, Any]) -> SophiaBase:
    """Build the optimizer for a trainer and bind the Hessian updates to its loop.

    Args:
        trainer: The trainer; its arguments are final.
        original: Ultralytics' own `build_optimizer`; it makes the parameter groups, by its own rules.
        call: Arguments of the call to it.

    Raises:
        NotImplementedError: SophiaH is selected where a loss cannot be differentiated twice.
        RuntimeError: fused=True, and the kernel cannot be used here.
    """
    previous = vars(trainer).pop("_sophia", None)
    if previous is not None:  # an out-of-memory restart of Ultralytics < 8.4 builds its optimizer again
        previous.detach()
    name = canonical_optimizer(call["name"])
    call = {**call, "name": name}
    resolved = decide(trainer, call)
    values = resolved.values
    schedule = {key: values[key] for key in ("hessian_interval", "hessian_warmup", "hessian_fraction")}
    groups = parameter_groups(original, call, name, **schedule, **COUNTERS)
    parts = rates_by_part(trainer, groups, call, name)
    save_arguments(trainer)
    settings = dict(
        lr=call["lr"],
        betas=(call["momentum"], values["beta2"]),
        rho=values["rho"],
        clip_fraction=values["clip_fraction"] if values["rho"] == "auto" else None,
        weight_decay=0.0,
        bias_correction=True,
        hessian_average=None if values["hessian_average"] == "element" else values["hessian_average"],
        fused=None if values["fused"] == AUTO or (values["fused"] and trainer.args.resume) else values["fused"],
        **{name: values[name] for name in STEP_OPTIONS},
    )
    if resolved.sources["bn_momentum"] != "default":  # its default is what Ultralytics' models have by themselves
        set_bn_momentum(trainer.model, values["bn_momentum"])
    if RANK in {-1, 0}:
        if resolved.reason:
            LOGGER.info(f"{colorstr('Sophia:')} preset '{resolved.preset.name}', {resolved.reason}")
        LOGGER.info(f"{colorstr(f'{name}:')} {resolved.describe()}")
    if name == "SophiaH":
        refuse_once_differentiable(trainer)
        optimizer: SophiaBase = SophiaH(parts.groups, **settings, hessian_interval=None)
        trainer._sophia = Session(trainer, optimizer, Hutchinson())
    else:
        optimizer = SophiaG(parts.groups, **settings)
        trainer._sophia = Session(trainer, optimizer, ESTIMATORS[values["hessian_estimator"]]())
    if resolved.sources["lr0"] == MEASURED:
        is_fixed = values["lr_factors"].get(NEW) == AUTO
        trainer._sophia.rate.begin(i for i, label in enumerate(parts.labels) if is_fixed and label == NEW)
    return with_rates(optimizer, trainer, parts)


def set_bn_momentum(model: torch.nn.Module, momentum: float) -> None:
    """Set the momentum of all BatchNorm layers: their running statistics remember about 1 / momentum steps."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum


def refuse_once_differentiable(trainer: BaseTrainer) -> None:
    """Refuse SophiaH where the loss has no second derivative, or one that float16 cannot hold.

    Raises:
        NotImplementedError: It is so; the message says what to change.
    """
    found = {
        "automatic mixed precision in float16": (trainer.scaler.is_enabled(), "amp=False"),
        "several devices (DistributedDataParallel)": (RANK != -1, "one device"),
        "torch.compile": (is_compiled(trainer.model), "compile=False"),
    }
    if reasons := {reason: remedy for reason, (is_so, remedy) in found.items() if is_so}:
        raise NotImplementedError(
            f"optimizer=SophiaH differentiates the loss twice, which does not work with {' and '.join(reasons)}. "
            f"Train with {', '.join(reasons.values())}, or use optimizer=SophiaG."
        )


def build_other(trainer: BaseTrainer, original: Callable, call: dict[str, Any]) -> torch.optim.Optimizer:
    """Build an external optimizer; arguments as in `build`."""
    if getattr(trainer.args, "bn_momentum", None) is not None:
        set_bn_momentum(trainer.model, trainer.args.bn_momentum)
    parts = rates_by_part(trainer, parameter_groups(original, call, call["name"]), call, call["name"])
    make = constructor(trainer, call)
    optimizer = make(parts.groups)
    if parts.row_rates and not isinstance(optimizer, StatefulOptimizer):
        indices = sorted({rate.group for rate in parts.row_rates})
        check_rescalable(make, [optimizer.param_groups[i] for i in indices], call["name"])
    save_arguments(trainer)
    return with_rates(optimizer, trainer, parts)


def build_own(trainer: BaseTrainer, original: Callable, call: dict[str, Any]) -> torch.optim.Optimizer:
    """Build an optimizer of Ultralytics' own and divide its groups by part; arguments as in `build`."""
    optimizer = original(**call)
    parts = rates_by_part(trainer, optimizer.param_groups, call, type(optimizer).__name__)
    optimizer.param_groups.clear()
    for group in parts.groups:
        optimizer.add_param_group(group)
    save_arguments(trainer)
    return with_rates(optimizer, trainer, parts)


def rates_by_part(trainer: BaseTrainer, groups: Sequence[dict[str, Any]], call: dict[str, Any], shown: str) -> Split:
    """Divide parameter groups by the parts of `lr_factors`; log the parts, and record them in the trainer's arguments.

    Args:
        trainer: The trainer. Its arguments get numbers for "auto", and the new rows, which are resumed.
        groups: The groups, with `lr`.
        call: Arguments of the call to `build_optimizer`.
        shown: Name of the optimizer for the lines that are logged.
    """
    args, model = trainer.args, call["model"]
    factors = ALL["lr_factors"].check(getattr(args, "lr_factors", None) or {})
    provenance = None
    if NEW in factors:
        recorded = getattr(args, NEW_ROWS, None) if args.resume else None
        provenance = decode(recorded) if recorded else provenance_of(model)
        setattr(args, NEW_ROWS, encode(provenance))
    factors = numbers(factors, min(group["lr"] for group in groups))
    if factors:
        args.lr_factors = factors
    parts = assign(model, factors, {} if provenance is None else provenance.new)
    found = split(groups, parts)
    if factors and RANK in {-1, 0}:
        LOGGER.info(f"{colorstr(f'{shown}:')} learning rates by part")
        for line in table(parts, found, provenance):
            LOGGER.info(f"    {line}")
    return found


def with_rates(optimizer: torch.optim.Optimizer, trainer: BaseTrainer, parts: Split) -> torch.optim.Optimizer:
    """The optimizer, with what its steps need for the rates of its parts."""
    warm_up_biases(optimizer, trainer, parts.biases)
    attach(optimizer, parts.row_rates)  # after the rates of all groups are set
    return optimizer


def parameter_groups(original: Callable, call: dict[str, Any], shown: str, **extra: Any) -> list[dict[str, Any]]:
    """Ultralytics' own parameter groups, as it makes them for AdamW, with keys of ours added.

    Args:
        original: Ultralytics' own `build_optimizer`.
        call: Arguments of the call to it.
        shown: Name for the line that it logs.
        extra: What every group gets.
    """
    with reworded("AdamW(", f"{shown}("):
        template = original(**{**call, "name": "AdamW"})
    kept = ("params", "weight_decay", "param_group")  # the last one since 8.4
    extra = {"lr": call["lr"], KEEP_FLOAT32: True, **extra}
    return [{**{key: group[key] for key in kept if key in group}, **extra} for group in template.param_groups]

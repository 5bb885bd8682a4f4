"""Builds the optimizers that Ultralytics does not know, over the parameter groups that it makes for AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER, RANK, colorstr

from yolo_sophia.curvature import ESTIMATORS, Hutchinson
from yolo_sophia.integration.arguments import canonical_optimizer
from yolo_sophia.integration.auto_lr import factor_for, is_new
from yolo_sophia.integration.checkpoints import KEEP_FLOAT32, reworded
from yolo_sophia.integration.external_optimizer import build_external
from yolo_sophia.integration.modules import head_of, is_compiled, unwrap
from yolo_sophia.integration.resolution import decide, save_arguments
from yolo_sophia.integration.session import Session
from yolo_sophia.optim import SophiaG, SophiaH
from yolo_sophia.optim._base import SophiaBase
from yolo_sophia.optim._schedule import COUNTERS
from yolo_sophia.options import AUTO, STEP_OPTIONS


def build_sophia(trainer: BaseTrainer, original: Callable, call: dict[str, Any]) -> SophiaBase:
    """Build the optimizer for a trainer and bind the Hessian updates to its loop.

    Args:
        trainer: The trainer; its arguments are final.
        original: Ultralytics' own `build_optimizer`; it makes the parameter groups, by its own rules.
        call: Arguments of the call to it.

    Raises:
        NotImplementedError: SophiaH is selected where a loss cannot be differentiated twice.
    """
    previous = vars(trainer).pop("_sophia", None)
    if previous is not None:  # an out-of-memory restart of Ultralytics < 8.4 builds its optimizer again
        previous.detach()
    name = canonical_optimizer(call["name"])
    call = {**call, "name": name}
    resolved = decide(trainer, call)
    values = resolved.values
    schedule = {key: values[key] for key in ("hessian_interval", "hessian_warmup", "hessian_fraction")}
    groups = parameter_groups(
        original, call, name, head_factor(trainer, call, values["head_lr_factor"], name), **schedule, **COUNTERS
    )
    save_arguments(trainer)
    settings = dict(
        lr=call["lr"],
        betas=(call["momentum"], values["beta2"]),
        rho=values["rho"],
        clip_fraction=values["clip_fraction"] if values["rho"] == "auto" else None,
        weight_decay=0.0,
        bias_correction=True,
        hessian_average=None if values["hessian_average"] == "element" else values["hessian_average"],
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
        optimizer: SophiaBase = SophiaH(groups, **settings, hessian_interval=None)
        trainer._sophia = Session(trainer, optimizer, Hutchinson())
    else:
        optimizer = SophiaG(groups, **settings)
        trainer._sophia = Session(trainer, optimizer, ESTIMATORS[values["hessian_estimator"]]())
    return optimizer


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
    """Build an external optimizer; arguments as in `build_sophia`."""
    if getattr(trainer.args, "bn_momentum", None) is not None:
        set_bn_momentum(trainer.model, trainer.args.bn_momentum)
    factor = head_factor(trainer, call, getattr(trainer.args, "head_lr_factor", None), call["name"])
    save_arguments(trainer)
    return build_external(trainer, parameter_groups(original, call, call["name"], factor), call)


def head_factor(trainer: BaseTrainer, call: dict[str, Any], given: float | str | None, shown: str) -> float:
    """The number that head_lr_factor is in this run; "auto" is replaced in the trainer's arguments, which are resumed.

    Args:
        trainer: The trainer.
        call: Arguments of the call to `build_optimizer`.
        given: A number, "auto", or None.
        shown: Name of the optimizer for the line that is logged.
    """
    if given != AUTO:
        return 1.0 if given is None else given
    head = head_of(call["model"])
    new = is_new(head)
    trainer.args.head_lr_factor = factor = factor_for(call["lr"], new)
    if RANK in {-1, 0}:
        why = "the head is new" if new else "the head is not known to be new"
        LOGGER.info(f"{colorstr(f'{shown}:')} head_lr_factor={factor:g}, {why}")
    return factor


def parameter_groups(
    original: Callable, call: dict[str, Any], shown: str, head_lr_factor: float, **extra: Any
) -> list[dict[str, Any]]:
    """Ultralytics' own parameter groups, as it makes them for AdamW, with keys of ours added.

    Where the head has a learning rate of its own, each is split in two; those of the head come last, as Ultralytics 8.3
    takes the first group for the biases in its warm-up.

    Args:
        original: Ultralytics' own `build_optimizer`.
        call: Arguments of the call to it.
        shown: Name for the line that it logs.
        head_lr_factor: Learning rate of the model's head, its last module, over that of the rest.
        extra: What every group gets.

    Raises:
        ValueError: The factor is not 1, and the model has no list of modules whose last one is its head.
    """
    with reworded("AdamW(", f"{shown}("):
        template = original(**{**call, "name": "AdamW"})
    kept = ("params", "weight_decay", "param_group")  # the last one since 8.4
    extra = {KEEP_FLOAT32: True, **extra}
    groups = [{**{key: group[key] for key in kept if key in group}, **extra} for group in template.param_groups]
    if head_lr_factor == 1:
        return groups
    module = head_of(call["model"])
    if module is None:
        raise ValueError(
            "head_lr_factor needs a model whose `model` is a list of modules with the head at its end, found "
            f"{type(unwrap(call['model'])).__name__}. Use head_lr_factor=1."
        )
    head = {id(p) for p in module.parameters()}
    split = [
        {**group, "params": [p for p in group["params"] if (id(p) in head) == inside], "lr": call["lr"] * factor}
        for inside, factor in ((False, 1.0), (True, head_lr_factor))
        for group in groups
    ]
    return [group for group in split if group["params"]]

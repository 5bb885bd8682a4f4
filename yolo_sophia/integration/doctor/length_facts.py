"""Facts about the length of a training: steps, warm-up, and the averages that remember some of them."""

from __future__ import annotations

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from yolo_sophia.integration.arguments import own_of
from yolo_sophia.integration.doctor.case import Case
from yolo_sophia.integration.doctor.fact import Fact, plural
from yolo_sophia.integration.run_length import RunLength, batch_size, device_count, run_length

FEW_STEPS = 300
"""Optimizer steps below which it is pointed out: the shortest whole schedules of docs/studies have 320 to 380."""

NEAR = 0.1
"""Difference to Ultralytics' own estimate, on which optimizer=auto and the preset depend, that is not worth a word."""

LONG_WARMUP = 0.2
"""Share of the steps: 3 of 10 epochs were worse than 1 (docs/studies/2026-11-26-presets, bccd)."""

LONG_MEMORY = 0.05
"""Share of the batches. With momentum .03, 10 % of them on bccd, mAP50-95 was .452, with .1 it was .466
(docs/studies/2026-11-26-presets, the same weights)."""

BN_MOMENTUM = 0.1
"""Of the presets."""


def length_facts(case: Case) -> list[Fact]:
    """Steps, warm-up, EMA and BatchNorm."""
    if case.length is None:
        return [_unknown(case)]
    facts = [_steps(case, case.length)]
    if case.length.steps:
        facts += [_warmup(case, case.length), _ema(case.length)]
    if case.start.model is not None and (momentum := _bn_momentum(case)):
        facts.append(_batch_norm(case, case.length, momentum))
    return facts


def _unknown(case: Case) -> Fact:
    if not case.images:
        reason = "the images are not here"
    elif case.arguments.get("time"):
        reason = f"time={case.arguments['time']} hours decide on the epochs"
    else:
        about = f"about {case.iterations:,}; " if case.iterations else ""
        reason = f"{about}AutoBatch measures the GPU for batch={case.arguments['batch']}"
    return Fact("optimizer steps", f"unknown: {reason}", not case.images, "", {"steps": None})


def _steps(case: Case, length: RunLength) -> Fact:
    batches, devices = length.total_batches, device_count(case.arguments)
    figure = f"{length.steps:,} ({length.batches:,} batches x {plural(length.epochs, 'epoch')}, "
    figure += f"{plural(length.accumulate, 'batch')} a step: nbs={case.arguments['nbs']}, batch={length.batch}"
    figure += f" on {devices} devices)" if devices > 1 else ")"
    if 0 < case.arguments["patience"] < length.epochs:
        figure += f", unless patience={case.arguments['patience']} ends it"
    if case.iterations and abs(case.iterations - length.steps) > NEAR * length.steps:
        figure += f"; Ultralytics estimates {case.iterations:,}"
    values = {
        "steps": length.steps,
        "batches": batches,
        "accumulate": length.accumulate,
        "iterations": case.iterations,
    }
    if devices > 1 and length.batch % devices:
        argument = f"batch={math.ceil(length.batch / devices) * devices}"
        return Fact("optimizer steps", f"{figure}; the batch is not a multiple of the devices", True, argument, values)
    if length.steps >= FEW_STEPS:
        return Fact("optimizer steps", figure, values=values)
    argument = f"epochs={math.ceil(FEW_STEPS * length.accumulate / length.batches)}"
    if length.accumulate > 1:
        own = f"nbs={batch_size(case.arguments)}"
        argument = own if batches >= FEW_STEPS else f"{own} epochs={math.ceil(FEW_STEPS / length.batches)}"
    return Fact("optimizer steps", figure, True, argument, values)


def _warmup(case: Case, length: RunLength) -> Fact:
    share = length.warmup_steps / length.steps
    figure = (
        f"{length.warmup_steps:,} of {length.steps:,} steps ({share:.0%}), {plural(length.warmup_batches, 'batch')}"
    )
    values = {"steps": length.warmup_steps, "batches": length.warmup_batches, "share": share}
    if share <= LONG_WARMUP:
        return Fact("warm-up", figure, values=values)
    return Fact("warm-up", figure, True, f"warmup_epochs={_shorter_warmup(case):g}", values)


def _shorter_warmup(case: Case) -> float:
    """The longest common warm-up that is not too long."""
    for epochs in (2.0, 1.0, 0.5, 0.2, 0.1):
        found = run_length({**case.arguments, "warmup_epochs": epochs}, case.images)
        if found.warmup_steps <= LONG_WARMUP * found.steps:
            return epochs
    return 0.0


def _ema(length: RunLength) -> Fact:
    from ultralytics.utils.torch_utils import ModelEMA

    memory = 1 / (1 - ModelEMA(nn.Identity()).decay(length.steps))
    hardly = ": hardly an average" if memory < 2 else ""
    shown = f"{memory:.3g}" if memory < 100 else f"{memory:,.0f}"
    figure = f"the last {shown} of {length.steps:,} steps at the end{hardly}"
    return Fact("memory of the EMA", figure, values={"steps": memory})


def _bn_momentum(case: Case) -> float | None:
    """Momentum of BatchNorm in the training; None where the model has no running statistics."""
    norms = [m for m in case.start.model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return None
    takes_it = case.is_sophia or "bn_momentum" in own_of(case.optimizer)
    given = case.arguments.get("bn_momentum") if takes_it else None
    is_default = case.is_sophia and case.sophia.sources.get("bn_momentum") == "default"
    return norms[0].momentum if given is None or is_default else given


def _batch_norm(case: Case, length: RunLength, momentum: float) -> Fact:
    memory, batches = 1 / momentum, length.total_batches
    figure = f"the last {memory:.0f} of {batches:,} batches ({memory / batches:.1%}), momentum {momentum:g}"
    values = {"batches": memory, "share": memory / batches, "momentum": momentum}
    if memory <= LONG_MEMORY * batches or momentum >= BN_MOMENTUM:
        return Fact("memory of BatchNorm", figure, values=values)
    takes_it = case.is_sophia or "bn_momentum" in own_of(case.optimizer)
    argument = f"bn_momentum={BN_MOMENTUM:g}" if takes_it else "optimizer=SophiaG, its presets have bn_momentum=0.1"
    return Fact("memory of BatchNorm", figure, True, argument, values)

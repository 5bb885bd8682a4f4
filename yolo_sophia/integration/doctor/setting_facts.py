"""Facts about the optimizer: its learning rate, arguments without effect, and what SophiaG would take."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass

from yolo_sophia.integration.doctor.case import Case
from yolo_sophia.integration.doctor.fact import Fact, some
from yolo_sophia.options import ALL, AUTO

ADAMS = ("adam", "adamax", "adamw", "nadam", "radam")

HIGH_FOR_ADAM = 0.005
"""Rate of the Adam family. .01, Ultralytics' default, gave mAP .1 against .38 with SGD
(ultralytics/ultralytics issue 7198) and below .1 after 270 epochs (pull request 23244)."""

HIGH_FOR_SOPHIA = ALL["lr0"].search[1]
"""Rate of Sophia: the largest that is searched by default. Most coordinates move by nearly the rate in each step."""

FEW_IMAGES = 100
"""Training images below which a rate of the Adam family is held against `safe_rate`."""

OVER_SAFE = 2.5
"""Rate over `safe_rate` from which it is pointed out. 25 images: 2.2 times gave 21.0 mAP50-95, 4.5 times 11.0."""

HIGH_BIAS_RATE = 10
"""Rate of the biases at the start of the warm-up, over lr0. A step of Adam or Sophia is bounded by its rate."""

TASK_ARGUMENTS = {
    "segment": ("mask_ratio", "overlap_mask"),
    "pose": ("pose", "kobj"),
    "classify": ("dropout",),
}
"""Arguments that one task alone reads."""


def safe_rate(images: int) -> float:
    """A rate of AdamW that few images bear, .002 sqrt(images / 500), from ultralytics/ultralytics pull request 25933.

    Measured there with one class: 25 images 18.2, 21.0, 11.0, 1.4, .9 mAP50-95 at .0005, .001, .002, .005, .01; 13
    images 3.5 at .002 against 12.6 at this rate; 35 images 4.8 against 9.6.
    """
    return float(f"{0.002 * math.sqrt(images / 500):.2g}")


@dataclass(frozen=True)
class Chosen:
    """The optimizer of a training.

    Attributes:
        name: Its name.
        rate: Its lr0; None where it is decided by a model that is not here.
        bias_rate: Rate of the biases at the start of the warm-up.
        why: How the rate came about.
    """

    name: str
    rate: float | None
    bias_rate: float
    why: str = ""

    @property
    def is_adam(self) -> bool:
        """Whether it is of the Adam family, by its name."""
        name = self.name.rpartition(".")[2].lower()
        return name in ADAMS or "adam" in name


def setting_facts(case: Case) -> list[Fact]:
    """Rates, arguments without effect, and the settings of SophiaG."""
    chosen = _chosen(case)
    facts = [_rate(case, chosen)]
    if chosen.rate and case.arguments["warmup_epochs"] > 0 and (chosen.is_adam or case.is_sophia):
        facts.append(_bias_rate(chosen))
    return [*facts, _ignored(case, chosen), _sophia(case)]


def _chosen(case: Case) -> Chosen:
    arguments = case.arguments
    if case.is_sophia:
        values = case.sophia.values
        rate, source = values.get("lr0"), case.sophia.sources.get("lr0", "")
        rate = None if rate == AUTO else rate
        return Chosen(case.optimizer, rate, values.get("warmup_bias_lr", arguments["warmup_bias_lr"]), source)
    if case.optimizer.lower() == "auto":
        return _by_ultralytics(case)
    why = "explicit" if "lr0" in case.explicit else "default"
    return Chosen(case.optimizer, arguments["lr0"], arguments["warmup_bias_lr"], why)


def _by_ultralytics(case: Case) -> Chosen:
    """What Ultralytics' own `optimizer=auto` takes: asked of its `build_optimizer`, with the model."""
    if case.start.trainer is None or case.iterations is None:
        return Chosen("auto", None, 0.0)
    trainer = copy(case.start.trainer)
    trainer.args = copy(trainer.args)
    trainer.args.lr_factors = None  # the rate that they multiply is asked for
    optimizer = trainer.build_optimizer(case.start.model, name="auto", iterations=case.iterations)
    rate = min(group["lr"] for group in optimizer.param_groups)  # MuSGD has three times the rate for class branches
    return Chosen(type(optimizer).__name__, rate, trainer.args.warmup_bias_lr, "by optimizer=auto")


def _rate(case: Case, chosen: Chosen) -> Fact:
    values = {"optimizer": chosen.name, "lr0": chosen.rate}
    if chosen.rate is None:
        reason = "it depends on the model, the classes and the number of steps"
        return Fact("learning rate", f"{chosen.name}: unknown, {reason}", values=values)
    figure = f"{chosen.name}, lr0={chosen.rate:g}" + (f" ({chosen.why})" if chosen.why else "")
    name = "learning rate"
    usual = round(0.01 / (4 + (len(case.names) or 10)), 6)
    switch = f"optimizer={chosen.name} " * (case.optimizer.lower() == "auto")
    if chosen.is_adam and chosen.rate > HIGH_FOR_ADAM:
        figure += ": too high for Adam, .01 gave mAP .1 against .38 with SGD"
        return Fact(name, figure, True, f"{switch}lr0={usual:g}", values)
    if chosen.is_adam and 0 < case.images < FEW_IMAGES and chosen.rate > OVER_SAFE * safe_rate(case.images):
        figure += f": too high for {case.images} images; 25 images gave 21.0 mAP50-95 with .001 and 11.0 with .002"
        warmup = " warmup_bias_lr=0" if switch else ""
        return Fact(name, figure, True, f"{switch}lr0={safe_rate(case.images):g}{warmup}", values)
    if case.is_sophia and chosen.rate > HIGH_FOR_SOPHIA:
        figure += ": most coordinates move by nearly lr0 in each step"
        return Fact(name, figure, True, "no lr0, the preset has one", values)
    return Fact(name, figure, values=values)


def _bias_rate(chosen: Chosen) -> Fact:
    figure = f"{chosen.bias_rate:g} at the start of the warm-up"
    look = chosen.bias_rate > HIGH_BIAS_RATE * chosen.rate
    figure += f", {chosen.bias_rate / chosen.rate:.3g} x lr0: a bias can move by that much in a step" if look else ""
    argument = "warmup_bias_lr=0" if look else ""
    return Fact("rate of the biases", figure, look, argument, {"warmup_bias_lr": chosen.bias_rate})


def _ignored(case: Case, chosen: Chosen) -> Fact:
    reasons = _reasons(case, chosen)
    values = {"ignored": reasons}
    if not reasons:
        return Fact("arguments without effect", "none", values=values)
    listed = some((f"{key}={case.arguments[key]} ({reason})" for key, reason in reasons.items()), 3)
    argument = "remove them"
    if "lr0" in reasons:
        name = chosen.name if chosen.rate else "AdamW"
        argument = f"optimizer={name} with them, or remove them"
    return Fact("arguments without effect", listed, True, argument, values)


def _reasons(case: Case, chosen: Chosen) -> dict[str, str]:
    """Explicit arguments that the training does not read, each with the reason."""
    arguments, reasons = case.arguments, {}
    if case.optimizer.lower() == "auto":
        reasons["lr0"] = "optimizer=auto has its own"
        reasons["warmup_bias_lr"] = "optimizer=auto sets 0"
        if not chosen.name.endswith("SGD"):  # its momentum becomes the argument's in the warm-up
            reasons["momentum"] = "optimizer=auto sets 0.9"
    if chosen.is_adam or case.is_sophia:
        reasons["warmup_momentum"] = f"{chosen.name} has betas, no momentum"
    length = case.length
    if arguments["warmup_epochs"] == 0 or (length is not None and not length.warmup_batches):
        reasons |= dict.fromkeys(("warmup_momentum", "warmup_bias_lr"), "there is no warm-up")
        if arguments["warmup_epochs"] > 0:
            reasons["warmup_epochs"] = f"there is none with epochs={arguments['epochs']}"
    if arguments.get("time"):
        reasons["epochs"] = f"time={arguments['time']} decides"
    for task, keys in TASK_ARGUMENTS.items():
        if case.start.model is not None and task != case.start.task:
            reasons |= dict.fromkeys(keys, f"for task={task} only")
    return {key: reason for key, reason in reasons.items() if key in case.explicit}


def _sophia(case: Case) -> Fact:
    name = "preset" if case.is_sophia else "optimizer=SophiaG"
    preset, rate = case.sophia.preset.name, case.sophia.values.get("lr0")
    rate = None if rate == AUTO else rate
    figure = f"sophia={preset} lr0={'unknown without the model' if rate is None else format(rate, 'g')}"
    if case.sophia.reason:
        figure += f": {case.sophia.reason}"
    return Fact(name, figure, values={"preset": preset, "lr0": rate, "source": case.sophia.sources.get("lr0")})

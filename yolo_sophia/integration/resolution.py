"""Every setting of a Sophia run, decided once, where the model is known: in `build_optimizer`.

Precedence: explicit arguments, then the preset, then the defaults. The result is written into the trainer's arguments,
args.yaml and every checkpoint. A run that resumes or is given an earlier args.yaml takes it as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from yolo_sophia.atomic import replacing
from yolo_sophia.integration import ultralytics_yaml
from yolo_sophia.integration.arguments import (
    KNOWN_KEYS,
    OPTIMIZERS,
    ULTRALYTICS_OPTIMIZERS,
    canonical_optimizer,
    check_together,
    default_arguments,
    finalize,
)
from yolo_sophia.integration.auto_lr import MEASURED, START, can_measure, ultralytics_rate
from yolo_sophia.integration.auto_preset import CANDIDATES, choose_preset, optimizer_steps
from yolo_sophia.integration.explicit import MARKER, Record
from yolo_sophia.integration.external_optimizer import is_path
from yolo_sophia.integration.measure import read_data
from yolo_sophia.integration.provenance import listed_names, starts_from_weights
from yolo_sophia.options import ALL, AUTO, HUTCHINSON, OPTIONS, RENAMED, ULTRALYTICS_ARGS, suggestion
from yolo_sophia.presets import Preset, load_preset


@dataclass(frozen=True)
class Facts:
    """What the settings of a run depend on.

    Attributes:
        from_weights: Whether it starts from trained weights.
        steps: Optimizer steps; None where they are unknown.
        classes: Number of classes that are trained; 0 where it is unknown.
    """

    from_weights: bool
    steps: int | None = None
    classes: int = 0


@dataclass(frozen=True)
class Resolved:
    """Every value that a Sophia run depends on, and its source.

    Attributes:
        values: Arguments to set: the options, Ultralytics' arguments that were decided here, and the record.
        sources: "explicit", "preset", "default", "recorded", "optimizer" or `auto_lr.MEASURED`, by argument.
        preset: The preset.
        reason: Why the preset was chosen, and what its learning rate follows from; empty if nothing was chosen.
    """

    values: dict[str, Any]
    sources: dict[str, str]
    preset: Preset
    reason: str = ""

    def describe(self) -> str:
        """One line with the values and their sources."""
        unused = {"clip_fraction"} if self.values["rho"] != AUTO else set()
        shown = [f"{k}={self.values[k]} ({source})" for k, source in self.sources.items() if k not in unused]
        return f"preset '{self.preset.name}' ({self.preset.status}), " + ", ".join(shown)


def resolve(arguments: Mapping[str, Any], explicit: Iterable[str], facts: Facts | None) -> Resolved:
    """Decide every setting of a Sophia run.

    Args:
        arguments: All arguments of the run; `optimizer` is one of `OPTIMIZERS`.
        explicit: The arguments that the user gave. Ignored where `arguments` hold the record of a decided run.
        facts: What is known of the run. None: nothing, before the model is there; what depends on it is left out.

    Raises:
        TypeError: A value is of the wrong kind.
        ValueError: A value is out of range or belongs to another optimizer, or the preset is unknown or malformed.
    """
    record, reasons, measured = Record.of(arguments, KNOWN_KEYS), [], {}
    explicit = {key for key in (record.keys if record else explicit) if key in ALL}
    if record and record.preset:
        preset = _preset_of_record(record.preset)
        base, source_of_base = {key: arguments[key] for key in ALL if key in arguments}, "recorded"
    else:
        name = AUTO if arguments.get("sophia") is None else str(arguments["sophia"])
        if name.lower() == AUTO and facts is not None:
            name, reason = choose_preset(facts.from_weights, facts.steps)
            reasons.append(reason)
        preset = _common_preset() if name.lower() == AUTO else load_preset(name)
        base, source_of_base = dict(preset.settings), "preset"
        if base.get("lr0") == AUTO and facts is not None and "lr0" not in explicit:
            if can_measure(facts.steps):
                measured["lr0"] = START
                reasons.append(f"lr0={START} {MEASURED}")
            else:
                base["lr0"] = ultralytics_rate(facts.classes)
                count = facts.classes or "an unknown number of"
                reasons.append(f"lr0={base['lr0']} for {count} class{'es' * (count != 1)}, too short to measure")
    optimizer = canonical_optimizer(arguments.get("optimizer")) or OPTIMIZERS[0]
    implied = {"hessian_estimator": HUTCHINSON} if optimizer == "SophiaH" else {}
    given = {key: arguments[key] for key in explicit if arguments[key] != implied.get(key)}
    if "clip_fraction" in given:
        given.setdefault("rho", AUTO)  # it has no meaning under a fixed rho, which the preset may have
    defaults = {key: option.default for key, option in OPTIONS.items() if key in base or preset.name != AUTO}
    layers = (
        ("explicit", given),
        ("optimizer", implied),
        (MEASURED, measured),
        (source_of_base, base),
        ("default", defaults),
    )
    values, sources = {}, {}
    for key, option in ALL.items():
        source, layer = next(((s, layer) for s, layer in layers if key in layer), (None, None))
        if layer is not None:  # else Ultralytics' own default stays
            values[key], sources[key] = option.check(layer[key]), source
    check_together(values, explicit, optimizer)
    kept = Record(preset.name, frozenset(explicit | given.keys()))
    return Resolved(values | {"sophia": preset.name, MARKER: str(kept)}, sources, preset, ", ".join(reasons))


def _common_preset() -> Preset:
    """The settings on which all presets agree that could be chosen."""
    first, *others = map(load_preset, CANDIDATES)
    agreed = {k: v for k, v in first.settings.items() if all(o.settings.get(k) == v for o in others)}
    return Preset(AUTO, first.status, "", agreed, first.origins)


def _preset_of_record(name: str) -> Preset:
    """The preset of a decided run; without settings if its file is gone: the arguments have every value."""
    try:
        return load_preset(name)
    except ValueError:
        return Preset(name, "no longer readable", "", {}, {})


def decide(trainer: Any, call: dict[str, Any]) -> Resolved:
    """Decide the settings of a trainer, in its `build_optimizer`, and write them where they are read.

    Args:
        trainer: The trainer.
        call: Arguments of the call to `build_optimizer`; `lr`, `momentum` and `decay` are brought up to date in place.

    Raises:
        TypeError: As `resolve`.
        ValueError: As `resolve`.
        RuntimeError: The processes of a multi-GPU run came to different settings.
    """
    from ultralytics.utils import DEFAULT_CFG_DICT

    args = trainer.args
    before = {key: getattr(args, key) for key in ULTRALYTICS_ARGS}
    # A trainer class that selects Sophia by itself has no record.
    changed = {key for key in ULTRALYTICS_ARGS if before[key] != DEFAULT_CFG_DICT[key]}
    resolved = resolve({**vars(args), "optimizer": call["name"]}, changed, facts_of(trainer, call))
    _check_equal_on_ranks(resolved.values)
    for key, value in resolved.values.items():
        setattr(args, key, value)
    for key, argument in (("lr", "lr0"), ("momentum", "momentum")):
        if call[key] == before[argument]:  # else the trainer class passes a value of its own
            call[key] = getattr(args, argument)
    if before["weight_decay"]:  # Ultralytics scales it by the batch
        call["decay"] *= args.weight_decay / before["weight_decay"]
    return resolved


def start_search(args: dict[str, Any], space: Mapping[str, Any]) -> None:
    """Let Ultralytics' tuner start from the run's own settings, in place; what it proposes is explicit in its children.

    Args:
        args: All arguments, validated.
        space: What is searched.
    """
    record = Record.of(args, KNOWN_KEYS)
    if searched := space.keys() & ALL.keys() - record.keys:
        values = preview(args, ()).values
        for key in searched:
            value = values.get(key, args[key])
            args[key] = ALL[key].default if value == AUTO else value  # a search starts from a number
        record = Record(record.preset, record.keys | searched)
    for key in space.keys() & RENAMED.keys():  # numbers, under their names of 0.1.0
        args[key], record = 1.0, Record(record.preset, record.keys | {key})
    args[MARKER] = str(record)


def facts_of(trainer: Any, call: Mapping[str, Any]) -> Facts:
    """What the settings depend on, read from a trainer whose model is built."""
    steps = None if trainer.args.time else int(call["iterations"])
    return Facts(starts_from_weights(call["model"]), steps, trained_classes(trainer))


def trained_classes(trainer: Any) -> int:
    """Number of classes that a trainer trains; 0 where it is unknown."""
    data = trainer.data if isinstance(getattr(trainer, "data", None), dict) else {}
    return 1 if trainer.args.single_cls else len(listed_names(data.get("names")))


def preview(arguments: Mapping[str, Any], explicit: Iterable[str]) -> Resolved:
    """The settings that a run with these arguments would decide on; loads its model, trains nothing.

    Where the model cannot be loaded, what depends on it is left out.

    Raises:
        TypeError: As `resolve`.
        ValueError: As `resolve`.
    """
    from_weights = _starts_from_weights(str(arguments.get("model")), str(arguments.get("pretrained", True)))
    if from_weights is None:
        return resolve(arguments, explicit, None)
    try:
        _, content = read_data(str(arguments.get("data")))
        names = content["names"] if "names" in content else [f"class_{i}" for i in range(content["nc"])]
    except (ValueError, LookupError, TypeError):
        names = ()
    classes = 1 if arguments.get("single_cls") else len(listed_names(names))
    return resolve(arguments, explicit, Facts(from_weights, optimizer_steps(arguments), classes))


@lru_cache(maxsize=16)
def _starts_from_weights(model: str, pretrained: str) -> bool | None:
    """Whether a model starts from weights; None where it cannot be loaded."""
    from ultralytics import YOLO

    if pretrained == "False":
        return False
    try:
        made = YOLO(pretrained if pretrained.lower().endswith((".pt", ".pth")) else model).model
    except Exception:  # a damaged file, or one of another program, leads to errors of many kinds
        return None
    return starts_from_weights(made)


def save_arguments(trainer: Any) -> None:
    """Save a trainer's arguments again.

    Ultralytics wrote args.yaml before the decision; in versions before 8.4 Weights & Biases has a copy as well.
    """
    from ultralytics.utils import RANK

    path = Path(trainer.save_dir) / "args.yaml"
    if RANK not in {-1, 0} or not path.is_file():
        return
    with replacing(path) as partial:
        ultralytics_yaml.save(partial, vars(trainer.args))
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        copied = {key: getattr(trainer.args, key) for key in ALL if key in run.config}
        run.config.update(copied, allow_val_change=True)


def _check_equal_on_ranks(values: Mapping[str, Any]) -> None:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    first = [dict(values)]
    dist.broadcast_object_list(first, src=0)
    if different := {key: (first[0].get(key), own) for key, own in values.items() if first[0].get(key) != own}:
        raise RuntimeError(
            f"Process {dist.get_rank()} of this multi-GPU run came to other settings than process 0: {different} "
            "(argument: value of process 0, own value). Check that all processes load the same weights and data."
        )


def validate_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Validate the arguments of a training as its trainer will, before there is one.

    Args:
        given: What the training will be given.

    Returns:
        All arguments. Of a Sophia run, those that depend on its model, such as `lr0`, are left out if not given.

    Raises:
        TypeError: A value is not of its argument's kind.
        ValueError: As `resolve`; or a value is out of range, or there is no such optimizer.
    """
    from ultralytics.cfg import check_cfg
    from ultralytics.utils import DEFAULT_CFG_DICT

    given = dict(given)
    shown = given.get("optimizer", "auto")
    name = canonical_optimizer(shown)
    if name is None and not is_path(shown):
        if str(shown).lower() not in {x.lower() for x in ULTRALYTICS_OPTIMIZERS}:
            known = (*OPTIMIZERS, *ULTRALYTICS_OPTIMIZERS)
            raise ValueError(
                f"optimizer={shown!r} is not an optimizer.{suggestion(shown, known)} Valid names: {list(known)}, or a "
                "dotted path such as torch.optim.Adagrad."
            )
    check_cfg(dict(given))
    args = SimpleNamespace(**{**default_arguments(), **DEFAULT_CFG_DICT, **given})
    finalize(args, given)
    if name is None:
        return vars(args)
    rest = {key: value for key, value in vars(args).items() if key not in ALL}
    return rest | resolve(vars(args), (), None).values

"""Sophia's knobs as Ultralytics arguments: known to its configuration, resolved once, recorded in runs that ask.

The rule of precedence: what the user typed, then the preset, then the package default; also where the typed value
equals an Ultralytics default. Child processes (multi-GPU workers, `tune`), resumed runs and an args.yaml given as
`cfg=` bring every key as if it were typed. So the run that the user started records in `sophia_typed` what was typed
and over which preset; whoever finds that adds only what was changed since, by hand or by the tuner.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from yolo_sophia.integration import external_optimizer as dotted
from yolo_sophia.integration.auto_lr import AUTO, rate_for
from yolo_sophia.integration.auto_preset import choose_preset
from yolo_sophia.presets import (
    BORROWED,
    CHOSEN,
    HUTCHINSON,
    KNOBS,
    Preset,
    check_value,
    load_preset,
    suggestion,
)

OPTIMIZERS = ("SophiaG", "SophiaH")
"""Names that `optimizer=` takes, in any case."""

THEIRS = ("SGD", "MuSGD", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSProp", "auto")
"""Ultralytics' own; the list is inside BaseTrainer.build_optimizer, without MuSGD before 8.4."""

MARKER = "sophia_typed"
SOPHIA_KEYS = (*KNOBS, "sophia", MARKER)
KEEP_FLOAT32 = "keep_float32"
"""Key of the parameter groups of optimizers built here: their state is saved as it is."""
OUR_KEYS = (*SOPHIA_KEYS, dotted.ARGUMENTS)


def default_arguments() -> dict[str, Any]:
    """Keys for Ultralytics' default configuration; numbers where its tuner needs numbers."""
    return {**dict.fromkeys(OUR_KEYS), **{key: knob.default for key, knob in KNOBS.items()}}


def known_arguments() -> set[str]:
    """Every argument that a training takes, ours included."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    return {*DEFAULT_CFG_DICT, *OUR_KEYS}


def canonical_optimizer(name: object) -> str | None:
    """Our spelling of an optimizer's name, or None where it is not ours or a dotted path.

    Raises:
        ValueError: It looks like a misspelling of ours.
    """
    if dotted.is_dotted(name):
        return None
    by_lower = {x.lower(): x for x in OPTIMIZERS}
    lower = str(name).lower()
    if lower in by_lower:
        return by_lower[lower]
    started = [x for x in OPTIMIZERS if x.lower().startswith(lower)]  # the first is meant, as likely as not
    hint = suggestion(lower, started[:1] or OPTIMIZERS)
    if "soph" in lower or hint:
        raise ValueError(
            f"optimizer={name!r} is not an optimizer of yolo-sophia.{hint} Valid names: {list(OPTIMIZERS)}."
        )
    return None


@dataclass(frozen=True)
class Resolved:
    """Every value that a Sophia run depends on, and where it came from.

    Attributes:
        values: Arguments to set: the knobs, the borrowed arguments that were decided here, and the markers.
        sources: Per argument "typed", "preset", "default" or "optimizer".
        preset: The preset.
        reason: Why it was chosen, where the user named none, and what its learning rate follows from, if it does.
    """

    values: dict[str, Any]
    sources: dict[str, str]
    preset: Preset
    reason: str = ""

    def describe(self) -> str:
        """One line that says what is used and where it came from."""
        unused = {"clip_fraction"} if self.values["rho"] != "auto" else set()
        shown = [f"{k}={self.values[k]} ({source})" for k, source in self.sources.items() if k not in unused]
        return f"preset '{self.preset.name}' ({self.preset.status}), " + ", ".join(shown)

    def announce(self) -> None:
        """Say which preset was chosen and why, where the user named none, or where it decides on more."""
        from ultralytics.utils import LOGGER, RANK, colorstr

        if self.reason and RANK in {-1, 0}:
            LOGGER.info(f"{colorstr('Sophia:')} preset '{self.preset.name}', {self.reason}")


def resolve(arguments: dict[str, Any], typed: Iterable[str]) -> Resolved:
    """Decide every setting of a run that asked for Sophia.

    Args:
        arguments: All arguments of the run, defaults included; `optimizer` is one of `OPTIMIZERS`.
        typed: Keys that the user typed. Ignored where the run that the user started has recorded them.

    Raises:
        TypeError: A value is of the wrong kind.
        ValueError: A value is out of range or belongs to another optimizer, or the preset is unknown or malformed.
    """
    name, reason = str(CHOSEN if arguments.get("sophia") is None else arguments["sophia"]), ""
    if name.lower() == CHOSEN:
        name, reason = choose_preset(arguments)
    recorded, _, keys = str(arguments.get(MARKER) or "").rpartition(":")
    preset = _known_or_bare(name) if name == recorded else load_preset(name)
    if recorded:
        before = preset if name == recorded else load_preset(recorded)
        typed = {*keys.split(","), *_changed(arguments, before)}
    typed = {key for key in typed if key in KNOBS or key in BORROWED}
    if "clip_fraction" in typed and "rho" not in typed:  # asks for steering, whatever rho the preset has
        arguments, typed = {**arguments, "rho": "auto"}, {*typed, "rho"}
    optimizer = canonical_optimizer(arguments.get("optimizer")) or OPTIMIZERS[0]
    implied = {"hessian_estimator": HUTCHINSON} if optimizer == "SophiaH" else {}
    typed -= {key for key, value in implied.items() if arguments.get(key) == value}  # as a child finds it
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, knob in {**KNOBS, **BORROWED}.items():
        if key in typed:
            source, value = "typed", arguments[key]
        elif key in implied:
            source, value = "optimizer", implied[key]
        elif key in preset.settings:
            source, value = "preset", preset.settings[key]
        elif key in KNOBS:
            source, value = "default", knob.default
        else:
            continue  # Ultralytics' own default stands
        values[key] = check_value(key, value)
        sources[key] = source
    if values.get("lr0") == AUTO:
        if recorded:  # a resumed run starts from its own weights, which know the classes
            values["lr0"] = arguments["lr0"]
        else:
            values["lr0"], why = rate_for(arguments)
            reason = f"{reason or 'asked for'}, lr0={values['lr0']} {why}"
    if values["rho"] != "auto" and "clip_fraction" in typed:
        raise ValueError(
            f"clip_fraction={values['clip_fraction']} belongs to rho=auto, found rho={values['rho']}: remove one."
        )
    if (values["hessian_estimator"] == HUTCHINSON) != (optimizer == "SophiaH"):
        raise ValueError(
            f"hessian_estimator={values['hessian_estimator']} does not go with optimizer={optimizer}: {HUTCHINSON} "
            "belongs to SophiaH, which has no other. Remove it, or change the optimizer."
        )
    values |= {"sophia": preset.name, MARKER: f"{preset.name}:{','.join(sorted(typed))}"}
    return Resolved(values, sources, preset, reason)


def _known_or_bare(name: str) -> Preset:
    """The preset of a recorded run, or one without settings where its file is gone: the record has every value."""
    try:
        return load_preset(name)
    except ValueError:
        return Preset(name, "no longer readable", "", {}, {})


def _changed(arguments: dict[str, Any], preset: Preset) -> set[str]:
    """Keys whose recorded value is not what the preset gives: changed since by hand, by the tuner, or in the preset."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    given = {key: DEFAULT_CFG_DICT[key] for key in BORROWED} | {key: knob.default for key, knob in KNOBS.items()}
    given |= preset.settings
    if given["lr0"] == AUTO:
        given["lr0"] = arguments["lr0"] if arguments.get("resume") else rate_for(arguments)[0]
    return {key for key, value in given.items() if arguments.get(key, value) != value}


def typed_keys(arguments: dict[str, Any]) -> set[str]:
    """Keys of what a caller passed that the user typed.

    Before 8.3.253, `YOLO.train` leaves every argument of a run, defaults included, to the next run of the same object.
    That our defaults are among them gives it away, and no default then counts as typed.
    """
    from ultralytics.utils import DEFAULT_CFG_DICT

    typed = {key for key, value in arguments.items() if value is not None}
    if MARKER in arguments and arguments[MARKER] is None:
        typed = {key for key in typed if arguments[key] != DEFAULT_CFG_DICT.get(key)}
    return typed


def within(values: dict[str, Any], space: Mapping[str, Any]) -> dict[str, Any]:
    """Bring our knobs into what is searched, where Ultralytics' tuner has not.

    Not every version rounds whole numbers that it does not know, and all but the newest round to five digits last: a
    small rho becomes 0.

    Args:
        values: What the tuner proposes.
        space: Its bounds, lower and upper, by key.
    """
    ours = {key: space[key][:2] for key in values if key in KNOBS and key in space}
    inside = dict(values)
    for key, (low, high) in ours.items():
        if KNOBS[key].kind is int:
            inside[key] = min(max(round(values[key]), math.ceil(low)), math.floor(high))
        else:
            inside[key] = min(max(values[key], low), high)
    return inside


def drop_record(arguments: dict[str, Any]) -> bool:
    """Take out what an earlier Sophia run decided, in place: its arguments were passed on to another optimizer.

    Returns:
        Whether there was a record.
    """
    from ultralytics.utils import DEFAULT_CFG_DICT

    recorded, _, keys = str(arguments.get(MARKER) or "").rpartition(":")
    if not recorded:
        return False
    settings = _known_or_bare(recorded).settings
    for key in BORROWED:
        if key in settings and key not in keys.split(",") and settings[key] in (AUTO, arguments.get(key)):
            arguments[key] = DEFAULT_CFG_DICT[key]
    for key in OUR_KEYS:
        arguments.pop(key, None)
    return True


def refuse_for_others(keys: Iterable[str], optimizer: object) -> None:
    """Refuse Sophia's arguments in a run with another optimizer.

    Args:
        keys: What was typed.
        optimizer: The run's optimizer.

    Raises:
        ValueError: One of our arguments is among them.
    """
    if ours := sorted(set(keys) & set(OUR_KEYS)):
        shared = " Optimizers given by a dotted path, as torch.optim.AdamW, take them too."
        raise ValueError(
            f"{ours} are arguments of optimizer=SophiaG, but this run has optimizer={optimizer}. Remove them, or add "
            f"optimizer=SophiaG.{shared if set(ours) <= set(dotted.OWN) else ''}"
        )


def settle(args: Any, overrides: dict[str, Any] | None) -> Resolved | None:
    """Bring a trainer's or tuner's arguments into their final form, in place.

    Args:
        args: Namespace of all arguments.
        overrides: What the caller passed on top of the defaults.

    Returns:
        What was decided for an optimizer of ours.

    Raises:
        TypeError: As `resolve`.
        ValueError: As `resolve`; or Sophia's arguments were typed for another optimizer.
    """
    name = canonical_optimizer(args.optimizer)
    typed = typed_keys(overrides or {})
    if name is None:
        theirs = set(dotted.OWN) if dotted.is_dotted(args.optimizer) else set()
        if not drop_record(vars(args)) and not args.resume:
            refuse_for_others(typed - theirs, args.optimizer)
        for key in set(OUR_KEYS) - theirs:
            vars(args).pop(key, None)
        if theirs and not args.resume:  # a resumed run has its own final arguments
            dotted.settle_dotted(args, typed)
            for key in dotted.SHARED:
                if key in typed:
                    check_value(key, getattr(args, key))
                else:
                    vars(args).pop(key, None)
        return None
    if dotted.ARGUMENTS in typed:
        raise ValueError(
            f"{dotted.ARGUMENTS} goes with an optimizer given by a dotted path, found optimizer={name}. Its own "
            f"arguments are {list(KNOBS)}."
        )
    vars(args).pop(dotted.ARGUMENTS, None)
    resolved = resolve(vars(args), typed)
    args.optimizer = name
    for key, value in resolved.values.items():
        setattr(args, key, value)
    return resolved


def judge(given: Mapping[str, Any]) -> dict[str, Any]:
    """Judge the arguments of a training as its trainer will, before there is one.

    Args:
        given: What the training will be given.

    Returns:
        All arguments in their final form.

    Raises:
        TypeError: As `resolve`; or a value is not of its argument's kind.
        ValueError: As `settle`; or a value is out of range, or there is no such optimizer.
    """
    from ultralytics.cfg import check_cfg
    from ultralytics.utils import DEFAULT_CFG_DICT

    given = dict(given)
    name = given.get("optimizer", "auto")
    if canonical_optimizer(name) is None and not dotted.is_dotted(name):
        if str(name).lower() not in {x.lower() for x in THEIRS}:
            known = (*OPTIMIZERS, *THEIRS)
            raise ValueError(
                f"optimizer={name!r} is not an optimizer.{suggestion(name, known)} Valid names: {list(known)}, or a "
                "dotted path such as torch.optim.Adagrad."
            )
    check_cfg(dict(given))
    args = SimpleNamespace(**{**default_arguments(), **DEFAULT_CFG_DICT, **given})
    settle(args, given)
    return vars(args)

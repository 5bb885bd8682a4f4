"""Sophia's options as Ultralytics arguments: known to its configuration, validated when a run starts.

What a run's settings become is decided later, where the model is known (resolution.py). Here the explicit arguments are
validated and recorded, before the trainer makes a directory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from yolo_sophia import options
from yolo_sophia.integration import external_optimizer, ultralytics_yaml
from yolo_sophia.integration.explicit import MARKER, Record, ambiguous, explicit_keys
from yolo_sophia.options import ALL, AUTO, HUTCHINSON, OPTIONS, RENAMED, ULTRALYTICS_ARGS, suggestion
from yolo_sophia.presets import load_preset

OPTIMIZERS = ("SophiaG", "SophiaH")
"""Names that `optimizer=` takes, in any case."""

ULTRALYTICS_OPTIMIZERS = ("SGD", "MuSGD", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSProp", "auto")
"""Ultralytics' own; the list is inside BaseTrainer.build_optimizer, without MuSGD before 8.4."""

NEW_ROWS = "sophia_new_rows"
"""The argument that records which rows did not come from the weights: a resumed model no longer shows it."""

SOPHIA_KEYS = (*OPTIONS, "sophia", MARKER, NEW_ROWS)
OUR_KEYS = (*SOPHIA_KEYS, *RENAMED, external_optimizer.ARGUMENTS)
FOR_ALL = ("lr_factors", "fit_head", NEW_ROWS)
"""Our arguments that a run with any optimizer takes."""
SHARED = ("bn_momentum", *FOR_ALL, external_optimizer.ARGUMENTS)
"""Our arguments that a run with an external optimizer takes."""
KNOWN_KEYS = frozenset((*ALL, *RENAMED, "sophia"))
"""What a record of explicit arguments can hold."""


def default_arguments() -> dict[str, Any]:
    """Keys for Ultralytics' default configuration; numbers where its tuner needs numbers."""
    return {**dict.fromkeys(OUR_KEYS), **{key: option.default for key, option in OPTIONS.items()}}


def known_arguments() -> set[str]:
    """Every argument that a training takes, ours included."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    return {*DEFAULT_CFG_DICT, *OUR_KEYS} - {MARKER, NEW_ROWS}


def canonical_optimizer(name: object) -> str | None:
    """Our spelling of an optimizer's name, or None where it is not ours.

    Raises:
        ValueError: It looks like a misspelling of ours.
    """
    if external_optimizer.is_path(name):
        return None
    by_lower = {x.lower(): x for x in OPTIMIZERS}
    lower = str(name).lower()
    if lower in by_lower:
        return by_lower[lower]
    started = [x for x in OPTIMIZERS if x.lower().startswith(lower)]  # the first is the likely one
    hint = suggestion(lower, started[:1] or OPTIMIZERS)
    if "soph" in lower or hint:
        raise ValueError(
            f"optimizer={name!r} is not an optimizer of yolo-sophia.{hint} Valid names: {list(OPTIMIZERS)}."
        )
    return None


def finalize(args: Any, overrides: Mapping[str, Any] | None, ours: Iterable[str] = OUR_KEYS) -> None:
    """Validate a new trainer's arguments, and record which of them are explicit, in place.

    Args:
        args: Namespace of all arguments.
        overrides: What the trainer was given on top of its `cfg`.
        ours: The keys that this package added to Ultralytics' configuration. Those of other optimizers' runs are
            removed again; a key that Ultralytics has itself is left alone.

    Raises:
        TypeError: A value is of the wrong kind.
        ValueError: A value is out of range, or Sophia's arguments were given for another optimizer.
    """
    from ultralytics.utils import LOGGER, RANK

    name = canonical_optimizer(args.optimizer)
    if name is None:
        _finalize_other(args, overrides or {}, set(ours))
        return
    args.optimizer = name
    if args.resume:  # the checkpoint's arguments, decided by the run that wrote it
        _rename(vars(args), set())
        vars(args).pop(external_optimizer.ARGUMENTS, None)
        return
    setattr(args, NEW_ROWS, None)  # read from the model again
    is_recorded = vars(args).get(MARKER) is not None
    explicit = set_explicit(vars(args), overrides or {})
    if not is_recorded and RANK in {-1, 0}:
        keys = [key for key in ULTRALYTICS_ARGS if key not in explicit]
        if found := ambiguous(keys, vars(args), overrides or {}):
            LOGGER.warning(
                f"SophiaG: {', '.join(f'{key}={own}' for key, own in found.items())} in the configuration equal "
                "Ultralytics' defaults, so they count as not set and the preset decides. To keep one of them, pass it "
                "on the command line or as a keyword argument."
            )


def set_explicit(args: dict[str, Any], given: Mapping[str, Any]) -> set[str]:
    """Validate the explicit arguments of a Sophia run and record their names, in place.

    Args:
        args: All arguments of the run.
        given: What the caller passed on top of the defaults.

    Returns:
        Names of the explicit arguments.

    Raises:
        TypeError: A value is of the wrong kind.
        ValueError: A value is out of range or excludes another, or there is no such preset.
    """
    record = Record.of(args, KNOWN_KEYS)
    explicit = explicit_keys(args, given, record)
    if args.get(external_optimizer.ARGUMENTS) is not None:
        raise ValueError(
            f"{external_optimizer.ARGUMENTS} requires an optimizer given by a dotted path, found "
            f"optimizer={args['optimizer']}. Its own arguments are {list(OPTIONS)}."
        )
    args.pop(external_optimizer.ARGUMENTS, None)
    _rename(args, explicit)
    preset = AUTO if args.get("sophia") is None else str(args["sophia"])
    is_decided = record is not None and record.preset and (preset == record.preset or "sophia" not in explicit)
    if preset.lower() == AUTO:
        args["sophia"] = AUTO
    elif not is_decided:
        args["sophia"] = load_preset(preset).name
    implied = {"hessian_estimator": HUTCHINSON} if canonical_optimizer(args["optimizer"]) == "SophiaH" else {}
    explicit = {key for key in explicit & set(ALL) if args[key] != implied.get(key)}
    for key in explicit:
        args[key] = ALL[key].check(args[key])
    check_together({key: args[key] for key in explicit}, explicit, args["optimizer"])
    args[MARKER] = str(Record(record.preset if is_decided else "", frozenset(explicit)))
    return explicit


def recorded_for_children(given: dict[str, Any], held: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a `Model.train` that starts child processes, with the record of what is explicit in them.

    Args:
        given: The keyword arguments.
        held: What the model object adds to them, or a file under `cfg` in `given`.
    """
    from ultralytics.utils import DEFAULT_CFG_DICT
    from ultralytics.utils.checks import check_yaml

    if given.get("cfg"):
        held = ultralytics_yaml.load(check_yaml(given["cfg"]))
    args = {**DEFAULT_CFG_DICT, **held, **given}
    if canonical_optimizer(args.get("optimizer")) is None:
        return given
    set_explicit(args, {**held, **given})
    return {**given, MARKER: args[MARKER]}


def check_together(values: Mapping[str, Any], explicit: Iterable[str], optimizer: str) -> None:
    """Refuse values that exclude each other.

    Raises:
        ValueError: They do.
    """
    if values.get("rho", AUTO) != AUTO and "clip_fraction" in explicit:
        raise ValueError(
            f"clip_fraction={values.get('clip_fraction')} requires rho=auto, found rho={values['rho']}: remove one."
        )
    estimator = values.get("hessian_estimator")
    if estimator is not None and (estimator == HUTCHINSON) != (str(optimizer).lower() == "sophiah"):
        raise ValueError(
            f"hessian_estimator={estimator} does not go with optimizer={optimizer}: {HUTCHINSON} belongs to SophiaH, "
            "which has no other. Remove it, or change the optimizer."
        )


def _rename(args: dict[str, Any], explicit: set[str]) -> None:
    """Replace options under their names of 0.1.0, in place, in the arguments and among the explicit ones.

    Raises:
        ValueError: An old name and its new one are both explicit.
    """
    for old in RENAMED:
        value = args.pop(old, None)
        is_explicit = old in explicit
        explicit.discard(old)
        if value is None:
            continue
        name, new = options.renamed(old, value)
        if is_explicit and name in explicit:
            raise ValueError(f"found {old}={value} and {name}={args[name]}, which are the same setting; remove {old}.")
        if is_explicit or name not in explicit:
            args[name] = new
        if is_explicit:
            explicit.add(name)
            warnings.warn(f"{old}={value} is now {name}={new}.", FutureWarning, stacklevel=2)


def _finalize_other(args: Any, overrides: Mapping[str, Any], ours: set[str]) -> None:
    """Finalize a run with another optimizer: only explicit arguments of ours that it takes are kept."""
    record = Record.of(vars(args), KNOWN_KEYS)
    explicit = explicit_keys(vars(args), overrides, record)
    if args.resume:  # the final arguments of the run that wrote the checkpoint
        _rename(vars(args), set())
        for key in ours - set(keys_of(args.optimizer, vars(args))):
            vars(args).pop(key, None)
        return
    vars(args).pop(NEW_ROWS, None)  # read from the model again
    remove_for_other(vars(args), record, explicit, ours)
    if external_optimizer.is_path(args.optimizer):
        external_optimizer.finalize_external(args, explicit)
    for key in explicit & ours & ALL.keys() & set(own_of(args.optimizer)):
        setattr(args, key, ALL[key].check(getattr(args, key)))


def own_of(optimizer: object) -> tuple[str, ...]:
    """Our arguments that a run with another optimizer takes."""
    return SHARED if external_optimizer.is_path(optimizer) else FOR_ALL


def keys_of(optimizer: object, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Our arguments that a run may use; none if its optimizer is Ultralytics' own and it has none of them.

    Args:
        optimizer: The run's optimizer, or None.
        given: Arguments of the run.

    Raises:
        ValueError: The optimizer looks like a misspelling of ours.
    """
    if optimizer is not None and canonical_optimizer(optimizer):
        return OUR_KEYS
    has_ours = given.get("lr_factors") or given.get("head_lr_factor") is not None or given.get("fit_head")
    return own_of(optimizer) if external_optimizer.is_path(optimizer) or has_ours else ()


def remove_for_other(arguments: dict[str, Any], record: Record | None, explicit: set[str], ours: set[str]) -> None:
    """Remove our arguments from those of a run with another optimizer, in place, and rename those of 0.1.0.

    With a record they are those of an earlier Sophia run, and what that run decided is removed too.

    Args:
        arguments: All arguments of the run.
        record: The record in them.
        explicit: Names of the explicit arguments; renamed in place.
        ours: As in `finalize`.

    Raises:
        ValueError: There is no record, and the optimizer does not take an explicit argument.
    """
    from ultralytics.utils import DEFAULT_CFG_DICT

    _rename(arguments, explicit)
    optimizer = arguments.get("optimizer", "auto")
    own = set(own_of(optimizer))
    if record is None:
        refuse_for_others(explicit & (ours - own), optimizer)
    elif record.preset:
        arguments.update({key: DEFAULT_CFG_DICT[key] for key in ULTRALYTICS_ARGS.keys() - explicit})
    for key in ours - (own & explicit):
        arguments.pop(key, None)


def refuse_for_others(keys: Iterable[str], optimizer: object) -> None:
    """Refuse explicit arguments of Sophia in a run with another optimizer.

    Raises:
        ValueError: One of our arguments is among `keys`.
    """
    if found := sorted(set(keys) & set(OUR_KEYS)):
        shared = " An optimizer given by a dotted path, as torch.optim.AdamW, takes them too."
        raise ValueError(
            f"{found} are arguments of optimizer=SophiaG, but this run has optimizer={optimizer}. Remove them, or add "
            f"optimizer=SophiaG.{shared if set(found) <= set(SHARED) else ''}"
        )


def within(values: dict[str, Any], space: Mapping[str, Any]) -> dict[str, Any]:
    """Bring our options into what is searched, where Ultralytics' tuner has not.

    Not every version rounds whole numbers that it does not know, and all but the newest round to five digits last: a
    small rho becomes 0.

    Args:
        values: What the tuner proposes.
        space: Its bounds, lower and upper, by key.
    """
    ours = {key: space[key][:2] for key in values if key in OPTIONS and key in space}
    inside = dict(values)
    for key, (low, high) in ours.items():
        if OPTIONS[key].kind is int:
            inside[key] = min(max(round(values[key]), math.ceil(low)), math.floor(high))
        else:
            inside[key] = min(max(values[key], low), high)
    return inside

"""Any optimizer by its dotted path: `optimizer=pytorch_optimizer.Lion optimizer_args="{'betas': [0.95, 0.98]}"`.

An argument is used or refused: a keyword that the constructor does not name is an error, even where it accepts any.
Ultralytics' defaults are meant for SGD, so without an explicit lr0 the optimizer's own default is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from yolo_sophia.options import suggestion

ARGUMENTS = "optimizer_args"
RESERVED = {"self", "params", "lr"}
"""Not to be given in `optimizer_args`: lr is Ultralytics' lr0."""


def is_path(name: object) -> bool:
    """Whether an optimizer is given by its dotted path."""
    parts = str(name).split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def load_class(path: str) -> type:
    """Import an optimizer class.

    Args:
        path: `package.module.Class`.

    Raises:
        ValueError: There is no such module or class, or it is no `torch.optim.Optimizer`.
    """
    from torch.optim import Optimizer

    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
        found = getattr(module, name, None)
    except ImportError as error:
        raise ValueError(
            f"optimizer={path}: cannot import {module_name} ({error}). Is its package installed?"
        ) from None
    except (Exception, SystemExit) as error:  # the user's own module: whatever it does when it is imported
        raise ValueError(f"optimizer={path}: importing {module_name} ended in {_shown(error)}.") from None
    if not (isinstance(found, type) and Optimizer in type.mro(found)):
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and Optimizer in type.mro(v)]
        what = "has no such class" if found is None else f"has {name}, which is no torch.optim.Optimizer"
        raise ValueError(f"optimizer={path}: {module_name} {what}.{suggestion(name, classes)}")
    closure = inspect.signature(found.step).parameters.get("closure")
    if found.step is Optimizer.step:
        raise ValueError(f"optimizer={path}: {name} has no step of its own; name an optimizer made from it.")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"optimizer={path}: {name} needs a closure at each step, which Ultralytics' training loop does not give."
        )
    return found


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _parameters(path: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(load_class(path).__init__).parameters


def check_arguments(path: str, given: Any) -> dict[str, Any]:
    """Check `optimizer_args` against the constructor of the class at the path; returns them as a dictionary.

    Raises:
        TypeError: Not a mapping.
        ValueError: A keyword that the constructor does not name, or one that belongs elsewhere.
    """
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise TypeError(f"'{ARGUMENTS}={given}' is of invalid type {type(given).__name__}; expected a mapping.")
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [name for name, p in _parameters(path).items() if name not in RESERVED and p.kind in named]
    for key in given:
        if key == "lr":
            raise ValueError(f"{ARGUMENTS} has lr; give it as lr0.")
        if key not in known:
            raise ValueError(f"{ARGUMENTS}: {path} has no argument {key!r}.{suggestion(key, known)} It has: {known}.")
    return dict(given)


def finalize_external(args: Any, explicit: set[str]) -> None:
    """Finalize the arguments of a run with an external optimizer, in place.

    The optimizer is built once over a single weight, so that its own errors appear before a file is written.

    Args:
        args: Namespace of all arguments.
        explicit: Names of the explicit arguments.

    Raises:
        TypeError: As `check_arguments`.
        ValueError: As `load_class` and `check_arguments`; or the constructor refuses the arguments.
    """
    import torch

    path = args.optimizer
    given = check_arguments(path, getattr(args, ARGUMENTS, None))
    setattr(args, ARGUMENTS, given or None)
    parameters = _parameters(path)
    if "lr0" not in explicit:
        default = parameters["lr"].default if "lr" in parameters else None
        if not isinstance(default, (int, float)):
            raise ValueError(f"optimizer={path} has no default learning rate: say lr0=...")
        args.lr0 = float(default)
    if "warmup_bias_lr" not in explicit:
        args.warmup_bias_lr = 0.0
    if "momentum" in parameters and ("momentum" in given or "momentum" not in explicit):
        # Ultralytics' warm-up writes args.momentum into every group that has one.
        args.momentum = args.warmup_momentum = given.get("momentum", parameters["momentum"].default)
    group = {"params": [torch.nn.Parameter(torch.zeros(1, 1))], "weight_decay": 0.0}
    try:
        load_class(path)([group], lr=args.lr0, **given)
    except Exception as error:
        raise ValueError(f"optimizer={path} does not take {given}: {_shown(error)}.") from None


def constructor(trainer: Any, call: Mapping[str, Any]) -> Callable[[list[dict[str, Any]]], Any]:
    """What constructs the optimizer over parameter groups.

    Args:
        trainer: The trainer; its arguments are final.
        call: Arguments of the call to `build_optimizer`.

    Returns:
        A function of groups with `params`, `lr`, `weight_decay` and what else the integration keeps there.
    """
    path = str(call["name"])
    given = check_arguments(path, getattr(trainer.args, ARGUMENTS, None))
    if "momentum" in _parameters(path):
        given["momentum"] = trainer.args.momentum

    def construct(groups: list[dict[str, Any]]) -> Any:
        if "weight_decay" in given:  # replaces Ultralytics' own in the group that decays
            decay = given["weight_decay"]
            groups = [{**group, "weight_decay": decay if group["weight_decay"] else 0.0} for group in groups]
        return load_class(path)(groups, lr=call["lr"], **given)

    return construct

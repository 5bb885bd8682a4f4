"""Names of version 0.1: accepted with a warning in constructors, translated in checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

DEPRECATED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "hessian_root": ("hessian_power", lambda value: 0.5 if value else 1),
    "probes": ("n_samples", lambda value: value),
    "k": ("hessian_interval", lambda value: value),
}
"""Old name -> (new name, function from the old value to the new one)."""

DTYPES = ("hessian_dtype", "momentum_dtype")
"""Keys of checkpoints whose option is gone; the states are converted when they are loaded."""


def renamed(
    settings: dict[str, Any], given: Mapping[str, Any], name: str, known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Settings with old names translated; each one is warned of.

    Args:
        settings: Settings by their new names.
        given: Settings by old names.
        name: The optimizer's class, for messages.
        known: The names that the class has; None: those of `settings`.

    Raises:
        TypeError: A name is not known.
    """
    result, known = dict(settings), settings if known is None else known
    for old, value in given.items():
        new, convert = DEPRECATED.get(old, (None, None))
        if new not in known:
            raise TypeError(f"{name}: unexpected argument {old!r}, expected one of {sorted(known)}.")
        message = f"{name}: {old}= is deprecated and will be removed; use {new}={convert(value)!r}."
        warnings.warn(message, FutureWarning, stacklevel=4)
        result[new] = convert(value)
    return result


def reads_old_keys(group: dict[str, Any]) -> None:
    """Translate the keys of a checkpoint's parameter group, in place."""
    if group.keys() & set(DTYPES):
        group.pop("fused", None)  # was another implementation
    for key in DTYPES:
        group.pop(key, None)
    for old, (new, convert) in DEPRECATED.items():
        if old in group:
            value = convert(group.pop(old))
            group[new] = group.get(new, value)  # trainings of Ultralytics have both k's
    if "refreshes" in group:
        group.setdefault("refresh_index", group["refreshes"])
        del group["refreshes"]

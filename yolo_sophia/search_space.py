"""Search spaces: the one of each optimizer, and how a space is written.

A dimension gives only values that are trained as they are recorded: inside its bounds and rounded to four significant
digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from yolo_sophia.options import ALL

FORMS = (
    "[low, high], [low, high, 'log'], [low, high, 'int'], a list of strings or of three or more numbers to choose "
    "from, {'choices': [...]}, or null to leave it out"
)


BY_PART = "lr_factors"
"""The argument that is a mapping: its entries are searched as `lr_factors.new`, `lr_factors.head` and so on."""


def argument_of(key: str) -> tuple[str, str]:
    """The argument that a key of a space sets, and the entry of it; an empty entry where it sets the whole."""
    argument, _, entry = key.partition(".")
    return (argument, entry) if argument == BY_PART and entry else (key, "")


def value_of(key: str, arguments: Mapping[str, Any]) -> Any:
    """The value that arguments have for a key of a space, or None."""
    argument, entry = argument_of(key)
    held = arguments.get(argument)
    return held if not entry else held.get(entry) if isinstance(held, Mapping) else None


def with_settings(arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with values for keys of a space on top; entries are added to those of the argument."""
    made = dict(arguments)
    for key, value in settings.items():
        argument, entry = argument_of(key)
        made[argument] = {**(made.get(argument) or {}), entry: value} if entry else value
    return made


@dataclass(frozen=True)
class Range:
    """An interval to search, uniform in the value or in its logarithm; `is_int` allows integers only."""

    low: float
    high: float
    log: bool = True
    is_int: bool = False

    @property
    def samples(self) -> tuple[float, ...]:
        """Values that stand for all: if the ends are valid, so is what lies between."""
        return self.low, self.high

    def at(self, u: float) -> float:
        """The value at the fraction u in [0, 1]."""
        if self.log:
            return self.rounded(math.exp(math.log(self.low) + u * math.log(self.high / self.low)))
        return self.rounded(self.low + u * (self.high - self.low))

    def rounded(self, value: float) -> float:
        """The value as it is trained: four significant digits or an integer, and inside the bounds."""
        value = round(value) if self.is_int else float(f"{value:.4g}")
        return min(max(value, self.low), self.high)

    def contains(self, value: Any) -> bool:
        """Whether a value is of the dimension."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and (not self.is_int or value == round(value))

    def __str__(self) -> str:
        kinds = ", logarithmic" * self.log + ", whole numbers" * self.is_int
        return f"{self.low:g}-{self.high:g}{kinds}"


@dataclass(frozen=True)
class Choice:
    """Values to choose from, without an order."""

    values: tuple[Any, ...]

    @property
    def samples(self) -> tuple[Any, ...]:
        """All of them."""
        return self.values

    def rounded(self, value: Any) -> Any:
        """The value as it is."""
        return value

    def contains(self, value: Any) -> bool:
        """Whether a value is of the dimension; True is not 1 here."""
        return any(type(choice) is type(value) and choice == value for choice in self.values)

    def __str__(self) -> str:
        return " | ".join(map(str, self.values))


Dimension = Range | Choice


def written(dimension: Dimension) -> Any:
    """The form that `read_dimension` reads back."""
    if isinstance(dimension, Choice):
        return {"choices": list(dimension.values)}
    return [dimension.low, dimension.high, *["log"] * dimension.log, *["int"] * dimension.is_int]


def _of_options(*names: str) -> dict[str, Dimension]:
    return {name: Range(*ALL[name].search, ALL[name].log_search) for name in names}


_SOPHIA = _of_options("lr0", "rho")
_ADAM = {"lr0": Range(5e-5, 1e-2), "weight_decay": Range(1e-5, 1e-1)}
SPACES: Mapping[str, Mapping[str, Dimension]] = MappingProxyType(
    {
        "sophiag": _SOPHIA,
        "sophiah": _SOPHIA,
        "adam": _ADAM,
        "adamw": _ADAM,
        "adamax": _ADAM,
        "nadam": _ADAM,
        "radam": _ADAM,
        "sgd": {"lr0": Range(1e-3, 1e-1), "momentum": Range(0.8, 0.98, log=False)},
        "musgd": {"lr0": Range(1e-3, 5e-2), "momentum": Range(0.8, 0.98, log=False)},
        "rmsprop": {"lr0": Range(1e-5, 1e-2), "momentum": Range(0.0, 0.95, log=False)},
        "auto": {},  # chooses its own learning rate
    }
)
"""What is searched for each optimizer: the learning rate and one other argument."""
AUTO_RHO: Mapping[str, Dimension] = MappingProxyType(_of_options("lr0", "clip_fraction"))
"""What is searched for Sophia under rho=auto, where clip_fraction takes the place of rho."""
OTHERS: Mapping[str, Dimension] = MappingProxyType({"lr0": Range(1e-5, 1e-2), "weight_decay": Range(1e-5, 1e-1)})
"""What is searched for an optimizer given by a dotted path."""


def space_of(arguments: Mapping[str, Any]) -> Mapping[str, Dimension]:
    """The search space of the optimizer of these arguments."""
    name = str(arguments["optimizer"]).lower()
    if SPACES.get(name) is _SOPHIA and str(arguments.get("rho")).lower() == "auto":
        return AUTO_RHO
    return SPACES.get(name, OTHERS)


def merged(arguments: Mapping[str, Any], given: Mapping[str, Dimension | None]) -> dict[str, Dimension]:
    """The space of the optimizer of these arguments with what is given on top; None takes a key out.

    With rho among what is given, rho is a number and clip_fraction is not searched.
    """
    fixed_rho = {"rho": None} if given.get("rho") is not None else {}
    space = {**space_of({**arguments, **fixed_rho}), **given}
    return {key: dimension for key, dimension in space.items() if dimension is not None}


def read_dimension(key: str, given: Any) -> Dimension | None:
    """Read one entry of a written space; None where it takes the key out.

    Raises:
        ValueError: It is none of `FORMS`.
    """
    if given is None:
        return None
    values = given.get("choices") if isinstance(given, dict) and set(given) == {"choices"} else given
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in _listed(values)]
    bounds, words = _listed(values)[:2], _listed(values)[2:]
    if values is given and len(bounds) == 2 and all(numbers[:2]) and not any(numbers[2:]):
        low, high = bounds
        # YAML reads words; {"log", "int"} in any order, each once.
        if not set(map(str, words)) <= {"log", "int"} or len(set(map(str, words))) < len(words):
            raise ValueError(f"space: {key}: found {given!r}, expected {FORMS}.")
        log, is_int = "log" in words, "int" in words
        if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not log)):
            rule = "0 < low < high for 'log'" if log else "low < high"
            raise ValueError(f"space: {key}: found {given!r}, expected {rule}.")
        if is_int and (low != round(low) or high != round(high)):
            raise ValueError(f"space: {key}: found {given!r}, expected whole numbers as bounds for 'int'.")
        kind = int if is_int else float
        return Range(kind(low), kind(high), log, is_int)
    plain = all(isinstance(v, (str, bool, int, float)) for v in _listed(values))
    if not _listed(values) or not plain or len({(type(v), v) for v in values}) < len(values):
        raise ValueError(f"space: {key}: found {given!r}, expected {FORMS}.")
    return Choice(tuple(values))


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else []

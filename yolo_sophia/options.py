"""Every option of a Sophia run, declared once: name, kind, default, range, description.

The argument checks, the key sets of Ultralytics' configuration, the default search spaces, the preset checks and the
table in docs/arguments.md follow from this file. It imports neither torch nor ultralytics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

AUTO = "auto"
"""Word for a value that is measured or chosen by the package."""

NEW = "new"
"""The part of `lr_factors` that did not come from the weights."""

FACTORS = "a mapping of parts to numbers > 0"
"""What `lr_factors` takes, for messages and documentation."""

HUTCHINSON = "hutchinson"
"""The estimator of optimizer=SophiaH. No other optimizer takes it: its estimates can be negative."""


@dataclass(frozen=True)
class Option:
    """One Ultralytics argument that a Sophia run takes.

    Attributes:
        name: The argument's name.
        kind: int, float, str or bool; dict for factors by part (`check_factors`).
        doc: One line for the documentation.
        default: Value without a preset; None for Ultralytics' own arguments, whose default stays in force.
        low: Smallest value of a number.
        high: Largest value of a number.
        ends: "[" or "(" and "]" or ")": whether `low` and `high` belong to the range.
        choices: All valid values, where the option is an enumeration.
        words: Words that are valid beside values of the kind, in any case.
        search: Bounds of the default search space; None if the option is not searched by default.
        log_search: Whether the search is logarithmic.
        in_step: Whether the update rule reads it from the parameter group.
    """

    name: str
    kind: type
    doc: str
    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    ends: str = "[]"
    choices: tuple[Any, ...] = ()
    words: tuple[str, ...] = ()
    search: tuple[float, float] | None = None
    log_search: bool = True
    in_step: bool = False

    @property
    def expected(self) -> str:
        """The valid values in words, for messages and documentation."""
        if self.kind is bool:
            return f"True, False or {' or '.join(self.words)}" if self.words else "True or False"
        if self.kind is dict:
            return FACTORS
        if self.choices:
            *most, last = map(str, self.choices)
            return f"{', '.join(most)} or {last}"
        noun = "a whole number" if self.kind is int else "a number"
        if math.isinf(self.high):
            text = f"{noun} {'>' if self.ends[0] == '(' else '>='} {self.low:g}"
        else:
            text = f"{noun} in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"
        return ", or ".join([text, *self.words])

    @property
    def is_fraction(self) -> bool:
        """Whether Ultralytics' own check for numbers in [0, 1] applies."""
        return self.kind is float and not self.choices and not self.words and self.low >= 0 and self.high <= 1

    def contains(self, value: Any) -> bool:
        """Whether a value of the right kind is in range."""
        if self.kind in (bool, dict):
            return True
        if self.choices:
            return value in self.choices
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        below = value < self.high if self.ends[1] == ")" or math.isinf(self.high) else value <= self.high
        return above and below

    def check(self, value: Any) -> Any:
        """Check a value and return it in the option's kind.

        Raises:
            TypeError: The value is of another kind.
            ValueError: The value is out of range.
        """
        if self.kind is dict:
            return check_factors(self.name, value)
        if isinstance(value, str) and value.lower() in self.words:
            return value.lower()
        accepted = {int: int, float: (int, float), str: str, bool: bool}[self.kind]
        if isinstance(value, bool) != (self.kind is bool) or not isinstance(value, accepted):
            raise TypeError(
                f"'{self.name}={value}' is of invalid type {type(value).__name__}; "
                f"'{self.name}' must be {self.expected}."
            )
        try:
            value = self.kind(value)
        except OverflowError:  # an integer beyond any float
            value = math.inf
        if not self.contains(value):
            hint = suggestion(value, self.choices) if self.kind is str else ""
            raise ValueError(f"'{self.name}={value}' is an invalid value; '{self.name}' must be {self.expected}.{hint}")
        return value


def _by_name(*options: Option) -> Mapping[str, Option]:
    return MappingProxyType({option.name: option for option in options})


OPTIONS: Mapping[str, Option] = _by_name(
    Option(
        "rho",
        float,
        "Scale of the curvature in `clip(m / (rho h + eps), 1)`. A larger value clips fewer coordinates. "
        "`auto` adjusts it to `clip_fraction`.",
        0.04,
        low=0,
        ends="()",
        words=(AUTO,),
        search=(0.01, 1.0),
    ),
    Option(
        "clip_fraction",
        float,
        "Fraction of coordinates to clip under `rho=auto`.",
        0.6,
        low=0,
        high=1,
        ends="()",
        search=(0.1, 0.95),
        log_search=False,
    ),
    Option("hessian_interval", int, "Optimizer steps between two Hessian updates.", 10, low=1),
    Option("hessian_warmup", int, "Number of first steps that each update h.", 0, low=0),
    Option(
        "hessian_fraction",
        float,
        "Fraction of a batch that an estimate uses, at least four images. 1: all images.",
        1.0,
        low=0,
        high=1,
        ends="(]",
    ),
    Option(
        "hessian_estimator",
        str,
        "`gnb`: labels sampled from the model. `empirical_fisher`, `sign`: true labels, for ablations. "
        "`hutchinson` belongs to `optimizer=SophiaH`.",
        "gnb",
        choices=("gnb", "empirical_fisher", "sign", HUTCHINSON),
    ),
    Option(
        "hessian_average",
        str,
        "One value of h for each `element`, convolution `kernel` or output `row`.",
        "element",
        choices=("element", "kernel", "row"),
    ),
    Option("hessian_power", float, "Exponent of h in the denominator.", 1.0, choices=(0.5, 1.0), in_step=True),
    Option(
        "cautious", bool, "Skip coordinates whose update has the sign opposite to the gradient.", False, in_step=True
    ),
    Option(
        "lr_factors",
        dict,
        "Learning rate over `lr0` by part: `backbone`, `neck`, `head`, `new` (what did not come from the weights, row "
        "by row; `auto` is 0.01 / lr0, at least 1) or a pattern of parameter names. Every optimizer takes it.",
        {},
    ),
    Option(
        "bn_momentum",
        float,
        "Momentum of BatchNorm's running statistics. Without a value the model keeps its own. "
        "External optimizers take it too.",
        0.03,
        low=0,
        high=1,
        ends="(]",
    ),
    Option(
        "fit_head",
        bool,
        "Fit the new class rows by logistic regression before the first step. Every optimizer takes it.",
        False,
    ),
    Option("beta2", float, "Decay of h per Hessian update.", 0.99, low=0, high=1, ends="[)"),
    Option(
        "fused",
        bool,
        "Step with one Triton kernel: by default on CUDA where it can be used, else with multi-tensor kernels. "
        "`True`: an error where it cannot.",
        AUTO,
        words=(AUTO,),
    ),
)
"""Sophia's own arguments. The defaults are those of arXiv 2305.14342 and its code."""

ULTRALYTICS_ARGS: Mapping[str, Option] = _by_name(
    # `auto` is valid in a preset only: Ultralytics takes numbers.
    Option(
        "lr0", float, "Initial learning rate. `auto` is for presets.", low=0, high=1, words=(AUTO,), search=(5e-5, 5e-3)
    ),
    Option("lrf", float, "Final learning rate over the initial one.", low=0, high=1),
    Option("momentum", float, "Decay of m per step (beta1).", low=0, high=1, ends="[)"),
    Option("weight_decay", float, "Decoupled weight decay.", low=0, high=1),
    Option("warmup_bias_lr", float, "Learning rate of the biases at the start of the warm-up.", low=0, high=1),
    Option("cos_lr", bool, "Cosine schedule instead of a linear one."),
    Option("warmup_epochs", float, "Epochs of warm-up.", low=0, ends="[)"),
)
"""Ultralytics' arguments that a preset may set, because their defaults are meant for SGD. The ranges are its own."""

STEP_OPTIONS = tuple(name for name, option in OPTIONS.items() if option.in_step)
"""Names of the options of the update rule: keys of every parameter group, off by default."""

ALL: Mapping[str, Option] = MappingProxyType({**OPTIONS, **ULTRALYTICS_ARGS})


def _power_of_root(value: Any) -> float:
    return {True: 0.5, False: 1.0}[value]


def _factors_of_head(value: Any) -> dict[str, Any]:
    if str(value).lower() == AUTO:
        return {NEW: AUTO}
    return {} if value == 1 else {"head": value}


RENAMED: Mapping[str, tuple[str, type, Callable[[Any], Any]]] = MappingProxyType(
    {
        "hessian_root": ("hessian_power", bool, _power_of_root),
        "head_lr_factor": ("lr_factors", object, _factors_of_head),
    }
)
"""Names of 0.1.0, accepted for one version: the new name, the kind of the old values, the new value for an old one."""


def keys(kind: str) -> set[str]:
    """Names of the options that Ultralytics' configuration checks as "fraction", "int" or "bool"."""
    kinds = {"int": int, "bool": bool}
    found = {name for name, o in OPTIONS.items() if (o.is_fraction if kind == "fraction" else o.kind is kinds[kind])}
    return {name for name in found if not OPTIONS[name].words}


def renamed(name: str, value: Any) -> tuple[str, Any]:
    """New name and value of an option under its name of 0.1.0; both as they are for any other name.

    Raises:
        ValueError: The old option does not have this value.
    """
    if name not in RENAMED:
        return name, value
    new, kind, convert = RENAMED[name]
    try:
        if not isinstance(value, kind):
            raise TypeError
        return new, OPTIONS[new].check(convert(value))
    except (TypeError, ValueError):
        raise ValueError(
            f"'{name}={value}' is an invalid value; use '{new}', which must be {OPTIONS[new].expected}."
        ) from None


def check_factors(name: str, value: Any) -> dict[str, float | str]:
    """Check a mapping of parts to factors; text that is a number becomes one, as YAML 1.1 reads 1e1 as text.

    Args:
        name: Name of the option.
        value: The mapping. The word "auto" is valid for the part "new" alone.

    Raises:
        TypeError: Not a mapping of text to numbers.
        ValueError: A factor is not a finite number above 0.
    """
    if not isinstance(value, Mapping):
        raise TypeError(
            f"'{name}={value}' is of invalid type {type(value).__name__}; '{name}' must be {FACTORS}, such as "
            "{'backbone': 0.1, 'new': 20}."
        )
    factors: dict[str, float | str] = {}
    for part, factor in value.items():
        if not isinstance(part, str) or not part.strip():
            raise TypeError(f"'{name}': found the part {part!r}, expected a name or a pattern of parameter names.")
        if isinstance(factor, str) and factor.lower() == AUTO and part == NEW:
            factors[part] = AUTO
            continue
        number = _as_number(factor)
        if number is None:
            word = f", or {AUTO}" if part == NEW else ""
            raise TypeError(f"'{name}': {part}: found {factor!r}, expected a number > 0{word}.")
        if not (number > 0 and math.isfinite(number)):
            hint = f" To keep layers as they are, use freeze=, not {part}: 0." if number == 0 else ""
            raise ValueError(f"'{name}': {part}: found {factor!r}, expected a finite number > 0.{hint}")
        factors[part] = number
    return factors


def _as_number(value: Any) -> float | None:
    """A number, or text that is one, as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def suggestion(name: object, known: Iterable[object]) -> str:
    """` Did you mean 'x'?` for the closest known name, or an empty string."""
    by_lower = {str(k).lower(): str(k) for k in known}
    close = get_close_matches(str(name).lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""

"""Learning rates by part of a model: which parameters an entry of `lr_factors` holds for, and the groups that follow.

Parts are `backbone` (the layers of the model YAML's `backbone`), `head` (the last module), `neck` (the layers between),
`new` (what did not come from the weights) and patterns of parameter names. Precedence: the longest pattern that
matches, then `new`, then the layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer

from yolo_sophia.integration.auto_lr import factor_for
from yolo_sophia.integration.initial_values import Rows
from yolo_sophia.integration.modules import head_of, trained_part
from yolo_sophia.integration.provenance import LOADS, RECORDED, Provenance
from yolo_sophia.integration.row_rates import RowRate
from yolo_sophia.options import AUTO, NEW, suggestion

LAYERS = ("backbone", "neck", "head")
"""Parts that are made of whole layers."""


@dataclass(frozen=True)
class Parts:
    """What each entry of `lr_factors` holds for.

    Attributes:
        factors: Factor by entry; None stands for what has no entry.
        entry: Entry of every parameter.
        rows: New rows of the parameters that have others as well; they belong to the entry `new`.
    """

    factors: Mapping[str | None, float]
    entry: Mapping[nn.Parameter, str | None]
    rows: Mapping[nn.Parameter, tuple[int, ...]]

    @property
    def order(self) -> list[str | None]:
        """The entries: none, layers, patterns, `new`."""
        patterns = sorted(part for part in self.factors if part is not None and part not in (*LAYERS, NEW))
        return [None, *(part for part in (*LAYERS, *patterns, NEW) if part in self.factors)]

    def label(self, entry: str | None) -> str | None:
        """The entry that a group is made for: a factor of 1 needs none."""
        return None if self.factors[entry] == 1 else entry


@dataclass(frozen=True)
class Split:
    """Parameter groups by part.

    Attributes:
        groups: The groups; the first one is made of the first one before, and the new parts come last.
        biases: Indices of the groups that were made of the first one before.
        row_rates: Rows with the rate of another group.
        labels: Entry that each group was made for; None for what has no entry, or a factor of 1.
    """

    groups: list[dict[str, Any]]
    biases: list[int]
    row_rates: list[RowRate]
    labels: list[str | None]


def numbers(factors: Mapping[str, float | str], lr: float) -> dict[str, float]:
    """The factors with the number for `auto`.

    Args:
        factors: Factor by part.
        lr: Learning rate that a factor of 1 gives.
    """
    return {part: factor_for(lr) if factor == AUTO else float(factor) for part, factor in factors.items()}


def layers_of(model: nn.Module) -> dict[str, str]:
    """Part, of `LAYERS`, by name of the parameter; empty where the model has no list of modules."""
    model = trained_part(model)
    if head_of(model) is None:
        return {}
    backbone = len((getattr(model, "yaml", None) or {}).get("backbone") or ())
    layers = list(model.model)
    found = {}
    for i, layer in enumerate(layers):
        part = "head" if i == len(layers) - 1 else "backbone" if i < backbone else "neck"
        found.update({f"model.{i}.{name}": part for name, _ in layer.named_parameters()})
    return found if backbone else {name: part for name, part in found.items() if part == "head"}


def assign(model: nn.Module, factors: Mapping[str, float], new: Mapping[str, Rows]) -> Parts:
    """Find the entry of every parameter.

    Args:
        model: The model; its parameters are named as in the bare model, of a distillation in the student.
        factors: Factor by part.
        new: Rows that did not come from the weights by parameter name; None: the whole tensor.

    Raises:
        ValueError: An entry is no part of this model. `new` is a part of every model, though nothing may be new.
    """
    layers, parameters = layers_of(model), dict(trained_part(model).named_parameters())
    patterns = [part for part in factors if part not in (*LAYERS, NEW)]
    _check(factors, [part for part in LAYERS if part in layers.values()], patterns, parameters)
    entry: dict[nn.Parameter, str | None] = {}
    partly: dict[nn.Parameter, tuple[int, ...]] = {}
    for name, p in parameters.items():
        matches = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        rows = new.get(name, ()) if NEW in factors and not matches else ()
        if matches:
            part = max(matches, key=lambda x: (len(x), x))
        elif rows is None or 0 < len(rows) == len(p):
            part = NEW
        else:
            part = layers.get(name)
            if rows:
                partly[p] = tuple(rows)
        entry[p] = part if part in factors else None
    return Parts({None: 1.0, **factors}, entry, partly)


def _check(factors: Iterable[str], layers: Sequence[str], patterns: Sequence[str], parameters: Iterable[str]) -> None:
    for part in factors:
        if part == NEW or part in layers or (part in patterns and any(fnmatchcase(x, part) for x in parameters)):
            continue
        known = [*layers, NEW]
        raise ValueError(
            f"lr_factors: {part!r} is no part of this model, and no parameter has such a name."
            f"{suggestion(part, known)} Its parts are {', '.join(known)}, and patterns of parameter names such as "
            f"{_example(parameters)}."
        )


def _example(parameters: Iterable[str]) -> str:
    last = list(parameters)[-1]
    return f"{'.'.join(last.split('.')[:3])}*"


def split(groups: Sequence[Mapping[str, Any]], parts: Parts) -> Split:
    """Split parameter groups by part; every other key of a group is kept, and its `lr` is multiplied.

    Groups without parameters are dropped, except the first one, which Ultralytics 8.3 takes for the biases in its
    warm-up, and those that rows take their rate from.

    Args:
        groups: The groups, with `lr`.
        parts: Entry of each parameter.
    """
    labels = list(dict.fromkeys(parts.label(entry) for entry in parts.order))
    if labels == [None]:
        return Split([dict(group) for group in groups], [0], [], [None] * len(groups))
    label_of = {p: parts.label(entry) for p, entry in parts.entry.items()}
    base_of = {p: base for base, group in enumerate(groups) for p in group["params"]}
    own_rate = [p for p in parts.rows if p in base_of and parts.factors[NEW] != parts.factors[parts.entry[p]]]
    needed = {(0, None), *((base_of[p], parts.label(NEW)) for p in own_rate)}
    made, index = [], {}
    for label in labels:
        for base, group in enumerate(groups):
            params = [p for p in group["params"] if label_of.get(p) == label]
            if params or (base, label) in needed:
                index[base, label] = len(made)
                made.append({**group, "params": params, "lr": group["lr"] * parts.factors[label]})
    rates = [
        RowRate(p, parts.rows[p], index[base_of[p], label_of[p]], index[base_of[p], parts.label(NEW)]) for p in own_rate
    ]
    return Split(made, [i for (base, _), i in index.items() if base == 0], rates, [label for _, label in index])


def warm_up_biases(optimizer: Optimizer, trainer: Any, biases: Sequence[int]) -> None:
    """Let all groups of biases start from `warmup_bias_lr`, where Ultralytics gives it to the first group alone (8.3).

    Args:
        optimizer: The optimizer.
        trainer: Its trainer, with `args.warmup_bias_lr`, `lf` and `epoch`.
        biases: Indices of the groups of biases.
    """
    groups = optimizer.param_groups
    start = float(trainer.args.warmup_bias_lr)
    if biases[1:] and start and not any("param_group" in group for group in groups):
        optimizer.register_step_pre_hook(lambda *_: _set_bias_rates(optimizer, trainer, biases, start))


def _set_bias_rates(optimizer: Optimizer, trainer: Any, biases: Sequence[int], start: float) -> None:
    """The rates that the warm-up would give these groups; its progress is read from a group that starts at 0."""
    groups, schedule = optimizer.param_groups, trainer.lf(trainer.epoch)
    targets = [group["initial_lr"] * schedule for group in groups]
    others = [i for i in range(len(groups)) if i not in biases and targets[i] > 0]
    done = groups[others[0]]["lr"] / targets[others[0]] if others else 1.0
    if 0 <= done < 1 and math.isclose(groups[0]["lr"], start + (targets[0] - start) * done, rel_tol=1e-6):
        for i in biases[1:]:
            groups[i]["lr"] = start + (targets[i] - start) * done


def table(parts: Parts, found: Split, provenance: Provenance | None) -> list[str]:
    """Lines that show the parts with their rates, and where the class rows came from.

    Args:
        parts: Entry of each parameter.
        found: The groups that follow.
        provenance: What is new; None if that does not matter.
    """
    rate_of = {p: group["lr"] for group in found.groups for p in group["params"]}
    rate_of_rows = {rate.parameter: found.groups[rate.reference]["lr"] for rate in found.row_rates}
    rows_in = {p: len(rows) * (p.numel() // len(p)) for p, rows in parts.rows.items() if p in rate_of}
    lines = [("part", "tensors", "parameters", "rate")]
    for entry in parts.order:
        sizes = {p: p.numel() - rows_in.get(p, 0) for p in rate_of if parts.entry.get(p) == entry}
        if sizes or entry is not None:
            lines.append(_line(entry or "others", sizes, rate_of))
        if entry == NEW and rows_in:
            lines.append(_line(f"{NEW} (rows of a tensor)", rows_in, {**rate_of, **rate_of_rows}))
    widths = [max(map(len, column)) for column in zip(*lines)]
    shown = [f"{p:<{widths[0]}}  {t:>{widths[1]}}  {n:>{widths[2]}}  {rate}" for p, t, n, rate in lines]
    return shown + ([] if provenance is None else [_origin(provenance)])


def _line(part: str, sizes: Mapping[nn.Parameter, int], rate_of: Mapping[nn.Parameter, float]) -> tuple[str, ...]:
    rates = ", ".join(f"{rate:.4g}" for rate in sorted({rate_of[p] for p in sizes})) or "-"
    return part, str(len(sizes)), f"{sum(sizes.values()):,}", rates


def _origin(provenance: Provenance) -> str:
    known = {LOADS: "new: what was not loaded", RECORDED: "new: as recorded by the run that is resumed"}
    text = known.get(provenance.origin, "new: judged by initial values, as no load of weights was seen")
    rows = provenance.class_rows
    if rows is not None:
        counts = {"new": rows.new, "copied by name": rows.by_name, "copied by position": rows.by_position}
        text += "; class rows: " + ", ".join(f"{len(own)} {name}" for name, own in counts.items())
    return text

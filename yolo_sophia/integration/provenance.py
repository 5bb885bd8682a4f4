"""Which parameters of a model came from weights, row by row, and which are new.

It is read from the loads that took place (loads.py), and where none was seen from the tensors (initial_values.py);
never from how the run names its model: YAML plus `.load()`, `pretrained=False`, `reset_weights()` and a file without
suffix all end in the same place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from yolo_sophia.integration.initial_values import Rows
from yolo_sophia.integration.loads import LoadRecord, is_known, record_of
from yolo_sophia.integration.modules import class_layers, trained_part

LOADS, RECORDED, TENSORS = "loads", "recorded", "tensors"

VARIABLE = "YOLO_SOPHIA_PROVENANCE"
"""Environment variable that takes the provenance of a model to the workers of a multi-GPU run."""


@dataclass(frozen=True)
class ClassRows:
    """Where the class rows, the outputs of the class layers, came from.

    It describes what Ultralytics did. Ultralytics 8.4 copies the rows whose class names match. If no name matches, if
    either model has placeholder names or under `cls_remap=False`, it copies all rows by position where the numbers of
    classes are equal, and none otherwise. Rows without a match stay random as soon as one name matches. Ultralytics
    8.3 knows no names: all rows by position, or none.

    Attributes:
        by_name: Classes whose row stood for a class of the same name in the weights.
        by_position: Classes whose row was copied with the same index from a class of another name.
        new: Classes whose row was not copied.
    """

    by_name: tuple[int, ...]
    by_position: tuple[int, ...]
    new: tuple[int, ...]


@dataclass(frozen=True)
class Provenance:
    """Which parameters did not come from weights.

    Attributes:
        new: By parameter name: the rows (first dimension) that did not come from weights; None: the whole tensor. A
            parameter that came from weights is not in it. Input channels that were copied in part count as copied.
        origin: "loads" (read from the loads that took place), "recorded" (in the arguments of a resumed run) or
            "tensors" (no load was seen: initial biases, BatchNorm buffers).
        class_rows: Where the class rows came from; None where the head has none, or where it is not known.
    """

    new: Mapping[str, Rows]
    origin: str
    class_rows: ClassRows | None


def provenance_of(model: nn.Module) -> Provenance:
    """The provenance of a model's parameters, before its first training step.

    A row is new if it was new in the module that it was copied from. A copy of a module (`deepcopy`, the EMA) has no
    record; its tensors are read. A training does not change the record.

    Args:
        model: The model, its DistributedDataParallel or compiled wrapper, or a distillation (its student is meant).
    """
    model = trained_part(model)
    text = os.environ.get(VARIABLE)
    if text and not is_known(model):
        there = {name for name, _ in model.named_parameters()}
        found = replace(decode(text), origin=LOADS)
        if found.new.keys() <= there:
            return found
    record = record_of(model)
    return Provenance(dict(record.new), LOADS if record.is_seen else TENSORS, _class_rows(model, record))


def _class_rows(model: nn.Module, record: LoadRecord) -> ClassRows | None:
    layers = class_layers(model)
    if not layers:
        return None
    count = len(next(iter(layers.values())).weight)
    new: set[int] = set()
    for path in layers:
        rows = record.new.get(f"{path}.weight", ())
        new.update(range(count) if rows is None else rows)
    copied = [k for k in range(count) if k not in new]
    if copied and (not record.is_seen or len(record.class_names) != count):
        return None
    names = getattr(model, "names", None) or {}
    names = names if isinstance(names, dict) else dict(enumerate(names))
    by_name = [k for k in copied if _plain(record.class_names[k]) == _plain(names.get(k))]
    return ClassRows(tuple(by_name), tuple(k for k in copied if k not in by_name), tuple(sorted(new)))


def _plain(name: Any) -> str:
    return str(name).strip().lower()


def starts_from_weights(model: nn.Module) -> bool:
    """Whether most of a model's weights came from a checkpoint."""
    model = trained_part(model)
    new = provenance_of(model).new
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    return 2 * sum(size for name, size in sizes.items() if new.get(name, ()) is not None) > sum(sizes.values())


def encode(provenance: Provenance) -> str:
    """A provenance as compact JSON, for the arguments of a run; `decode` reads it."""
    groups: dict[str | None, list[str]] = {}
    for name, rows in provenance.new.items():
        groups.setdefault(None if rows is None else _ranges(rows), []).append(name)
    rows = provenance.class_rows
    classes = None if rows is None else [_ranges(rows.by_name), _ranges(rows.by_position), _ranges(rows.new)]
    new = [[key, " ".join(names)] for key, names in groups.items()]
    return json.dumps({"new": new, "classes": classes}, separators=(",", ":"))


def decode(text: str) -> Provenance:
    """The provenance that `encode` wrote; its origin is "recorded".

    Raises:
        ValueError: The text is of another form.
    """
    try:
        content = json.loads(text)
        new = {name: None if key is None else _rows(key) for key, names in content["new"] for name in names.split()}
        classes = content["classes"]
        return Provenance(new, RECORDED, None if classes is None else ClassRows(*map(_rows, classes)))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"new rows {text[:80]!r}: expected JSON as yolo_sophia.integration.provenance.encode writes it. Remove the "
            "argument to have them read from the model."
        ) from error


def _ranges(rows: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) as "0-2,5"."""
    parts: list[list[int]] = []
    for row in sorted(rows):
        if parts and row == parts[-1][-1] + 1:
            parts[-1][1:] = [row]
        else:
            parts.append([row])
    return ",".join("-".join(map(str, part)) for part in parts)


def _rows(text: str) -> tuple[int, ...]:
    ends = [[int(end) for end in part.split("-")] for part in text.split(",") if part]
    return tuple(row for part in ends for row in range(part[0], part[-1] + 1))


@contextmanager
def provenance_for_workers(model: Any) -> Iterator[None]:
    """Hand a model's provenance on to processes that are started meanwhile: they get the model without its record."""
    if not isinstance(model, nn.Module) or not is_known(trained_part(model)):
        yield
        return
    os.environ[VARIABLE] = encode(provenance_of(model))
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)


def listed_names(names: Any) -> tuple[str, ...]:
    """Class names that a model or data set holds as a mapping, as a list or not at all."""
    return tuple(map(str, names.values() if isinstance(names, dict) else names or ()))

"""What the loads of a model copied: read from its tensors before and after, and kept beside the module.

Ultralytics copies in several ways: whole tensors of equal name and shape; class rows whose names match (8.4); the
first input channels; class branches that it rebuilds at the width of the source (8.4). Nothing here repeats those
rules. A tensor is compared with the one of the same name in the source, and its rows with the source's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from yolo_sophia.integration.initial_values import Rows, initial_parameters, trained_norms
from yolo_sophia.integration.modules import class_layers


@dataclass(frozen=True)
class LoadRecord:
    """What a model's weights are after its loads.

    Attributes:
        new: Rows that did not come from weights, by parameter; None: the whole tensor.
        class_names: The class that each class row stood for in the weights that it came from; None: the row is new.
        shapes: Shape by parameter, to recognise layers that are replaced later.
        norms: The BatchNorm layers that had seen images, to recognise layers that are reset later.
        is_seen: Whether this was read from loads.
    """

    new: dict[str, Rows]
    class_names: tuple[str | None, ...] = ()
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    norms: frozenset[str] = frozenset()
    is_seen: bool = True


_LOADED: WeakKeyDictionary[nn.Module, LoadRecord] = WeakKeyDictionary()
_BUILT: WeakSet[nn.Module] = WeakSet()


def note_built(layers: nn.Module) -> None:
    """Remember the layers of a model that has just been built from its layout: their weights are random."""
    _BUILT.add(layers)


def is_known(model: nn.Module) -> bool:
    """Whether the model was built or loaded in this process."""
    return model in _LOADED or getattr(model, "model", None) in _BUILT


def record_of(model: nn.Module) -> LoadRecord:
    """What the model's weights are now.

    Layers that were replaced or reset after the last load are new. A module that was built and never loaded is new. Of
    any other, such as one that was unpickled, the tensors are read.
    """
    record = _LOADED.get(model)
    if record is None:
        initial = initial_parameters(model, is_known(model))
        is_new = initial == dict.fromkeys(name for name, _ in model.named_parameters())
        fresh = [initial.get(f"{path}.weight", ()) for path in class_layers(model)]
        names = (None if any(_has(rows, k) for rows in fresh) else name for k, name in enumerate(_names(model)))
        return LoadRecord(initial, tuple(names), is_seen=is_new and is_known(model))
    new = dict(record.new)
    norms = trained_norms(model)
    reset = [path for path in record.norms if not norms.get(path, False)]
    blocks = tuple(f"{path.rpartition('.')[0]}." for path in reset)
    for name, parameter in model.named_parameters():
        replaced = record.shapes.get(name) != parameter.shape
        if replaced or (reset and len(reset) == len(record.norms)) or (blocks and name.startswith(blocks)):
            new[name] = None
    return LoadRecord(new, record.class_names, record.shapes, record.norms)


def recorded_load(original: Callable, model: nn.Module, weights: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `BaseModel.load` and record what it copied.

    `weights` is a module, or a checkpoint with modules under `ema` or `model`.
    """
    candidates = [weights.get("ema"), weights.get("model")] if isinstance(weights, dict) else [weights]
    sources = [module for module in candidates if isinstance(module, nn.Module)]
    shapes = [{name: p.shape for name, p in source.named_parameters()} for source in sources]
    base, before = record_of(model), {}
    for name, parameter in model.named_parameters():
        is_whole = parameter.dim() > 1 and all(s.get(name) == parameter.shape for s in shapes)
        before[name] = parameter, None if is_whole else parameter.detach().clone()
    result = original(model, weights, *args, **kwargs)
    if sources:  # which of two it takes depends on the version
        source = max(sources, key=lambda module: _equal_tensors(model, module)) if len(sources) > 1 else sources[0]
        _LOADED[model] = _record(model, source, base, before)
    return result


def _record(model: nn.Module, source: nn.Module, base: LoadRecord, before: Mapping[str, tuple]) -> LoadRecord:
    """The record of a model that has loaded from `source`.

    `base` is its record before. `before` has, by name, each parameter before the load, and its values where they help.
    """
    origin, theirs = record_of(source), dict(source.named_parameters())
    new: dict[str, Rows] = {}
    found: dict[str, list[int]] = {}
    weights_first = sorted(model.named_parameters(), key=lambda item: item[1].dim() < 2)
    for name, parameter in weights_first:
        after, (earlier, values) = parameter.detach(), before.get(name, (None, None))
        if earlier is not parameter or (values is not None and values.shape != after.shape):
            stayed, was = None, None  # the layer was rebuilt
        else:
            stayed, was = _equal_rows(after, values), base.new.get(name, ())
        weight = found.get(f"{name.rpartition('.')[0]}.weight")
        found[name] = rows = _source_rows(after, theirs.get(name), stayed, weight)
        there = origin.new.get(name, ())
        fresh = tuple(
            k
            for k, j in enumerate(rows)
            if (_has(there, j) if j >= 0 else stayed is None or not stayed[k] or _has(was, k))
        )
        if fresh:
            new[name] = None if len(fresh) == len(rows) else fresh
    names: tuple[str | None, ...] = ()
    if layers := class_layers(model):
        weight = f"{next(iter(layers))}.weight"
        kept, copied = base.class_names, origin.class_names or _names(source)
        at = [(j, copied) if j >= 0 else (k, kept) for k, j in enumerate(found.get(weight, ()))]
        names = tuple(
            known[j] if j < len(known) and not _has(new.get(weight, ()), k) else None for k, (j, known) in enumerate(at)
        )
    norms = frozenset(path for path, trained in trained_norms(model).items() if trained)
    return LoadRecord(new, names, {name: p.shape for name, p in model.named_parameters()}, norms)


def _source_rows(
    after: Tensor, source: Tensor | None, stayed: list[bool] | None, weight: list[int] | None
) -> list[int]:
    """The row of the source that each row was copied from; -1: from none.

    Args:
        after: A parameter after the load, of any shape; a scalar is one row.
        source: The parameter of the same name in the source.
        stayed: Whether each row has kept its value; None: the parameter is another than before.
        weight: The rows of the weight of the same layer.
    """
    count = _length(after)
    if source is None or source.dim() != after.dim():
        return [-1] * count
    source = source.detach().to(after)
    if _is_same(after, source):
        return list(range(count))
    if after.shape[1:] != source.shape[1:]:  # at most some input channels were copied, row by row
        return [-1 if stayed is None or same else k for k, same in enumerate(stayed or [True] * count)]
    if after.dim() > 1:
        return _matching(_flat(after), _flat(source))
    if weight is not None and len(weight) == count and max(weight) >= 0:  # equal numbers alone say little
        return [j if j >= 0 and after[k] == source[j] else -1 for k, j in enumerate(weight)]
    matching = _matching(_flat(after), _flat(source))
    return [-1 if same else j for same, j in zip(stayed or [False] * count, matching)]


def _matching(rows: Tensor, source: Tensor) -> list[int]:
    """For each row, an equal row of the source: that of the same index if possible; -1: none."""
    where: dict[bytes, list[int]] = {}
    for j, row in enumerate(source.cpu().float().numpy()):
        where.setdefault(row.tobytes(), []).append(j)
    equal = [where.get(row.tobytes(), [-1]) for row in rows.cpu().float().numpy()]
    return [k if k in found else found[0] for k, found in enumerate(equal)]


def _equal_rows(after: Tensor, values: Tensor | None) -> list[bool]:
    """Whether each row has a value; of a parameter whose values were not kept, each counts as equal."""
    return [True] * _length(after) if values is None else (_flat(after) == _flat(values)).all(1).tolist()


def _equal_tensors(model: nn.Module, source: nn.Module) -> int:
    theirs = dict(source.named_parameters())
    return sum(name in theirs and _is_same(p.detach(), theirs[name]) for name, p in model.named_parameters())


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.detach().to(one))


def _has(rows: Rows, row: int) -> bool:
    return rows is None or row in rows


def _length(tensor: Tensor) -> int:
    return len(tensor) if tensor.dim() else 1


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(_length(tensor), -1)


def _names(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "names", None) or ()
    return tuple(map(str, names.values() if isinstance(names, dict) else names))

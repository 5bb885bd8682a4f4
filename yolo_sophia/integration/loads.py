"""What the loads of a model copied: read from its tensors before and after, and kept beside the module.

Ultralytics copies in several ways: whole tensors of equal name and shape; class rows whose names match (8.4); the
first input channels; class branches that it rebuilds at the width of the source (8.4). Nothing here repeats those
rules. A tensor is compared with the one of the same name in the source, and its rows with the source's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
        everything = len(initial) == sum(1 for _ in model.named_parameters())
        is_seen = is_known(model) and everything and None in initial.values()
        names = _names(model) if not everything else ()
        fresh = {row for path in class_layers(model) for row in initial.get(f"{path}.weight", ()) or ()}
        return LoadRecord(initial, tuple(None if k in fresh else n for k, n in enumerate(names)), is_seen=is_seen)
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

    Args:
        original: The method.
        model: The module that loads.
        weights: A module, or a checkpoint with modules under `ema` or `model`.
        *args: Further arguments of the method.
        **kwargs: Further arguments of the method.
    """
    options = [weights.get("ema"), weights.get("model")] if isinstance(weights, dict) else [weights]
    sources = [module for module in options if isinstance(module, nn.Module)]
    base = record_of(model)
    shapes = [{name: p.shape for name, p in source.named_parameters()} for source in sources]
    before = {}
    for name, parameter in model.named_parameters():
        is_whole = parameter.dim() > 1 and all(s.get(name) == parameter.shape for s in shapes)
        before[name] = parameter, None if is_whole else parameter.detach().clone()
    result = original(model, weights, *args, **kwargs)
    if sources:  # which of two it took depends on the version
        source = max(sources, key=lambda module: _equal_tensors(model, module)) if len(sources) > 1 else sources[0]
        _LOADED[model] = _record(model, source, base, before)
    return result


def _equal_tensors(model: nn.Module, source: nn.Module) -> int:
    theirs = dict(source.named_parameters())
    return sum(name in theirs and _is_same(p.detach(), theirs[name]) for name, p in model.named_parameters())


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.detach().to(one))


def _record(model: nn.Module, source: nn.Module, base: LoadRecord, before: Mapping[str, tuple]) -> LoadRecord:
    origin = record_of(source)
    theirs = dict(source.named_parameters())
    new: dict[str, Rows] = {}
    maps: dict[str, list[int]] = {}
    parameters = sorted(model.named_parameters(), key=lambda item: item[1].dim() < 2)  # a bias follows its weight
    for name, parameter in parameters:
        after = parameter.detach()
        old, snapshot = before.get(name, (None, None))
        if old is not parameter or (snapshot is not None and snapshot.shape != after.shape):
            earlier = None  # the layer was rebuilt
        else:
            earlier = after if snapshot is None else snapshot
        beside = maps.get(f"{name.rpartition('.')[0]}.weight")
        maps[name] = found = _source_rows(after, theirs.get(name), earlier, snapshot, beside)
        new_there, new_before = _rows(origin.new, name, theirs), base.new.get(name, ())
        kept = [True] * len(found) if earlier is None else _unchanged(after, earlier)
        rows = [
            k
            for k, j in enumerate(found)
            if ((new_there is None or j in new_there) and j >= 0)
            or (j < 0 and (earlier is None or not kept[k] or new_before is None or k in new_before))
        ]
        if rows:
            new[name] = None if len(rows) == len(found) else tuple(rows)
    names: tuple[str | None, ...] = ()
    for path in class_layers(model):
        found = maps[f"{path}.weight"]
        there = origin.class_names or _names(source)
        rows = _as_set(new.get(f"{path}.weight", ()), len(found))
        kept = base.class_names or (None,) * len(found)
        names = tuple(
            None if k in rows else (there[j] if j < len(there) else None) if j >= 0 else kept[k]
            for k, j in enumerate(found)
        )
        break
    shapes = {name: p.shape for name, p in parameters}
    norms = frozenset(path for path, trained in trained_norms(model).items() if trained)
    return LoadRecord(new, names, shapes, norms)


def _rows(new: Mapping[str, Rows], name: str, theirs: Mapping[str, Tensor]) -> frozenset[int] | None:
    rows = new.get(name, ())
    return None if rows is None else frozenset(rows)


def _as_set(rows: Rows, count: int) -> frozenset[int]:
    return frozenset(range(count) if rows is None else rows)


def _unchanged(after: Tensor, earlier: Tensor) -> list[bool]:
    if after is earlier:
        return [True] * _length(after)
    return (_flat(after) == _flat(earlier)).all(1).tolist()


def _length(tensor: Tensor) -> int:
    return len(tensor) if tensor.dim() else 1


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(_length(tensor), -1)


def _source_rows(
    after: Tensor, source: Tensor | None, earlier: Tensor | None, snapshot: Tensor | None, beside: list[int] | None
) -> list[int]:
    """The row of the source that each row was copied from; -1: from none."""
    count = _length(after)
    nothing = [-1] * count
    if source is None or source.dim() != after.dim():
        return nothing
    source = source.detach().to(after)
    if _is_same(after, source):
        return list(range(count))
    if after.shape[1:] != source.shape[1:]:  # at most some input channels were copied, row by row
        return nothing if earlier is None else [-1 if same else k for k, same in enumerate(_unchanged(after, earlier))]
    if after.dim() < 2 and beside is not None and len(beside) == count and max(beside) >= 0:
        return [j if j >= 0 and after[k] == source[j] else -1 for k, j in enumerate(beside)]
    found = _matching(_flat(after), _flat(source))
    if after.dim() < 2:  # equal numbers alone say little
        kept = [True] * count if snapshot is None or snapshot.shape != after.shape else _unchanged(after, snapshot)
        found = [-1 if same else j for same, j in zip(kept, found)]
    return found


def _matching(rows: Tensor, source: Tensor) -> list[int]:
    """For each row, an equal row of the source: that of the same index if possible; -1: none."""
    where: dict[bytes, list[int]] = {}
    for j, row in enumerate(_contents(source)):
        where.setdefault(row, []).append(j)
    equal = [where.get(row, [-1]) for row in _contents(rows)]
    return [k if k in found else found[0] for k, found in enumerate(equal)]


def _contents(rows: Tensor) -> Iterable[bytes]:
    return [row.tobytes() for row in rows.cpu().float().numpy()]


def _names(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "names", None) or ()
    return tuple(map(str, names.values() if isinstance(names, dict) else names))

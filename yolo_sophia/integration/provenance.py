"""What a model's weights are: which tensors came from a checkpoint, and the class names of that checkpoint.

Both are read from the model and from the loads that took place, and never from how the run names its model: YAML plus
`.load()`, `pretrained=False`, `reset_weights()` and a file without suffix all end in the same place.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from yolo_sophia.integration.modules import trained_part

NAMES_VARIABLE = "YOLO_SOPHIA_WEIGHT_NAMES"
"""Environment variable that takes the class names of loaded weights to the workers of a multi-GPU run."""

_LOADED: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def note_load(model: nn.Module, weights: Any) -> None:
    """Remember the class names of the weights that a model has just loaded.

    Names follow a chain of loads: `YOLO("x.yaml").load("w.pt").train()` loads twice, and the module in the middle has
    the placeholder names of its YAML.

    Args:
        model: The module that was loaded into.
        weights: A module, or a checkpoint with one under `ema` or `model`.
    """
    source = (weights.get("ema") or weights.get("model")) if isinstance(weights, dict) else weights
    if isinstance(source, nn.Module):
        _LOADED[model] = _LOADED.get(source, lower_names(getattr(source, "names", None)))


def weight_names(model: nn.Module) -> frozenset[str]:
    """Class names of the weights that a model has loaded, in lower case; none where no load was seen."""
    model = trained_part(model)
    if model in _LOADED:
        return _LOADED[model]
    return lower_names(json.loads(os.environ.get(NAMES_VARIABLE, "[]")))


@contextmanager
def names_for_workers(model: Any) -> Iterator[None]:
    """Hand the class names of a model's weights on to processes that are started meanwhile."""
    if not isinstance(model, nn.Module) or not (names := weight_names(model)):
        yield
        return
    os.environ[NAMES_VARIABLE] = json.dumps(sorted(names))
    try:
        yield
    finally:
        del os.environ[NAMES_VARIABLE]


def listed_names(names: Any) -> tuple[str, ...]:
    """Class names that a model or data set holds as a mapping, as a list or not at all."""
    return tuple(map(str, names.values() if isinstance(names, dict) else names or ()))


def lower_names(names: Any) -> frozenset[str]:
    """The same in lower case."""
    return frozenset(map(str.lower, listed_names(names)))


def starts_from_weights(model: nn.Module) -> bool:
    """Whether most of a model's weights came from a checkpoint."""
    model = trained_part(model)
    found = tensors_from_weights(model)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    return 2 * sum(size for name, size in sizes.items() if name in found) > sum(sizes.values())


def tensors_from_weights(model: nn.Module) -> set[str]:
    """Names of the parameters that are not at their random initial values.

    The running means of BatchNorm are exactly 0 until a model sees an image: the pass that measures the strides sees
    zeros. They speak for their own layer and for the layers beside it in the same block. A layer without BatchNorm
    beside it is recognised by a weight outside of PyTorch's initial range, +-1 / sqrt(fan_in).

    Args:
        model: The bare model, before its first training step.
    """
    found: set[str] = set()
    for prefix, parent in model.named_modules():
        children = dict(parent.named_children())
        norms = {name: m for name, m in children.items() if _has_statistics(m)}
        is_trained = any(not _is_initial(m) for m in norms.values())
        for name, child in children.items():
            if next(child.children(), None) is not None:
                continue
            trained = not _is_initial(child) if name in norms else is_trained if norms else _left_initial_range(child)
            if trained:
                path = f"{prefix}.{name}" if prefix else name
                found |= {f"{path}.{own}" for own, _ in child.named_parameters()}
    return found


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def _is_initial(norm: nn.Module) -> bool:
    return not bool(norm.running_mean.any())


def _left_initial_range(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or isinstance(module, nn.Embedding):
        return False
    bound = 1 / math.sqrt(weight[0].numel())
    with torch.no_grad():
        return bool(weight.abs().max() > bound * 1.01)  # weights are saved in float16

"""Views of an Ultralytics model: without its wrappers, its student, its head."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrap(model: nn.Module) -> Any:
    """The model inside DistributedDataParallel and torch.compile."""
    return _wrappers(model)[-1]


def is_compiled(model: nn.Module) -> bool:
    """Whether the model is inside torch.compile."""
    return any(hasattr(layer, "_orig_mod") for layer in _wrappers(model))


def trained_part(model: nn.Module) -> Any:
    """The bare model that is trained: of a distillation, the student."""
    model = unwrap(model)
    return getattr(model, "student_model", model)


def head_of(model: nn.Module) -> nn.Module | None:
    """The head, the last module of the model's list; None where the model has no such list."""
    layers = getattr(trained_part(model), "model", None)
    is_list = isinstance(layers, (nn.Sequential, nn.ModuleList))
    return layers[-1] if is_list and len(layers) else None


def _wrappers(model: nn.Module) -> list[Any]:
    """The model, the model that it wraps, and so on."""
    layers = [model]
    while layers[-1] is not None:  # a compiled model has no truth value: it asks the model for its length
        layers.append(getattr(layers[-1], "module", getattr(layers[-1], "_orig_mod", None)))
    return layers[:-1]

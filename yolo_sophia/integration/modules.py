"""Views of an Ultralytics model: without its wrappers, its student, its head."""

from __future__ import annotations

from typing import Any

from torch import nn

CLASS_ATTRIBUTES = ("cv3", "one2one_cv3", "linear", "classifier", "enc_score_head", "dec_score_head")
"""Where the heads of Ultralytics hold their class layers."""


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


def class_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the head that have one output per class, by their names in the model.

    These are the last convolutions of the class branches (both sets of a two-headed detector), the linear layer of a
    classifier, the score layers of RT-DETR. A head that compares embeddings with texts has none.
    """
    model = trained_part(model)
    head = head_of(model)
    classes = getattr(head, "nc", None) or len(getattr(model, "names", None) or ())
    found: dict[str, nn.Module] = {}
    for attribute in CLASS_ATTRIBUTES:
        branches = getattr(head, attribute, None)
        for branch in branches if isinstance(branches, nn.ModuleList) else [branches]:
            last = branch[-1] if isinstance(branch, nn.Sequential) and len(branch) else branch
            outputs = getattr(last, "out_channels", getattr(last, "out_features", None))
            if isinstance(last, (nn.Conv2d, nn.Linear)) and (outputs == classes or attribute == "linear"):
                found |= {name: last for name, module in model.named_modules() if module is last}
    return found


def _wrappers(model: nn.Module) -> list[Any]:
    """The model, the model that it wraps, and so on."""
    layers = [model]
    while layers[-1] is not None:  # a compiled model has no truth value: it asks the model for its length
        layers.append(getattr(layers[-1], "module", getattr(layers[-1], "_orig_mod", None)))
    return layers[:-1]

"""Which parameters of a model are at their random initial values, as far as the tensors show it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from yolo_sophia.integration.modules import class_layers, head_of

Rows = tuple[int, ...] | None
"""Rows (first dimension) of a parameter; None: the whole tensor."""

_ENOUGH = 1000  # elements whose largest one tells the bound of a uniform distribution to within 2 %


def initial_parameters(model: nn.Module, is_built: bool = False) -> dict[str, Rows]:
    """Parameters that are at their initial values, and of the class layers the rows.

    The running means of BatchNorm are exactly 0 until a model sees an image. They speak for the smallest block around
    them. The biases of an initial class row are those of the head's own `bias_init`. A large convolution or linear
    layer without BatchNorm beside it is initial if its weights fill PyTorch's initial range, +-1 / sqrt(fan_in).

    Args:
        model: The bare model.
        is_built: Whether it was built in this process. Then its BatchNorm may have seen images without any training.
    """
    names = [name for name, _ in model.named_parameters()]
    norms = trained_norms(model)
    layers = {path: filled for path, m in model.named_modules() if (filled := _fills_initial_range(m)) is not None}
    if (norms and not any(norms.values())) or ((is_built or not norms) and sum(layers.values()) > 0.9 * len(layers)):
        return dict.fromkeys(names)
    blocks: dict[str, bool] = {}
    for path, trained in norms.items():
        for block in _with_parents(path):
            blocks[block] = blocks.get(block, False) or trained
    beside = {path.rpartition(".")[0] for path in norms}
    initial: dict[str, Rows] = {}
    for name in names:
        path = name.rpartition(".")[0]
        around = next((block for block in _with_parents(path) if block in blocks), None)
        if (around is not None and not blocks[around]) or (layers.get(path) and path.rpartition(".")[0] not in beside):
            initial[name] = None
    for path, rows in _initial_class_rows(model).items():
        for name in (f"{path}.weight", f"{path}.bias"):
            initial.setdefault(name, rows)
    return initial


def trained_norms(model: nn.Module) -> dict[str, bool]:
    """Whether a BatchNorm layer has seen an image, by its name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {
        path: bool(module.running_mean.any())
        for path, module in model.named_modules()
        if isinstance(module, kind) and module.running_mean is not None
    }


def _with_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _fills_initial_range(module: nn.Module) -> bool | None:
    """Whether the weights of a layer look like PyTorch's initial ones; None where that cannot be told."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, (nn.Conv2d, nn.Linear)) or not isinstance(weight, Tensor) or weight.numel() < _ENOUGH:
        return None
    size, count = weight.detach().float().abs() * math.sqrt(weight[0].numel()), weight.numel()
    reaches_the_bound = 1 - 20 / count < float(size.max()) < 1.001  # weights may have been saved in float16
    return reaches_the_bound and abs(float(size.mean()) - 0.5) < 1.5 / math.sqrt(count)  # five standard deviations


def _initial_class_rows(model: nn.Module) -> dict[str, Rows]:
    """Rows of the class layers whose biases are the ones that the head itself sets at the start, by layer.

    A row counts if this holds in all class layers: in one of them a trained bias may have the value by chance.
    """
    head = head_of(model)
    layers = {path: layer for path, layer in class_layers(model).items() if layer.bias is not None}
    if not layers or not hasattr(head, "bias_init"):
        return {}
    copy = deepcopy(head).float()
    if isinstance(getattr(copy, "stride", None), Tensor):
        copy.stride = copy.stride.float()  # not a buffer
    copy.bias_init()
    start = dict(copy.named_modules())
    place = next(path for path, module in model.named_modules() if module is head)
    found: list[Tensor] = []
    for path, layer in layers.items():
        first, now = start[path.removeprefix(f"{place}.")].bias.detach(), layer.bias.detach().float()
        found.append((now == first) | (now == first.half().float()))  # weights are saved in float16
    is_initial = torch.stack(found).all(0)
    if not is_initial.any():
        return {}
    rows = None if is_initial.all() else tuple(torch.nonzero(is_initial).flatten().tolist())
    return dict.fromkeys(layers, rows)

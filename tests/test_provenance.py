"""Which parameters of a run are new: over all forms in which a run can take its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics import YOLO, __version__

from yolo_sophia.integration.provenance import ClassRows, Provenance, decode, encode, provenance_of

pytestmark = pytest.mark.compat
IS_84 = tuple(map(int, __version__.split(".")[:2])) >= (8, 4)
NAMES = ("cat", "dog", "Person", "tree", "house", "car")


def trained(model: nn.Module, names=NAMES) -> nn.Module:
    """The model as after a training: its statistics and all its weights have moved."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
    model.names = dict(enumerate(names))
    return model


@pytest.fixture(scope="module")
def weights(tiny_model, tmp_path_factory) -> Path:
    """A checkpoint of a trained model that knows six classes; loaded again it has no record."""
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save({"model": trained(YOLO(tiny_model).model)}, path)
    return path


def loaded(path: Path) -> nn.Module:
    return torch.load(path, weights_only=False)["model"]


def test_a_built_model_is_new_everywhere(tiny_model):
    model = YOLO(tiny_model).model
    found = provenance_of(model)
    assert found.new == dict.fromkeys(name for name, _ in model.named_parameters())
    assert (found.origin, found.class_rows) == ("loads", ClassRows((), (), tuple(range(6))))


def test_the_text_of_a_run(tiny_model):
    found = Provenance({"a.weight": (0, 1, 2, 5), "a.bias": (0, 1, 2, 5), "b": None, "c": (7,)}, "loads", None)
    assert encode(found) == '{"new":[["0-2,5","a.weight a.bias"],[null,"b"],["7","c"]],"classes":null}'
    assert decode(encode(found)) == Provenance(found.new, "recorded", None)
    rows = ClassRows((0,), (), (1, 2))
    assert decode(encode(Provenance({}, "loads", rows))) == Provenance({}, "recorded", rows)
    with pytest.raises(ValueError, match="expected JSON"):
        decode("[]")

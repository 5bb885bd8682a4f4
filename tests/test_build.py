"""What SophiaH cannot train with, in one message."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from yolo_sophia.integration import build

pytestmark = pytest.mark.compat


def trainer(scaled: bool = False, compiled: bool = False) -> SimpleNamespace:
    model = nn.Linear(2, 2)
    if compiled:
        model._orig_mod = nn.Linear(2, 2)
    return SimpleNamespace(model=model, scaler=SimpleNamespace(is_enabled=lambda: scaled))


def test_a_loss_that_has_a_second_derivative_is_taken():
    build.refuse_once_differentiable(trainer())


@pytest.mark.parametrize(
    ("settings", "rank", "says"),
    [
        ({"scaled": True}, -1, r"mixed precision in float16\. Train with amp=False, or use optimizer=SophiaG"),
        ({"compiled": True}, -1, r"torch\.compile\. Train with compile=False"),
        ({}, 0, r"several devices .*\. Train with one device"),
        (
            {"scaled": True, "compiled": True},
            1,
            r"float16 and several .* and torch\.compile.*amp=False, one device",
        ),
    ],
)
def test_what_has_none_is_refused(settings, rank, says, monkeypatch):
    monkeypatch.setattr(build, "RANK", rank)
    with pytest.raises(NotImplementedError, match=rf"SophiaH differentiates the loss twice, .*{says}"):
        build.refuse_once_differentiable(trainer(**settings))

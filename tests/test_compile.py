"""compile=True: the steps and refreshes of a training that torch.compile speeds up."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_sophia import install
from yolo_sophia.integration import estimate
from yolo_sophia.integration.subsample import loss_of_part

pytestmark = [
    pytest.mark.slow,
    pytest.mark.requires("compile" in DEFAULT_CFG_DICT, reason="this Ultralytics has no compile="),
]
COMPILE = torch.compile


@pytest.fixture
def train(tiny_data, small_model, tmp_path, monkeypatch):
    """Train for two epochs of two steps, with a refresh in each; the backend is torch.compile's."""
    install()

    def run(name: str, backend: str = "", **settings) -> SimpleNamespace:
        given = {"data": str(tiny_data), "imgsz": 64, "epochs": 2, "batch": 8, "nbs": 8, "workers": 0, "device": "cpu"}
        given |= {"optimizer": "SophiaG", "hessian_interval": 1, "plots": False, "val": False, "warmup_epochs": 0}
        given |= {"project": str(tmp_path), "name": name, "amp": False, "compile": bool(backend)}
        monkeypatch.setattr(torch, "compile", lambda model, **options: COMPILE(model, backend=backend))
        passes, hessians, yolo = [], [], YOLO(str(small_model))
        monkeypatch.setattr(estimate, "loss_of_part", lambda *args: passes.append(args[2]) or loss_of_part(*args))

        def on_hessian_update(trainer):
            hessians.append([state["hessian"].clone() for state in trainer.optimizer.state.values()])

        yolo.add_callback("on_hessian_update", on_hessian_update)
        yolo.train(**given, **settings)
        assert hasattr(yolo.trainer.model, "_orig_mod") == bool(backend)
        rows = [{k.strip(): v for k, v in row.items()} for row in csv.DictReader(yolo.trainer.csv.open(newline=""))]
        losses = [float(row[key]) for row in rows for key in row if key.startswith("train/")]
        clock = yolo.trainer.optimizer.param_groups[0]
        return SimpleNamespace(hessians=hessians, losses=losses, passes=passes, clock=clock)

    return run


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("fraction", [1.0, 0.5], ids=["whole", "part"])
def test_losses_and_h_are_those_of_eager_training(train, backend, fraction):
    eager = train("eager", hessian_fraction=fraction)
    compiled = train("compiled", backend, hessian_fraction=fraction)
    assert compiled.clock["hessian_updates"] == eager.clock["hessian_updates"] == len(compiled.hessians) == 4
    for a, b in zip(compiled.hessians[0], eager.hessians[0]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    assert compiled.passes == eager.passes == [8 * fraction] * 4
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-2)

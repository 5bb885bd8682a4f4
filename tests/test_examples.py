"""The examples: each runs and leaves its figure and its table, and the learning rate is chosen by validation alone."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "scripts" / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


@pytest.fixture
def common(monkeypatch):
    """The shared module, importable for the scripts as it is when they are run."""
    monkeypatch.syspath_prepend(FOLDER)
    import common

    threads = torch.get_num_threads()
    yield common
    torch.set_num_threads(threads)
    del sys.modules["common"]


def test_the_list_is_not_empty():
    assert SCRIPTS == ["cartpole", "characters", "digits", "regression"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_figure_and_table(name, common, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--out", str(tmp_path)])
    arms = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")["ARMS"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / f"{name}.md").read_text().splitlines()]
    assert [row[0] for row in rows[2:]] == list(arms)
    for row in rows[2:]:
        scores = [float(cell.strip("*")) for cell in row[1:3]]
        assert all(math.isfinite(score) for score in scores), row
        best = max(scores) if name == "cartpole" else min(scores)
        assert row[1 + scores.index(best)].startswith("**"), row


@pytest.mark.parametrize("larger", [False, True])
def test_a_diverged_learning_rate_is_never_the_best(common, larger):
    scores = {0.3: [0.5, math.nan], 0.1: [3.0, 5.0], 0.2: [1.0, 9.5], 0.4: [9.0, math.inf]}
    trainings = {
        lr: [common.Training(validation=[0.0, last], test=-last) for last in both] for lr, both in scores.items()
    }
    assert common.best_learning_rate(trainings, larger) == (0.2 if larger else 0.1)

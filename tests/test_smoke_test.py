"""`yolo-sophia status --check` with the installed Ultralytics, and with one that does not fit."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
from types import SimpleNamespace

import pytest

from yolo_sophia import cli
from yolo_sophia.integration import smoke_test
from yolo_sophia.integration.smoke_test import QUESTIONS, Answer, NotRunError

MOVED = """
from ultralytics.engine.trainer import BaseTrainer

def build_optimizer(self, network=None, model=None, **kwargs):
    return original(self, network or model, **kwargs)

original, BaseTrainer.build_optimizer = BaseTrainer.build_optimizer, build_optimizer
"""
STATUS = ("-m", "yolo_sophia.cli", "status", "--check")


def rows_of(text: str) -> dict[str, tuple[str, str]]:
    """The table of a status report: result and finding by question."""
    lines = text.split("\ncheck:\n")[1].splitlines()
    found = (re.fullmatch(r"  (\S.*?)  +(ok|failed|not run)  +(.*)", line) for line in lines)
    return {match[1]: (match[2], match[3]) for match in found if match}


@pytest.mark.slow
@pytest.mark.compat
def test_the_installed_ultralytics_passes(python):
    done = python(*STATUS)
    rows = rows_of(done.stdout)
    assert list(rows) == list(QUESTIONS)
    assert {result for result, _ in rows.values()} == {"ok"}
    assert not done.stderr


@pytest.mark.slow
def test_a_changed_function_is_named(python, tmp_path):
    """As in a new Ultralytics whose `build_optimizer` takes something else; its own trainings still work."""
    (tmp_path / "sitecustomize.py").write_text(MOVED)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = python(*STATUS, check=False, YOLO_SOPHIA_AUTOLOAD="0", PYTHONPATH=path)
    rows = rows_of(done.stdout)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    moved = (
        "ultralytics.engine.trainer.BaseTrainer.build_optimizer takes ('self', 'network', 'model', 'kwargs'), expected "
    )
    assert rows["patches"][0] == "failed" and moved in rows["patches"][1]
    assert rows["training"][0] == "failed"
    assert {rows[name][0] for name in ("curvature", "results.csv", "sophia.png", "resume")} == {"not run"}
    assert rows["other optimizer"][0] == "ok"
    assert "optimizer=SophiaG cannot be used" in done.stdout


def test_status_names_the_file_of_the_optimizer(capsys):
    from yolo_sophia.optim import SophiaG

    cli.main(["status"])
    assert f"optimizer SophiaG from {inspect.getfile(SophiaG)}\n" in capsys.readouterr().out


def answers_of(monkeypatch, child) -> list[Answer]:
    monkeypatch.setattr(subprocess, "run", child)
    return smoke_test.check()


def test_a_process_that_dies_is_reported_with_its_last_output(monkeypatch):
    def child(command, **_):
        with open(f"{command[-1]}/{smoke_test.ANSWERS}", "w") as file:
            file.write('{"question": "patches", "result": "ok", "found": "x"}\n')
        return SimpleNamespace(returncode=-11, stdout=b"a line\nthe last one\n")

    patches, training, *others = answers_of(monkeypatch, child)
    assert patches.result == "ok"
    assert (training.question, training.result) == ("training", "failed")
    assert training.found == "the process ended with exit code -11; its last output: the last one"
    assert {answer.result for answer in others} == {"not run"} and len(others) == len(QUESTIONS) - 2


def test_a_process_that_hangs_is_stopped(monkeypatch):
    def child(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    first, *_ = answers_of(monkeypatch, child)
    assert first.found == f"the process was stopped after {smoke_test.TIMEOUT} s; its last output: nothing"


def trainer_with(updates: int, hessian: float) -> SimpleNamespace:
    import torch

    states = {0: {"exp_avg": torch.ones(2), "hessian": torch.full((2,), hessian)}}
    group = {"hessian_updates": updates, "hessian_dropped": 0}
    return SimpleNamespace(optimizer=SimpleNamespace(param_groups=[group], state=states))


@pytest.mark.parametrize(
    ("updates", "hessian", "log", "expected"),
    [
        (0, 1.0, [], "found 0 Hessian updates, 0 dropped, expected 4 and none"),
        (4, 0.0, [], "found 1 of 1 tensors have a momentum and no curvature, expected none"),
        (4, 1.0, ["the likelihood of X is not known here"], "expected the detection loss to be known"),
    ],
)
def test_a_training_without_curvature_fails(updates, hessian, log, expected, tmp_path):
    trials = smoke_test.Trials(tmp_path)
    trials.interrupted, trials.log = trainer_with(updates, hessian), log
    with pytest.raises(ValueError, match=re.escape(expected)):
        QUESTIONS["curvature"](trials)


def test_nothing_to_look_at(tmp_path):
    for question in ("curvature", "results.csv", "sophia.png", "resume"):
        with pytest.raises(NotRunError):
            QUESTIONS[question](smoke_test.Trials(tmp_path))


def test_missing_columns_and_picture(tmp_path):
    trials = smoke_test.Trials(tmp_path)
    trials.interrupted = SimpleNamespace(save_dir=tmp_path)
    (tmp_path / "results.csv").write_text("epoch,time\n1,2\n")
    with pytest.raises(ValueError, match=r"found columns \[\], expected"):
        QUESTIONS["results.csv"](trials)
    with pytest.raises(ValueError, match=r"found sophia\.png of 0 bytes, expected a picture"):
        QUESTIONS["sophia.png"](trials)

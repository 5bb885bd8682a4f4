"""What is done elsewhere on machines that are not at hand, Windows and MPS, with doubles of what differs there."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from yolo_sophia import atomic
from yolo_sophia.curvature.autocast import no_autocast
from yolo_sophia.curvature.noise import forked, preserved
from yolo_sophia.runs import worker
from yolo_sophia.runs.local_executor import start_worker

# MPS ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mps(monkeypatch) -> SimpleNamespace:
    """A double of the device's random state."""
    device = SimpleNamespace(state=7)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name, function in {
        "get_rng_state": lambda: device.state,
        "set_rng_state": lambda state: setattr(device, "state", state),
        "manual_seed": lambda seed: setattr(device, "state", seed),
    }.items():
        monkeypatch.setattr(torch.mps, name, function)
    return device


def test_noise_on_mps_is_seeded_and_put_back(mps):
    with forked(11):
        assert mps.state == 11
        mps.state = 12  # something was drawn
    assert mps.state == 7


def test_random_state_of_mps_is_put_back_after_an_error(mps):
    before = torch.get_rng_state()
    with pytest.raises(KeyError), preserved([torch.device("mps")]):
        torch.rand(3)
        mps.state = 12
        raise KeyError
    assert mps.state == 7
    assert torch.equal(torch.get_rng_state(), before)
    with preserved([torch.device("cpu")]):
        mps.state = 12
    assert mps.state == 12  # nobody asked for it


def test_autocast_is_switched_off_where_it_exists(monkeypatch):
    with torch.autocast("cpu"):
        with no_autocast(torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")
        monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: False)
        with no_autocast(torch.device("cpu")):  # not asked to switch off what it does not know
            assert torch.is_autocast_enabled("cpu")


# Windows --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def windows(monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(atomic.time, "sleep", lambda seconds: None)


def refusing(times: int):
    """os.replace as where another process reads the old file for a while."""
    calls, replace = [], os.replace

    def refuse(*paths):
        calls.append(paths)
        if len(calls) <= times:
            raise PermissionError(13, "Access is denied")
        replace(*paths)

    return refuse


def test_a_file_that_is_read_is_replaced_a_little_later(windows, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "replace", refusing(3))
    atomic.atomic_write(tmp_path / "a.csv", "x\r\ny\n")
    assert (tmp_path / "a.csv").read_bytes() == b"x\r\ny\n"  # no line end is made longer
    monkeypatch.setattr(os, "replace", refusing(99))
    with pytest.raises(PermissionError):
        atomic.atomic_write(tmp_path / "a.csv", "z")


def test_permission_is_final_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "replace", refusing(1))
    with pytest.raises(PermissionError):
        atomic.atomic_write(tmp_path / "a.csv", "z")


def test_workers_do_not_hear_ctrl_c(windows, monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kwargs: seen.update(kwargs))
    start_worker(tmp_path, {})
    assert seen["creationflags"] == 512 and "start_new_session" not in seen


def test_an_orphan_keeps_the_number_of_its_parent(monkeypatch, tmp_path):
    recorder = worker.Recorder(tmp_path)
    monkeypatch.setattr(psutil.Process, "is_running", lambda self: False)
    with pytest.raises(SystemExit, match="is gone"):
        recorder.on_train_batch_end(None)

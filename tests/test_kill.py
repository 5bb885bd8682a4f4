"""SIGKILL: what a training, a comparison and a study have finished is there afterwards, and no half file is believed.

A test double kills its own process at moments that matter; the tests marked long do it at random ones. Children are
functions named `child_*`, run in forks of one interpreter that has made the slow imports.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
EPOCHS = 2  # of `tiny_run`
KILLS = int(os.environ.get("KILLS", "20"))
CLOCK = ("rho", "rho_measurements", "hessian_age", "refresh_index", "hessian_updates", "hessian_dropped")


def start(function: Callable, *arguments: Any) -> multiprocessing.Process:
    """Start a function of this module in a process of its own."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no forkserver on this platform")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cv2", "matplotlib", "torch", "torchvision", "yaml"])
    process = context.Process(target=function, args=arguments)
    with pytest.MonkeyPatch.context() as patch:  # the interpreter of the forks may start here, and serves others too
        patch.setenv("YOLO_SOPHIA_AUTOLOAD", "0")
        process.start()
    return process


# The moments ----------------------------------------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner: Any, name: str, call: int, instead: Callable) -> None:
    """At the call of this number, do something instead, which gets the original first."""
    original, calls = getattr(owner, name), iter(range(10**9))

    def replacement(*args, **kwargs):
        return instead(original, *args, **kwargs) if next(calls) == call else original(*args, **kwargs)

    setattr(owner, name, replacement)


def half_of(name: str, call: int = 1) -> Callable[[], None]:
    """As half of a checkpoint is written, at the call of this number."""

    def set_trap() -> None:
        write, seen = Path.write_bytes, []

        def write_bytes(path: Path, data: bytes) -> int:
            if path.name == name:
                seen.append(path)
                if len(seen) > call:
                    die(write(path, data[: len(data) // 2]))
            return write(path, data)

        Path.write_bytes = write_bytes

    return set_trap


def between_best_and_last() -> None:
    """In the second epoch, when best.pt has its new content and last.pt has not."""
    replace, seen = os.replace, []

    def trap(source, target):
        if Path(target).name == "last.pt":
            die() if seen else seen.append(target)
        return replace(source, target)

    os.replace = trap


def row_without_checkpoint() -> None:
    """When results.csv has the second epoch's row and no checkpoint has its state."""
    from ultralytics.engine.trainer import BaseTrainer

    at(BaseTrainer, "save_model", 1, die)


def refresh() -> None:
    """In the second epoch, with an estimate made and not yet staged."""
    from yolo_sophia.curvature import GaussNewtonBartlett

    at(GaussNewtonBartlett, "__call__", 5, lambda original, *args: die(original(*args)))


def half_of_h() -> None:
    """In the second epoch, when half of the parameters have their new h."""
    from yolo_sophia.optim._base import SophiaBase

    def half(original, self, values, **settings):
        values = list(values)
        original(self, values[: len(values) // 2] + [None] * (len(values) - len(values) // 2), **settings)
        die()

    at(SophiaBase, "_move_hessian", 5, half)


def strip(call: int) -> Callable[[], None]:
    """At the end, as half of a stripped checkpoint is written."""

    def set_trap() -> None:
        import torch
        import ultralytics.utils  # noqa: F401 - replaces torch.save

        save, seen = torch.save, []

        def trap(content, target, *args, **kwargs):
            save(content, target, *args, **kwargs)
            if isinstance(target, (str, Path)):
                if len(seen) == call:
                    Path(target).open("rb+").truncate(Path(target).stat().st_size // 2)
                    die()
                seen.append(target)

        torch.save = trap

    return set_trap


MOMENTS: dict[str, tuple[Callable[[], None], int]] = {  # and the finished epochs that last.pt must have
    "half of last.pt": (half_of("last.pt"), 1),
    "half of epoch1.pt": (half_of("epoch1.pt", 0), 1),
    "between best.pt and last.pt": (between_best_and_last, 1),
    "row without checkpoint": (row_without_checkpoint, 1),
    "refresh": (refresh, 1),
    "half of h": (half_of_h, 1),
    "strip last.pt": (strip(0), 2),
    "strip best.pt": (strip(1), 2),
}


def child_train(run: dict[str, Any], moment: str | None, begun: str | None = None) -> None:
    """Train SophiaG, refreshing at each step, and die at the moment."""
    from ultralytics import YOLO

    from yolo_sophia import install

    install()
    if moment:
        MOMENTS[moment][0]()
    model = YOLO(run["model"])
    if begun:
        model.add_callback("on_train_start", lambda trainer: Path(begun).touch())
    model.train(**{**run, "optimizer": "SophiaG", "hessian_interval": 1, "save_period": 1})


# What is there after a kill -------------------------------------------------------------------------------------------


def checked(folder: Path) -> dict[str, dict[str, Any]]:
    """The checkpoints of a run folder by name; each file that has a name to be read by is whole."""
    from ultralytics.utils.patches import torch_load

    found = {path.name: torch_load(path, map_location="cpu") for path in sorted((folder / "weights").glob("*.pt"))}
    assert all((checkpoint.get("ema") or checkpoint["model"]) is not None for checkpoint in found.values())
    assert yaml.safe_load((folder / "args.yaml").read_text())["optimizer"] == "SophiaG"
    if (table := folder / "results.csv").exists():
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(None not in row and None not in row.values() for row in rows)
        assert len(rows) >= found.get("last.pt", {"epoch": -1})["epoch"] + 1
    return found


def resumed(folder: Path, saved: dict[str, Any]) -> None:
    """Resume in this process: what is loaded is what was saved, and the run ends as any other."""
    from ultralytics import YOLO
    from verify_bit_identity import largest_difference

    last, loaded = folder / "weights" / "last.pt", {}
    model = YOLO(last)
    model.add_callback(
        "on_pretrain_routine_end", lambda trainer: loaded.update(deepcopy(trainer.optimizer.state_dict()))
    )
    model.train(resume=str(last))
    for group in [*saved["optimizer"]["param_groups"], *loaded["param_groups"]]:
        group.pop("fused", None)  # Ultralytics adds this key as it loads
    tensors, difference = largest_difference(saved["optimizer"]["state"], loaded["state"])
    assert tensors > 500 and difference == 0
    one = next(iter(loaded["state"].values()))
    assert one.keys() >= {"exp_avg", "hessian", "step", "hessian_updates"} and one["hessian_updates"] > 0
    for before, after in zip(saved["optimizer"]["param_groups"], loaded["param_groups"]):
        assert {key: before[key] for key in CLOCK} == {key: after[key] for key in CLOCK}
    finished(folder)


def finished(folder: Path) -> None:
    found = checked(folder)
    assert found["last.pt"]["optimizer"] is found["best.pt"]["optimizer"] is None
    assert sorted(p.name for p in (folder / "weights").iterdir()) == sorted(found)  # nothing half-written is left


COMPAT = {"half of last.pt", "between best.pt and last.pt", "strip last.pt"}  # where Ultralytics' own code writes


@pytest.mark.parametrize("moment", [pytest.param(m, marks=[pytest.mark.compat] * (m in COMPAT)) for m in MOMENTS])
def test_killed_at(moment, tiny_run, capfd):
    process = start(child_train, tiny_run, moment)
    process.join(200)
    assert process.exitcode == -signal.SIGKILL, capfd.readouterr().err[-3000:]
    folder, epochs = Path(tiny_run["project"]) / tiny_run["name"], MOMENTS[moment][1]
    found = checked(folder)
    assert found["last.pt"]["epoch"] == (-1 if moment == "strip best.pt" else epochs - 1)
    assert {"best.pt", *(f"epoch{i}.pt" for i in range(epochs))} <= found.keys()
    if epochs < EPOCHS:
        resumed(folder, found["last.pt"])
    else:  # nothing is left to train, and what was trained is there
        assert found["best.pt"]["epoch"] == EPOCHS - 1


def test_picture_is_whole(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from yolo_sophia.integration.plotting import PANELS, plot_sophia

    names = ["epoch", *(f"sophia/{name}" for _, panel, _ in PANELS for name in panel), "sophia/refreshes"]
    table = tmp_path / "results.csv"
    table.write_text(",".join([*names, "sophia/dropped"]) + "\n" + ",".join(["1"] * (len(names) + 1)) + "\n")
    picture = plot_sophia(table)
    whole = picture.read_bytes()

    def cut(figure, target, **settings):
        target.write(whole[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", cut)
    with pytest.raises(KeyboardInterrupt):
        plot_sophia(table)
    assert picture.read_bytes() == whole


# Random moments -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_training_killed_at_random_moments(tiny_run, tmp_path, capfd):
    """Each is killed once, and resumed where something is saved and something left to do."""
    draw, resumes, begun = random.Random(0), 0, tmp_path / "begun"
    run = {**tiny_run, "val": True, "epochs": 6}
    whole = start(child_train, {**run, "name": "whole"}, None, str(begun))
    wait_for(begun.exists, whole)
    mark = time.monotonic()
    whole.join()
    seconds = time.monotonic() - mark
    finished(Path(run["project"]) / "whole")
    for number in range(KILLS):
        begun.unlink()
        process = start(child_train, {**run, "name": f"run{number}"}, None, str(begun))
        wait_for(begun.exists, process)
        process.join(draw.uniform(0, seconds))
        process.kill()
        process.join()
        folder = Path(run["project"]) / f"run{number}"
        found = checked(folder)
        if (last := found.get("last.pt")) and 0 <= last["epoch"] < run["epochs"] - 1:
            resumes += 1
            resumed(folder, last)
    capfd.readouterr()
    with capfd.disabled():
        sys.stdout.write(f"\n{KILLS} trainings of {seconds:.1f} s killed, {resumes} of them resumed\n")
    assert resumes >= KILLS // 5


def wait_for(condition: Callable[[], bool], process: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        alive = process.is_alive() if hasattr(process, "is_alive") else process.poll() is None
        assert alive and time.monotonic() < end, "the process is gone, or too slow"
        time.sleep(0.02)


def killed_again_and_again(words: list[str], out: Path, look: Callable[[Path], dict[str, Any]], capfd: Any) -> None:
    """Kill a command at random moments, each time with or without the training that it has started, then let it finish.

    Args:
        words: The command, without `out=`; where it finishes before all kills are made, another one begins.
        out: Folder for the folders of the commands.
        look: What is finished in a folder, by name; none of it may ever change.
        capfd: To say how it went.
    """
    import psutil

    draw, kills, number, seen, seconds = random.Random(0), 0, 0, {}, 0.0
    while True:
        folder = out / str(number)
        line = [sys.executable, "-m", "yolo_sophia.cli", *words, f"out={folder}"]
        with (out / f"{number}.txt").open("a") as log:
            process = subprocess.Popen(line, stdout=log, stderr=log)
        if not seconds:  # until an epoch is recorded: what a kill takes from a command on this machine
            mark = time.monotonic()
            wait_for(lambda folder=folder: any(folder.glob("runs/*/curve.jsonl")), process)
            seconds = time.monotonic() - mark
        try:
            process.wait(None if kills >= KILLS else draw.uniform(0, 2) * seconds)
        except subprocess.TimeoutExpired:
            children = psutil.Process(process.pid).children(recursive=True) if draw.random() < 0.5 else []
            process.kill()
            process.wait()
            for child in children:
                child.kill()
            kills += 1
        now = look(folder)
        assert seen.items() <= now.items(), "something finished was lost or changed"
        seen = now
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, (out / f"{number}.txt").read_text()[-3000:]
            with capfd.disabled():
                sys.stdout.write(f"\n{words[0]}: finished with {len(now)} results after {kills} kills\n")
            if kills >= KILLS:
                return
            number, seen = number + 1, {}


@pytest.fixture
def words(tiny_data, tiny_model) -> list[str]:
    return [f"data={tiny_data}", f"model={tiny_model}", "imgsz=64", "batch=4", "nbs=4", "device=cpu", "warmup_epochs=0"]


def receipts(out: Path) -> dict[str, Any]:
    from yolo_sophia.runs.worker import CHECKPOINT, RECEIPT, read_curve

    from_ultralytics = {}
    for folder in (out / "runs").glob("*"):
        if (receipt := folder / RECEIPT).is_file():
            told = json.loads(receipt.read_text())
            rows = read_curve(folder)
            assert [row["epoch"] for row in rows] == list(range(1, told["epochs"] + 1))
            from_ultralytics[folder.name] = json.dumps([told, rows])
        elif (checkpoint := folder / CHECKPOINT).is_file():
            whole(checkpoint)
    return from_ultralytics


def whole(checkpoint: Path) -> None:
    """Read a checkpoint that a training beside may replace."""
    from ultralytics.utils.patches import torch_load

    try:
        assert torch_load(checkpoint, map_location="cpu")["optimizer"] is not None
    except FileNotFoundError:
        pass  # finished meanwhile


@pytest.mark.long
def test_a_comparison_killed_at_random_moments(words, tmp_path, capfd):
    arms = ["epochs=6", "optimizers=SophiaG,AdamW", "seeds=2", "workers=1", "lr0=0.01"]
    killed_again_and_again(["compare", *words, *arms], tmp_path, receipts, capfd)


@pytest.mark.long
def test_a_study_killed_at_random_moments(words, tmp_path, capfd):
    def look(out: Path) -> dict[str, Any]:
        found = receipts(out)
        for base in out.glob("*.db"):
            with sqlite3.connect(base) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")}
                if "trial_values" in tables:
                    query = "SELECT t.number, v.value FROM trials t JOIN trial_values v USING (trial_id)"
                    found |= {
                        f"trial {n}": value for n, value in connection.execute(query + " WHERE t.state='COMPLETE'")
                    }
        return found

    killed_again_and_again(["tune", *words, "epochs=3", "trials=4", "pruner=none"], tmp_path, look, capfd)

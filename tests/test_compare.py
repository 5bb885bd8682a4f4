"""`yolo-sophia compare` with real trainings: what it counts, and what it gets over: crashes, Ctrl-C, SIGKILL, company.

One comparison is interrupted twice and then finished by two invocations at once; another one has arms that crash. The
A/A control is the uninterrupted twin of the run that was cut.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from torch import nn
from ultralytics import YOLO
from ultralytics.data.build import build_yolo_dataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG, DEFAULT_CFG_DICT

from yolo_sophia import cli
from yolo_sophia.compare.plan import parse, runs
from yolo_sophia.integration import recalibration
from yolo_sophia.integration.recalibration import recalibrate_before_validation
from yolo_sophia.integration.run_length import run_length
from yolo_sophia.presets import load_preset
from yolo_sophia.runs import scheduler, worker
from yolo_sophia.runs.results import MAP50_95
from yolo_sophia.runs.run import Run, make_run
from yolo_sophia.runs.worker import BUSY, CHECKPOINT, CURVE, FAILURE, RECEIPT, Recorder, read_curve
from yolo_sophia.search_space import OTHERS

pytestmark = pytest.mark.slow

EPOCHS, BATCHES, IMAGES = 5, 3, 16  # batches of 6, 6 and 4 images; a step every second one, over the epochs' ends
HANGS = 1200
"""Seconds after which a process counts as hanging, on a busy machine too."""
FRAGILE = '''
import torch


class Crashing(torch.optim.AdamW):
    """Fails at its third step."""

    def __init__(self, params, lr=0.001, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.count = 0

    def step(self, closure=None):
        self.count += 1
        if self.count == 3:
            self.fail()
        return super().step(closure)

    def fail(self):
        raise FloatingPointError("the third step is one too many")


class Fragile(Crashing):
    """Fails only at its default learning rate."""

    def fail(self):
        if self.param_groups[0]["initial_lr"] == 0.001:
            super().fail()
'''


class Command:
    """`yolo-sophia compare` as a process.

    Args:
        words: Its words.
        environment: What is added to its environment.
    """

    def __init__(self, words: list[str], **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "yolo_sophia.cli", "compare", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def end(self, code: int = 0) -> Command:
        self.out, self.err = self.process.communicate(timeout=HANGS)
        assert self.process.returncode == code, f"{self.out[-2000:]}\n{self.err[-2000:]}"
        assert "Traceback" not in self.err
        return self


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end, f"waited {HANGS} s for {what}"
        time.sleep(0.005)


def is_locked(folder: Path) -> bool:
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def steps(cut: int = 0) -> list[int]:
    """Optimizer steps by the end of each epoch, counted by hand; resumed, Ultralytics forgets when it last stepped."""
    made, last, count = [], -1, 0
    for batch in range(EPOCHS * BATCHES):
        if cut and batch == cut * BATCHES:
            last = -1
        if batch - last >= 2:
            count, last = count + 1, batch
        if batch % BATCHES == BATCHES - 1:
            made.append(count)
    return made


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in {"seconds", "sophia/refresh_seconds"}} for row in rows
    ]


# A comparison, interrupted --------------------------------------------------------------------------------------------


@dataclass
class Story:
    """What was seen of the interrupted comparison."""

    out: Path
    by_name: dict[str, Run]
    commands: dict[str, Command]
    cuts: dict[str, int]  # epochs whose checkpoint was there at the interruption
    lines: dict[str, list[dict[str, Any]]]  # the curve at the interruption
    finished_early: dict[str, tuple[int, int]]  # files of the run that was finished before the second interruption
    shared: dict[str, tuple[int, int]]  # all files of the runs when both invocations had ended

    def folder(self, name: str) -> Path:
        return self.out / "runs" / self.by_name[name].key

    def rows(self, name: str) -> list[dict[str, Any]]:
        return read_curve(self.folder(name))

    def receipt(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder(name) / RECEIPT).read_text())


@pytest.fixture(scope="module")
def crashing(tiny_data, tiny_model, tmp_path_factory) -> Command:
    """A tuned comparison of two dotted arms that fail; it runs beside the other one."""
    folder = tmp_path_factory.mktemp("crashing")
    (folder / "fragile.py").write_text(FRAGILE)
    plan = folder / "plan.yaml"
    plan.write_text(f"""
        {{data: {tiny_data}, model: {tiny_model}, imgsz: 64, batch: 4, nbs: 4, epochs: 2, device: cpu, seeds: [3],
        tune_trials: 2, tune_epochs: 1, out: {folder / "out"}, reference: fragile, arms: {{
            crashing: {{optimizer: fragile.Crashing}},
            fragile: {{optimizer: fragile.Fragile, optimizer_args: {{betas: [0.8, 99e-2], eps: 1e-7}}}}}}}}
    """)
    command = Command([f"plan={plan}"], PYTHONPATH=os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    command.folder = folder
    yield command
    command.process.kill()


@pytest.fixture(scope="module")
def story(tiny_data, tiny_model, tmp_path_factory, crashing) -> Story:
    """SophiaG, AdamW and AdamW again, two seeds: Ctrl-C in the first run, SIGKILL in the second, then two at once."""
    out = tmp_path_factory.mktemp("compare") / "out"
    words = [
        f"data={tiny_data}", f"model={tiny_model}", "imgsz=64", "batch=6", "nbs=12", f"epochs={EPOCHS}", "device=cpu",
        "warmup_epochs=0", "lr0=0.01", "optimizers=SophiaG,AdamW,AdamW", "seeds=2", "bn_recalibrate=True", "workers=1",
        f"out={out}",
    ]  # fmt: skip
    by_name = {f"{run.arm}-{run.seed}": run for run in runs(parse(words))}
    made = Story(out, by_name, {}, {}, {}, {}, {})

    def interrupt(name: str, number: signal.Signals) -> Command:
        folder = made.folder(name)
        command = Command(words)
        try:
            saved = folder / CHECKPOINT
            wait_for(lambda: saved.is_file() or command.process.poll() is not None, f"an epoch of {name}")
            command.process.send_signal(number)
            command.end(130 if number == signal.SIGINT else -number)
        finally:
            command.process.kill()
        return command

    def look(name: str) -> None:
        folder = made.folder(name)
        wait_for(lambda: not is_locked(folder), f"the end of the training of {name}")
        assert not (folder / RECEIPT).exists(), "it was not interrupted in the middle"
        made.lines[name] = read_curve(folder)
        saved = torch.load(folder / CHECKPOINT, weights_only=False)
        made.cuts[name] = saved["epoch"] + 1
        for path in (folder / "train" / "weights").iterdir():  # as if it had been cut while they were written
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    made.commands["stopped"] = interrupt("SophiaG-0", signal.SIGINT)
    assert not is_locked(made.folder("SophiaG-0")), "Ctrl-C left a training behind"
    look("SophiaG-0")
    interrupt("AdamW-0", signal.SIGKILL)
    look("AdamW-0")
    made.finished_early = snapshot(made.folder("SophiaG-0"))
    pair = [Command(words), Command(words)]
    try:
        made.commands |= {name: command.end() for name, command in zip(("one", "other"), pair)}
    finally:
        for command in pair:
            command.process.kill()
    made.shared = snapshot(out / "runs")
    made.commands["again"] = Command(words).end()
    return made


def test_killed_and_restarted_gives_the_table_of_an_uninterrupted_comparison(tiny_data, tiny_model, tmp_path):
    words = [
        f"data={tiny_data}", f"model={tiny_model}", "imgsz=64", "batch=4", "nbs=4", f"epochs={EPOCHS}", "device=cpu",
        "lr0=0.01", "optimizers=SophiaG,SophiaG", "seeds=1", "cut_runs=restart", f"out={tmp_path / 'out'}",
    ]  # fmt: skip
    first, twin = (tmp_path / "out" / "runs" / run.key for run in runs(parse(words)))
    killed = Command(words)
    try:
        wait_for(lambda: (first / CHECKPOINT).is_file() or killed.process.poll() is not None, "an epoch")
        killed.process.send_signal(signal.SIGKILL)
        killed.end(-signal.SIGKILL)
    finally:
        killed.process.kill()
    wait_for(lambda: not is_locked(first), "the end of the training")
    assert not (first / RECEIPT).exists() and len(read_curve(first)) < EPOCHS
    Command(words).end()
    assert without_seconds(read_curve(first)) == without_seconds(read_curve(twin))
    assert len(read_curve(first)) == EPOCHS


def test_listed_classes_keep_their_labels(tiny_data, tiny_model, tmp_path):
    """With all six classes listed, the training is that without a list."""
    words = [
        f"data={tiny_data}", f"model={tiny_model}", "imgsz=64", "batch=8", "epochs=1", "device=cpu", "seeds=1",
        f"out={tmp_path / 'out'}",
    ]  # fmt: skip
    plan = tmp_path / "plan.yaml"
    plan.write_text("arms: {all: {optimizer: SGD}, listed: {optimizer: SGD, classes: '0,1,2,3,4,5'}}")
    words.append(f"plan={plan}")
    Command(words).end()
    one, other = (read_curve(tmp_path / "out" / "runs" / run.key) for run in runs(parse(words)))
    assert without_seconds(one) == without_seconds(other) and one[0]["train/box_loss"] > 0


def test_ctrl_c_is_one_line_and_leaves_the_run_resumable(story):
    err = story.commands["stopped"].err
    assert err.splitlines()[-1] == "yolo-sophia: interrupted; rerun the command to resume"
    assert [line for line in err.splitlines() if not line.startswith("compare: ")] == err.splitlines()[-1:]
    assert not story.commands["stopped"].out
    assert 1 <= story.cuts["SophiaG-0"] < EPOCHS


def test_sigkill_ends_the_training_as_well(story):
    assert 1 <= story.cuts["AdamW-0"] < EPOCHS
    log = (story.folder("AdamW-0") / "log.txt").read_text()
    assert log.count("the process that ordered this training is gone") == 1


def test_every_run_has_its_receipt(story):
    assert len(story.by_name) == 6
    assert {path.name for path in (story.out / "runs").iterdir()} == {run.key for run in story.by_name.values()}
    for name, run in story.by_name.items():
        receipt = story.receipt(name)
        assert (receipt["key"], receipt["epochs"], receipt["device"]) == (run.key, EPOCHS, "cpu")
        assert receipt["wall_seconds"] > 0 and receipt["peak_memory_bytes"] > 2**25
        assert receipt["args"]["seed"] == run.seed and receipt["args"]["optimizer"] == run.arm.removesuffix("-again1")
        assert receipt["versions"]["torch"] == metadata.version("torch")
        left = {path.name for path in story.folder(name).iterdir()}
        assert left - {".lock"} == {
            CURVE,
            RECEIPT,
            "run.json",
            "log.txt",
            "train",
        }  # no checkpoint, nothing half-written
        order = json.loads((story.folder(name) / "run.json").read_text())
        assert order["bn_recalibrate"] is True and order["arguments"] == dict(run.arguments)


def test_curves_have_every_epoch_once(story):
    for name in story.by_name:
        lines = (story.folder(name) / CURVE).read_text().splitlines()
        rows = story.rows(name)
        assert [json.loads(line) for line in lines] == rows
        assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
        assert [row["images"] for row in rows] == [IMAGES * epoch for epoch in range(1, EPOCHS + 1)]
        assert [row["steps"] for row in rows] == steps(story.cuts.get(name, 0))
        seconds = [0.0] + [row["seconds"] for row in rows]
        assert all(a < b for a, b in pairwise(seconds))
        assert ("sophia/rho" in rows[0]) == (name.startswith("SophiaG"))
    assert steps() == [1, 3, 4, 6, 7]


def test_training_seconds_leave_validation_out(story):
    for name in set(story.by_name) - set(story.cuts):
        assert 0 < story.rows(name)[-1]["seconds"] < 0.9 * story.receipt(name)["wall_seconds"]


def test_control_is_equal_bit_for_bit(story):
    one, other = (without_seconds(story.rows(name)) for name in ("AdamW-1", "AdamW-again1-1"))
    assert one == other
    assert one[-1][MAP50_95] > 0 and one[-1]["train/box_loss"] != one[-2]["train/box_loss"]
    assert one != without_seconds(story.rows("AdamW-again1-0"))  # the seed matters
    assert one[0]["train/box_loss"] != story.rows("SophiaG-1")[0]["train/box_loss"]  # and so does the optimizer


@pytest.mark.parametrize("name", ["SophiaG-0", "AdamW-0"])
def test_resumed_run_keeps_what_was_there_and_adds_the_rest(story, name):
    """Up to the cut it is the uninterrupted run, after it another one.

    Ultralytics goes on from the EMA in half precision, not from the weights; it seeds anew, so that the batches are
    those of epoch 1 and following once more; it halves SGD's momentum; and it drops the gradients that were accumulated
    over the end of the epoch, and steps earlier: at most one more step per resume.
    """
    cut, rows = story.cuts[name], story.rows(name)
    assert rows[:cut] == story.lines[name][:cut]  # the very lines, seconds included
    assert len(story.lines[name]) - cut in {0, 1}  # a line more, where it was cut between the line and the checkpoint
    assert all(0 <= a - b <= 1 for a, b in zip(steps(cut), steps()))
    assert all(row[MAP50_95] is not None and row["train/box_loss"] > 0 for row in rows)
    if name == "AdamW-0":
        twin = story.rows("AdamW-again1-0")
        assert without_seconds(rows[:cut]) == without_seconds(twin[:cut])
        assert rows[cut]["train/box_loss"] != twin[cut]["train/box_loss"]


def test_finished_run_is_left_alone(story):
    assert snapshot(story.folder("SophiaG-0")) == story.finished_early
    assert snapshot(story.out / "runs") == story.shared  # and all of them by the last invocation
    assert story.commands["again"].err.count(" finished\n") == 6


def test_two_invocations_share_the_work(story):
    trained = {
        name: (story.folder(name) / "log.txt").read_text().count("Starting training for") for name in story.by_name
    }
    assert trained == {name: 2 if name in story.cuts else 1 for name in story.by_name}
    for name in ("one", "other"):
        assert story.commands[name].err.count(" finished\n") == 6
        assert " failed" not in story.commands[name].err
        assert "report: " in story.commands[name].out


def test_report_and_plan_are_there(story):
    for name in ("report.html", "report.md", "results.csv", "plan.yaml"):
        assert (story.out / name).stat().st_size > 100
    assert story.commands["again"].out == f"report: {story.out / 'report.html'}\n"
    again = runs(parse([f"plan={story.out / 'plan.yaml'}"]))
    assert {run.key for run in again} == {run.key for run in story.by_name.values()}


def test_what_another_invocation_trains_is_left_for_later(tmp_path, monkeypatch):
    ordered = [make_run(arm, "d.yaml", 0, 1.0, {"epochs": 1}, False) for arm in ("one", "two", "three")]
    tried, seen = [], set()

    class Job:
        """A worker that ends at once: the first run is another one's until the others are finished."""

        def __init__(self, folder):
            tried.append(folder.name.split("-")[1])
            self.code = BUSY if tried == ["one"] else 0
            if self.code == 0:
                (folder / RECEIPT).write_text("{}")

        def poll(self):
            return self.code

        started = stop = explain = lambda self: ""

    monkeypatch.setattr(scheduler, "RETRY", 0.01)
    monkeypatch.setattr(scheduler, "POLL", 0.005)
    queue = scheduler.RunQueue(ordered)
    executor = SimpleNamespace(places=1, threads=1, start=Job)
    scheduler.train(tmp_path, queue, executor, lambda progress: seen.add(progress[0].state))
    assert tried == ["one", "two", "three", "one"]
    assert [item.state for item in queue.progress()] == ["finished"] * 3 and "failed" not in seen


# A comparison with arms that crash, tuned -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crashed(crashing) -> SimpleNamespace:
    crashing.out, crashing.err = crashing.process.communicate(timeout=HANGS)
    assert crashing.process.returncode == 1, f"{crashing.out[-2000:]}\n{crashing.err[-2000:]}"
    folders = {path.name.rpartition("-")[0]: path for path in (crashing.folder / "out" / "runs").iterdir()}
    orders = [json.loads((path / "run.json").read_text()) for path in (crashing.folder / "out" / "runs").iterdir()]
    return SimpleNamespace(out=crashing.out, err=crashing.err, folder=crashing.folder, folders=folders, orders=orders)


def test_a_crash_is_a_failed_run_with_its_last_lines(crashed):
    folder = crashed.folders["tiny-crashing-s3-h1"]
    assert not (folder / RECEIPT).exists()
    last = "FloatingPointError: the third step is one too many"
    assert (folder / FAILURE).read_text().splitlines()[-1] == last
    assert f"compare: {folder.name} failed: {last}\n" in crashed.err
    assert f"\n{folder.name} failed:\n" in crashed.err  # once more at the end, with all its last lines
    assert last in (crashed.folder / "out" / "report.md").read_text()


def test_the_others_finish(crashed):
    receipt = json.loads((crashed.folders["tiny-fragile-s3-h1"] / RECEIPT).read_text())
    assert receipt["epochs"] == 2
    assert (crashed.folder / "out" / "report.html").is_file()
    assert f"report: {crashed.folder / 'out' / 'report.html'}\n" == crashed.out


def test_dotted_arm_gets_its_arguments(crashed):
    receipt = json.loads((crashed.folders["tiny-fragile-s3-h1"] / RECEIPT).read_text())
    assert receipt["args"]["optimizer_args"] == {"betas": [0.8, 0.99], "eps": 1e-7}
    weights = torch.load(crashed.folders["tiny-fragile-s3-h1"] / "train/weights/last.pt", weights_only=False)
    assert weights["train_args"]["optimizer"] == "fragile.Fragile"


def test_each_arm_has_its_trials_and_the_best_settings_are_used(crashed):
    trials = [order for order in crashed.orders if order["arm"].startswith("tune-")]
    assert sorted(order["arm"] for order in trials) == ["tune-crashing"] * 2 + ["tune-fragile"] * 2
    assert {(order["seed"], order["arguments"]["epochs"]) for order in trials} == {(9999, 1)}
    searched = ("lr0", "weight_decay")
    for arm in ("crashing", "fragile"):
        first, second = (
            {key: order["arguments"].get(key) for key in searched}
            for order in sorted(trials, key=lambda order: "lr0" in order["arguments"])
            if order["arm"] == f"tune-{arm}"
        )
        assert first == {"lr0": None, "weight_decay": None}  # the arm as it is
        assert all(OTHERS[key].contains(second[key]) for key in searched)
    found = second
    chosen = {order["arm"]: order["arguments"] for order in crashed.orders if order not in trials}
    assert {key: chosen["fragile"][key] for key in found} == found  # its first trial crashed
    assert "lr0" not in chosen["crashing"]  # both did: the arm stays as it is
    assert json.loads((crashed.folders["tiny-fragile-s3-h1"] / RECEIPT).read_text())["args"]["lr0"] == found["lr0"]


def test_the_report_has_every_trial(crashed):
    text = (crashed.folder / "out" / "report.md").read_text()
    section = text[text.index("## Tuning") :].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    assert sum("failed" in row for row in rows) == 3 and sum("finished" in row for row in rows) == 1, section


def test_dry_run_writes_nothing(tiny_data, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before, threads = snapshot(tiny_data.parent), torch.get_num_threads()
    words = [f"data={tiny_data}", f"model={tiny_model}", "imgsz=64", "batch=6", "nbs=12", "optimizers=SophiaG,AdamW"]
    words.append("fraction=0.5")
    try:
        assert cli.main(["compare", *words, "epochs=7", "dry_run=True", "tune_trials=2"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert not list(tmp_path.iterdir())
    assert snapshot(tiny_data.parent) == before
    out = capsys.readouterr().out
    assert "6 runs: arms SophiaG, AdamW (reference AdamW) x seeds [0, 1, 2]" in out
    assert "tuning: 4 trials" in out
    # 6 runs of 7 epochs and 4 trials of 2
    steps = run_length({**DEFAULT_CFG_DICT, "batch": 6, "nbs": 12, "epochs": 7}, 8).steps
    assert f"tiny: 8 images, 2 batches an epoch, {steps} optimizer steps in 7 epochs, 10 trainings of 50 epochs" in out
    assert "seeds: no two seeds of an arm and of the reference have finished here" in out


# Counting -------------------------------------------------------------------------------------------------------------


class Clock:
    """`time.perf_counter` that moves when told."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def recorded(tmp_path, monkeypatch) -> Callable[..., SimpleNamespace]:
    """A recorder in a folder, with a trainer that has its events and nothing else: 10 images in batches of 4."""
    clock = Clock()
    monkeypatch.setattr(worker, "time", clock)

    def start(start_epoch: int = 0) -> SimpleNamespace:
        recorder = Recorder(tmp_path)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        (tmp_path / "last.pt").write_bytes(b"checkpoint")
        trainer = SimpleNamespace(
            start_epoch=start_epoch, epoch=start_epoch, batch_size=4, optimizer=optimizer, stop=False,
            train_loader=SimpleNamespace(dataset=range(10)), metrics={MAP50_95: np.float64(0.25)},
            last=tmp_path / "last.pt", save_metrics=lambda metrics: None,
        )  # fmt: skip
        recorder.on_train_start(trainer)

        def epoch(batches: int = 3, end: bool = True, save: bool = True) -> None:
            recorder.on_train_epoch_start(trainer)
            for _ in range(batches):
                clock.now += 2
                optimizer.step()
                recorder.on_train_batch_end(trainer)
            if end:
                recorder.on_train_epoch_end(trainer)
                clock.now += 100  # validation
                if save:
                    trainer.save_metrics({"train/box_loss": torch.tensor(0.5), "val/box_loss": float("nan")})
                    recorder.on_model_save(trainer)
                    trainer.epoch += 1

        return SimpleNamespace(recorder=recorder, trainer=trainer, epoch=epoch, folder=tmp_path)

    return start


def counts(folder: Path) -> list[tuple[int, ...]]:
    return [tuple(row[key] for key in ("epoch", "steps", "images", "seconds")) for row in read_curve(folder)]


def test_short_batch_and_clock(recorded):
    run = recorded()
    run.epoch()
    run.epoch()
    assert counts(run.folder) == [(1, 3, 10, 6.0), (2, 6, 20, 12.0)]
    row = read_curve(run.folder)[0]
    assert (row["train/box_loss"], row["val/box_loss"], row[MAP50_95]) == (0.5, None, 0.25)


def test_out_of_memory_starts_the_epoch_again(recorded):
    run = recorded()
    run.epoch(batches=2, end=False)
    run.trainer.batch_size = 2
    run.epoch(batches=5)
    run.epoch(batches=5)
    assert [row[2] for row in counts(run.folder)] == [18, 28]  # the 8 of the first try were trained on


def test_epoch_that_ultralytics_repeats_after_nan_is_counted_twice(recorded):
    run = recorded()
    run.epoch()
    run.epoch(save=False)
    run.epoch()
    assert counts(run.folder) == [(1, 3, 10, 6.0), (2, 9, 30, 18.0)]


def test_counters_go_on_from_the_checkpoint(recorded):
    run = recorded()
    for _ in range(3):
        run.epoch()
    with (run.folder / CURVE).open("a") as file:
        file.write('{"epoch": 4, "steps": 12, "ima')  # cut
    assert len(read_curve(run.folder)) == 3
    run = recorded(start_epoch=2)  # the third epoch's checkpoint was not written any more
    assert len((run.folder / CURVE).read_text().splitlines()) == 2
    run.epoch()
    assert counts(run.folder) == [(1, 3, 10, 6.0), (2, 6, 20, 12.0), (3, 9, 30, 18.0)]


def test_no_checkpoint_of_the_last_epoch(recorded):
    """Ultralytics refuses to resume from it; killed before its receipt, the run repeats its last epoch."""
    run = recorded()
    run.epoch()
    assert (run.folder / CHECKPOINT).read_bytes() == b"checkpoint"
    run.trainer.last.write_bytes(b"of the last epoch")
    run.trainer.stop = True
    run.epoch()
    assert (run.folder / CHECKPOINT).read_bytes() == b"checkpoint"
    assert len(counts(run.folder)) == 2


def test_ends_when_its_parent_is_gone(recorded, monkeypatch):
    run = recorded()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(SystemExit, match="is gone"):
        run.epoch()


# BatchNorm recalibration ----------------------------------------------------------------------------------------------


def digest(images: torch.Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


@pytest.fixture(scope="module")
def recalibrated(tiny_data, tiny_model, tmp_path_factory) -> Callable[[str, bool], SimpleNamespace]:
    """Train two epochs and keep what validation saw, and the batches of both kinds."""

    def train(optimizer: str, recalibrate: bool) -> SimpleNamespace:
        seen = SimpleNamespace(batches=[], passes=[], before=[], validated=[], flags=[])

        class Trainer(DetectionTrainer):
            def preprocess_batch(self, batch):
                batch = super().preprocess_batch(batch)
                seen.batches.append(digest(batch["img"]))
                return batch

        def start(trainer):
            seen.trainer = trainer
            validate = trainer.validate

            def watched():
                seen.before.append(copy.deepcopy(trainer.ema.ema))
                random_states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
                result = validate()
                seen.flags.append((random_states, trainer.model.training))
                return result

            trainer.validate = watched

        def on_val_start(validator):
            if validator.training:
                with torch.inference_mode(False):
                    seen.validated.append(copy.deepcopy(seen.trainer.ema.ema))

        model = YOLO(tiny_model)
        if recalibrate:
            model.add_callback("on_train_start", recalibrate_before_validation)
        model.add_callback("on_train_start", start)
        model.add_callback("on_val_start", on_val_start)
        with pytest.MonkeyPatch.context() as patch:
            original = recalibration.recalibrate

            def kept(model, trainer, batches):
                batches = list(batches)
                seen.passes.append([digest(batch["img"]) for batch in batches])
                original(model, trainer, batches)

            patch.setattr(recalibration, "recalibrate", kept)
            model.train(
                trainer=Trainer, data=str(tiny_data), optimizer=optimizer, epochs=2, batch=6, nbs=6, imgsz=64, lr0=0.01,
                warmup_epochs=0, device="cpu", plots=False, project=str(tmp_path_factory.mktemp("runs")),
            )  # fmt: skip
        return seen

    return train


@pytest.fixture(scope="module")
def sophia(recalibrated) -> SimpleNamespace:
    return recalibrated("SophiaG", True)


@pytest.fixture(scope="module")
def adamw(recalibrated) -> SimpleNamespace:
    return recalibrated("AdamW", True)


def statistics(model: nn.Module, folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean over batches of each layer's mean and variance over the images of a folder, by hand in float64."""
    files = sorted(folder.glob("*"))
    images = np.stack([cv2.imread(str(path))[..., ::-1] for path in files]).transpose(0, 3, 1, 2) / 255
    model = copy.deepcopy(model).double().eval()
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def normalise(name: str) -> Callable:
        def hook(layer, inputs, _):
            x = inputs[0]
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            n = x.numel() / x.shape[1]
            found.setdefault(name, []).append((mean, variance * n / (n - 1)))
            scale = layer.weight / (variance + layer.eps).sqrt()
            return (x - mean[:, None, None]) * scale[:, None, None] + layer.bias[:, None, None]

        return hook

    for name, layer in norms(model).items():
        layer.register_forward_hook(normalise(name))
    with torch.no_grad():
        for start in range(0, len(images), 6):
            model(torch.from_numpy(images[start : start + 6]))
    return {name: tuple(torch.stack(part).mean(0) for part in zip(*pairs)) for name, pairs in found.items()}


def test_validation_sees_the_statistics_of_training_images(sophia, tiny_data):
    assert len(sophia.validated) == 2
    for before, validated in zip(sophia.before, sophia.validated):
        expected = statistics(before, tiny_data.parent / "tiny" / "images" / "train")
        layers = norms(validated)
        assert len(layers) > 50 and expected.keys() == layers.keys()
        for name, layer in layers.items():
            for value, wanted in zip((layer.running_mean, layer.running_var), expected[name]):
                assert torch.allclose(value.double(), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item()), name
        assert not torch.allclose(norms(before)["model.0.bn"].running_mean, layers["model.0.bn"].running_mean)


def test_all_but_the_statistics_is_as_before(sophia):
    for before, validated in zip(sophia.before, sophia.validated):
        assert not any(module.training for module in validated.modules())
        for old, new in zip(norms(before).values(), norms(validated).values()):
            assert (new.momentum, new.num_batches_tracked) == (old.momentum, old.num_batches_tracked)
            assert new.momentum == load_preset("detect-scratch").settings["bn_momentum"]
        parameters = zip(before.parameters(), validated.parameters())
        assert all(torch.equal(old, new) for old, new in parameters)


def test_both_arms_are_recalibrated_on_the_same_images_each_time(sophia, adamw):
    assert len(sophia.passes) == 2 and len(sophia.passes[0]) == 3
    assert sophia.passes[0] == sophia.passes[1] == adamw.passes[0] == adamw.passes[1]


def test_recalibration_leaves_the_training_alone(sophia, adamw, recalibrated):
    without = recalibrated("AdamW", False)
    assert len(without.batches) == 6 and len(set(without.batches)) == 6 and not without.passes
    assert adamw.batches == without.batches == sophia.batches
    for one, other in zip(adamw.flags, without.flags):
        assert one == other  # random states after validation, and the mode of the model
    ends = [dict(run.trainer.model.state_dict()) for run in (adamw, without)]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_recalibration_takes_images_from_all_over_those_trained_on(tmp_path, monkeypatch):
    """Also where `fraction` leaves images out, and whatever their shape; a pass draws no random number."""
    for i in range(10):
        path = tmp_path / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.full((64, 32 + 8 * ((i * 7) % 10), 3), 20 * i, np.uint8))
        label = tmp_path / "labels" / f"{i}.txt"
        label.parent.mkdir(exist_ok=True)
        label.write_text("0 0.5 0.5 0.5 0.5\n")
    args = copy.copy(DEFAULT_CFG)
    args.imgsz, args.workers, args.fraction, args.task = 64, 0, 0.8, "detect"
    dataset = build_yolo_dataset(args, str(tmp_path / "images"), 2, {"names": {0: "a"}, "nc": 1, "channels": 3})
    assert len(dataset) == 8
    seen = []
    monkeypatch.setattr(recalibration, "IMAGES", 4)
    monkeypatch.setattr(recalibration, "recalibrate", lambda model, trainer, batches: seen.append(list(batches)))
    trainer = SimpleNamespace(
        train_loader=SimpleNamespace(dataset=dataset), args=args, batch_size=2, validate=lambda: "result",
        ema=SimpleNamespace(ema=None),
    )  # fmt: skip
    recalibrate_before_validation(trainer)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert [trainer.validate(), trainer.validate()] == ["result", "result"]
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    for batches in seen:
        assert [[Path(file).stem for file in batch["im_file"]] for batch in batches] == [["0", "2"], ["4", "6"]]
        assert all(batch["img"].shape == (2, 3, 64, 64) and batch["img"].dtype == torch.uint8 for batch in batches)
    assert dataset.augment and dataset.transforms is not None

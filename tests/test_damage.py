"""Disks, data and checkpoints that are not as they should be: a clear error or a documented way on; nothing is lost."""

from __future__ import annotations

import copy
import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sqlalchemy import event
from sqlalchemy.engine import Engine
from ultralytics import YOLO
from ultralytics.utils.torch_utils import convert_optimizer_state_dict_to_fp16

from yolo_sophia import atomic, cli
from yolo_sophia.atomic import atomic_write
from yolo_sophia.compare.plan import parse, runs
from yolo_sophia.integration.checkpoints import convert_others
from yolo_sophia.optim import SophiaG, SophiaH
from yolo_sophia.runs import scheduler, worker
from yolo_sophia.runs.local_executor import LocalExecutor
from yolo_sophia.runs.scheduler import RunQueue, folder_of
from yolo_sophia.runs.worker import CHECKPOINT, RECEIPT, is_intact, read_curve

pytestmark = pytest.mark.slow


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(*_: Any, **__: Any) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False, map_location="cpu")


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory) -> Iterator[Path]:
    """A disk of 16 MB of its own; skips where none can be mounted."""
    folder = tmp_path_factory.mktemp("disk")
    if (
        sys.platform != "linux"
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """Leave not a byte on it."""
    path = disk / "filler"
    with pytest.raises(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return path


def train(run: dict[str, Any], **changes: Any):
    """A training with SophiaG; `callbacks` by event name."""
    arguments = {"optimizer": "SophiaG", **run, **changes}
    callbacks = arguments.pop("callbacks", {})
    model = YOLO(arguments.pop("model"))
    for name, function in callbacks.items():
        model.add_callback(name, function)
    model.train(**arguments)
    return model.trainer


@pytest.fixture(scope="module")
def cut(tiny_data, tiny_model, tmp_path_factory):
    """Runs of three epochs that were cut after the first, by optimizer: folder `last.pt` lies in."""
    made: dict[str, Path] = {}

    def folder(optimizer: str) -> Path:
        if optimizer not in made:
            project = tmp_path_factory.mktemp("cut")
            kept = project / "kept.pt"
            run = {
                "model": str(tiny_model),
                "data": str(tiny_data),
                "imgsz": 64,
                "epochs": 3,
                "batch": 4,
                "nbs": 4,
                "workers": 0,
            }
            run |= {
                "device": "cpu",
                "plots": False,
                "val": False,
                "project": str(project),
                "name": "run",
                "optimizer": optimizer,
            }

            def keep(trainer: Any) -> None:
                if trainer.epoch == 0:
                    shutil.copy(trainer.last, kept)

            trainer = train(run, callbacks={"on_model_save": keep})
            shutil.copy(kept, trainer.last)
            rows = trainer.csv.read_text().splitlines(keepends=True)
            trainer.csv.write_text("".join(rows[:2]))
            made[optimizer] = Path(trainer.save_dir)
        return made[optimizer]

    return folder


@pytest.fixture
def resumed(cut, tmp_path):
    """Resume a copy of such a run, its checkpoint changed first; returns the trainer, and the checkpoint as it was."""

    def resume(optimizer: str, change: Any = lambda checkpoint: None, /, **typed: Any):
        last = tmp_path / "run" / "weights" / "last.pt"
        shutil.copytree(cut(optimizer), last.parents[1])
        checkpoint = load(last)
        change(checkpoint)
        checkpoint["train_args"]["save_dir"] = str(last.parents[1])
        torch.save(checkpoint, last)
        checkpoint = copy.deepcopy(checkpoint)
        model, seen = YOLO(str(last)), {}
        model.add_callback("on_train_start", lambda trainer: seen.update(copy.deepcopy(trainer.optimizer.state_dict())))
        model.train(resume=True, **typed)
        return model.trainer, checkpoint["optimizer"], seen

    return resume


# Full and read-only disks ---------------------------------------------------------------------------------------------


def test_a_full_disk_during_a_checkpoint_leaves_the_last_one(tiny_run, monkeypatch):
    run = {**tiny_run, "epochs": 3}
    weights = Path(run["project"]) / "run" / "weights"
    seen: dict[str, bytes] = {}

    def fill_up(trainer: Any) -> None:
        if trainer.epoch == 0:
            seen["last"] = trainer.last.read_bytes()
            monkeypatch.setattr("yolo_sophia.atomic.os.fsync", full)

    with pytest.raises(OSError, match="No space left on device"):
        train(run, callbacks={"on_model_save": fill_up})
    monkeypatch.undo()
    assert (weights / "last.pt").read_bytes() == seen["last"] and sorted(p.name for p in weights.iterdir()) == [
        "best.pt",
        "last.pt",
    ]
    model = YOLO(str(weights / "last.pt"))
    model.train(resume=True)
    assert model.trainer.epoch == 2


@pytest.mark.long
def test_a_small_disk_that_fills_up_in_a_training(tiny_run, small_disk):
    run = {**tiny_run, "epochs": 3, "project": str(small_disk / "runs")}
    last = small_disk / "runs" / "run" / "weights" / "last.pt"
    seen = {}

    def fill_up(trainer: Any) -> None:
        if trainer.epoch == 1:
            seen["last"] = last.read_bytes()
            fill(small_disk)

    with pytest.raises(OSError, match="No space left on device"):
        train(run, callbacks={"on_train_epoch_start": fill_up})
    (small_disk / "filler").unlink()
    assert last.read_bytes() == seen["last"]
    model = YOLO(str(last))
    model.train(resume=True)
    assert model.trainer.epoch == 2
    shutil.rmtree(small_disk / "runs")


@pytest.mark.parametrize("error", [full, read_only])
def test_a_file_that_cannot_be_written_stays_the_old_one(tmp_path, monkeypatch, error):
    path = tmp_path / "file"
    atomic_write(path, "old")
    monkeypatch.setattr(worker.os, "fsync", error)
    with pytest.raises(OSError):
        atomic_write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_of_the_command(small_disk, tiny_data, tiny_model, capsys):
    words = ["compare", f"data={tiny_data}", f"model={tiny_model}", "optimizers=SGD", f"out={small_disk / 'compare'}"]
    (small_disk / "compare").mkdir(exist_ok=True)
    filler = fill(small_disk)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("yolo-sophia: [Errno 28] No space left on device") and error.count("\n") == 1
    filler.unlink()
    assert not list((small_disk / "compare").iterdir())


def test_a_read_only_disk_is_one_line_of_the_command(small_disk, tiny_data, tiny_model, capsys):
    words = [f"data={tiny_data}", f"model={tiny_model}", f"out={small_disk / 'ro'}"]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    try:
        for command in (["compare", *words, "optimizers=SGD"], ["tune", *words]):
            assert cli.main(command) == 2
            error = capsys.readouterr().err
            assert "Read-only file system" in error and error.startswith("yolo-sophia: ") and error.count("\n") == 1
    finally:
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_a_folder_that_is_a_file(command, tiny_data, tiny_model, tmp_path, capsys):
    (tmp_path / "file").touch()
    words = [f"data={tiny_data}", f"model={tiny_model}", f"out={tmp_path / 'file'}"]
    assert cli.main([command, *words, *["optimizers=SGD"] * (command == "compare")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and error.startswith("yolo-sophia: ") and error.count("\n") == 1
    assert (tmp_path / "file").read_bytes() == b""


def plan_of(tiny_data: Path, tiny_model: Path, out: Path, **more: Any):
    content = {
        "data": [str(tiny_data)],
        "model": str(tiny_model),
        "optimizers": ["SGD", "SophiaG"],
        "seeds": 1,
        "epochs": 2,
        "out": str(out),
    }
    return parse({**content, "imgsz": 64, "batch": 4, "nbs": 4, "workers": 1, **more})


def test_a_run_whose_folder_cannot_be_written_failed_and_the_others_go_on(tiny_data, tiny_model, tmp_path, monkeypatch):
    plan = plan_of(tiny_data, tiny_model, tmp_path)
    ordered = runs(plan)
    real = atomic.os.fsync
    failing = folder_of(plan.out, ordered[0])

    def write_order(folder: Path, *rest: Any) -> None:
        if folder == failing:
            full()
        (folder / RECEIPT).write_text("{}")

    monkeypatch.setattr("yolo_sophia.runs.scheduler.write_order", write_order)
    monkeypatch.setattr(
        "yolo_sophia.runs.local_executor.start_worker", lambda *_: subprocess.Popen([sys.executable, "-c", ""])
    )
    queue = RunQueue(ordered)
    scheduler.train(plan.out, queue, LocalExecutor())
    shown = queue.progress()
    assert real is os.fsync and [item.state for item in shown] == ["failed", "finished"]
    assert shown[0].note == "OSError: [Errno 28] No space left on device"


def test_a_study_whose_data_base_is_full(tiny_data, tiny_model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    from yolo_sophia.tune import command

    limit: dict[str, Any] = {}

    def connect(connection: Any, _: object) -> None:
        if limit:
            connection.execute(f"pragma max_page_count={limit['pages']}")

    def train_trials(study: Any, *_: Any, **__: Any) -> None:
        limit["pages"] = 1  # SQLite takes the present size then
        study.storage.engine.dispose()
        held = [study.claim() for _ in range(300)]
        raise AssertionError(f"{len(held)} trials, and the data base is not full")

    event.listen(Engine, "connect", connect)
    try:
        monkeypatch.setattr(command, "train_trials", train_trials)
        words = [f"data={tiny_data}", f"model={tiny_model}", f"out={tmp_path / 'out'}", "trials=100000"]
        assert cli.main(["tune", *words]) == 2
    finally:
        event.remove(Engine, "connect", connect)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("yolo-sophia: storage=sqlite:///") and "database or disk is full" in error
    assert error.endswith("Rerun the command to resume.")


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["compare", "tune"])
@pytest.mark.parametrize(
    "content",
    [None, "names: [a]", "[1, 2]", "train: [", "\udcff"],
    ids=["no file", "no train", "a list", "no YAML", "bytes"],
)
def test_data_that_is_not_there_is_refused_before_anything_is_written(command, content, tiny_model, tmp_path, capsys):
    data, out = tmp_path / "some.yaml", tmp_path / "out"
    if content is not None:
        data.write_bytes(content.encode(errors="surrogateescape"))
    assert (
        cli.main(
            [command, f"data={data}", f"model={tiny_model}", f"out={out}", *["optimizers=SGD"] * (command == "compare")]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith(f"yolo-sophia: data={data} is no data YAML with a train entry") and error.count("\n") == 1
    assert not out.exists()


def test_missing_images_are_ultralytics_own_error(tiny_run, tmp_path):
    data = tmp_path / "gone.yaml"
    data.write_text(f"path: {tmp_path / 'gone'}\ntrain: images/train\nval: images/val\nnames: [a]\n")
    with pytest.raises((FileNotFoundError, RuntimeError), match=r"images not found|missing"):
        train({**tiny_run, "data": str(data)})


@pytest.fixture
def own_data(tiny_data, tmp_path) -> Path:
    """A copy of the data that a test may damage; its YAML."""
    content = yaml.safe_load(tiny_data.read_text())
    shutil.copytree(content["path"], tmp_path / "data", ignore=shutil.ignore_patterns("*.cache"))
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**content, "path": str(tmp_path / "data")}))
    return path


def test_corrupt_images_are_left_out(tiny_run, own_data):
    images = sorted((own_data.parent / "data" / "images" / "train").iterdir())
    images[0].write_bytes(b"no image")
    images[1].write_bytes(images[1].read_bytes()[:60])  # cut off
    images[2].write_bytes(b"")
    seen = []
    trainer = train(
        {**tiny_run, "data": str(own_data)},
        callbacks={"on_train_start": lambda t: seen.append(len(t.train_loader.dataset))},
    )
    assert seen == [13]
    clock = trainer.optimizer.param_groups[0]
    assert clock["hessian_updates"] > 0 and clock["hessian_dropped"] == 0
    assert all(state["hessian"].isfinite().all() for state in trainer.optimizer.state.values())


@pytest.mark.long
def test_only_corrupt_images_are_an_error(tiny_run, own_data):
    for image in (own_data.parent / "data" / "images" / "train").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(
        (FileNotFoundError, RuntimeError, ValueError, AssertionError),
        match=r"No valid images|[Ll]abels|No images|Error loading",
    ):
        train({**tiny_run, "data": str(own_data)})


# Checkpoints that are damaged -----------------------------------------------------------------------------------------

DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"this is no checkpoint",
    "a byte": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_checkpoint_is_refused_before_a_directory_is_made(damage, cut, tiny_run, tmp_path):
    path = tmp_path / "damaged.pt"
    path.write_bytes(DAMAGES[damage]((cut("SophiaG") / "weights" / "last.pt").read_bytes()))
    with pytest.raises(Exception) as error:
        train({**tiny_run, "model": str(path)})
    assert len(str(error.value)) > 15
    with pytest.raises(Exception) as error:
        train({**tiny_run, "resume": str(path)})
    assert len(str(error.value)) > 15
    assert not Path(tiny_run["project"]).exists()


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_damaged_model_is_one_line_of_a_dry_run(damage, cut, tiny_data, tmp_path, capsys):
    path = tmp_path / "damaged.pt"
    path.write_bytes(DAMAGES[damage]((cut("SophiaG") / "weights" / "last.pt").read_bytes()))
    assert cli.main(["compare", f"data={tiny_data}", f"model={path}", "optimizers=SGD", "dry_run=True"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"yolo-sophia: model={path} cannot be loaded: ")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen(damage, cut, tmp_path):
    path = cut("SophiaG") / "weights" / "last.pt"
    assert is_intact(path)
    other = tmp_path / "other.pt"
    other.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert not is_intact(other) and not is_intact(tmp_path / "none.pt")


@pytest.mark.long
def test_a_run_of_a_comparison_with_a_damaged_checkpoint_begins_anew(tiny_data, tiny_model, tmp_path):

    plan = plan_of(tiny_data, tiny_model, tmp_path, optimizers=["SGD"])
    (run,) = runs(plan)
    folder = folder_of(plan.out, run)
    folder.mkdir(parents=True)
    (folder / CHECKPOINT).write_bytes(b"PK damaged")
    (folder / "curve.jsonl").write_text(json.dumps({"epoch": 1, "steps": 99, "images": 1, "seconds": 1.0}) + "\n")
    queue = RunQueue([run])
    scheduler.train(plan.out, queue, LocalExecutor())
    (item,) = queue.progress()
    assert item.state == "finished", item.note
    rows = read_curve(folder)
    assert [row["epoch"] for row in rows] == [1, 2] and [row["steps"] for row in rows] == [4, 8]
    assert "is damaged and cannot be resumed from: this training starts again" in (folder / "log.txt").read_text()


# Precision of the saved state -----------------------------------------------------------------------------------------


def own_state(kind: Any, **settings: Any) -> dict[str, Any]:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([p], lr=0.1, **settings)
    p.grad = torch.full_like(p, 1e-6)
    if hasattr(optimizer, "update_hessian"):
        optimizer.update_hessian([torch.full_like(p, 1e-9)])
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.compat
@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_state_of_our_optimizers_is_saved_as_it_is(kind):
    """Whoever made the optimizer; beside it, the state of others is converted as Ultralytics does."""
    settings = {"k": None} if kind is SophiaH else {}
    saved, other = own_state(kind, **settings), own_state(torch.optim.Adamax)
    saved["state"]["other"] = other["state"][0]
    saved["param_groups"] += other["param_groups"]
    expected = convert_optimizer_state_dict_to_fp16(copy.deepcopy(other))["state"][0]
    found = convert_others(convert_optimizer_state_dict_to_fp16, saved)["state"]
    assert found[0]["hessian"].dtype == found[0]["exp_avg"].dtype == torch.float32 and found[0]["hessian"].all()
    assert {key: value.dtype for key, value in found["other"].items()} == {
        key: value.dtype for key, value in expected.items()
    }
    assert found["other"]["exp_inf"].dtype == torch.float16


@pytest.mark.compat
def test_state_of_other_optimizers_is_ultralytics_own():
    """Another implementation of Sophia too: its state has other keys, and is not ours to keep."""
    for state in (own_state(torch.optim.Adamax), {"state": {0: {"hessian": torch.ones(2)}}, "param_groups": [{}]}):
        expected = convert_optimizer_state_dict_to_fp16(copy.deepcopy(state))
        found = convert_others(convert_optimizer_state_dict_to_fp16, copy.deepcopy(state))
        for key, value in expected["state"][0].items():
            assert found["state"][0][key].dtype == value.dtype


@pytest.mark.slow
@pytest.mark.compat
def test_a_trainer_with_an_optimizer_of_its_own_saves_float32(tiny_run):
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Own(DetectionTrainer):
        def build_optimizer(self, model, *args, **kwargs):
            return SophiaG([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def optimizer_step(self):
            self.optimizer.update_hessian(
                [None if p.grad is None else (p.grad / 100).square() for p in self.optimizer.param_groups[0]["params"]]
            )
            super().optimizer_step()

    seen = []

    def look(trainer: Any) -> None:
        for path in (trainer.last, trainer.best):
            live = trainer.optimizer.state_dict()["state"]
            saved = load(path)["optimizer"]["state"]
            seen.append(all(torch.equal(saved[key]["hessian"], live[key]["hessian"]) for key in live))

    trainer = Own(overrides={**tiny_run, "epochs": 1, "optimizer": "AdamW"})
    trainer.add_callback("on_model_save", look)
    trainer.train()
    assert seen == [True, True]


# Checkpoints of others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("SGD", "SophiaG"), ("SophiaG", "SGD")])
def test_a_resumed_run_keeps_its_optimizer(first, second, resumed):
    trainer, saved, loaded = resumed(first, optimizer=second)
    assert type(trainer.optimizer).__name__ == first == trainer.args.optimizer
    for key, state in saved["state"].items():
        for name, own in state.items():
            assert torch.equal(torch.as_tensor(loaded["state"][key][name]).float(), torch.as_tensor(own).float())
    assert trainer.epoch == 2


@pytest.mark.long
@pytest.mark.parametrize(("first", "second"), [("SGD", "SophiaG"), ("SophiaG", "SGD")])
def test_weights_of_another_run_start_anew(first, second, cut, tiny_run):
    trainer = train({**tiny_run, "model": str(cut(first) / "weights" / "last.pt")}, optimizer=second)
    assert type(trainer.optimizer).__name__ == second and trainer.start_epoch == 0


@pytest.mark.compat
def test_the_state_of_another_optimizer_is_refused_by_name(resumed):
    def swap(checkpoint: dict[str, Any]) -> None:
        for state in checkpoint["optimizer"]["state"].values():
            state["momentum_buffer"] = state.pop("hessian")

    with pytest.raises(
        ValueError, match=r"The state is not SophiaG's: .*found \['momentum_buffer'\] as well. Start with"
    ):
        resumed("SophiaG", swap)


FORMATS = {  # keys of a parameter group that were not there yet, by the commit that wrote such checkpoints
    "314d85e": ["fused", "hessian_dtype", "momentum_dtype", "hessian_average", "cautious", "clip_fraction",
                "rho_measurements", "rho_due", "keep_float32", "hessian_warmup", "hessian_fraction"],
    "3ddceed": ["fused", "hessian_dtype", "momentum_dtype", "cautious", "hessian_warmup"],
}  # fmt: skip


@pytest.mark.compat
@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_of_an_older_version_goes_on(format, resumed):
    def age(checkpoint: dict[str, Any]) -> None:
        for group in checkpoint["optimizer"]["param_groups"]:
            for key in FORMATS[format]:
                group.pop(key, None)
        for key in ("hessian_warmup", "cautious", "bn_momentum", "hessian_average"):
            del checkpoint["train_args"][key]
        checkpoint["train_args"] |= {"sophia": "detect", "sophia_typed": "detect:", "rho": 0.1}  # a preset that is gone
        for group in checkpoint["optimizer"]["param_groups"]:
            group |= {"rho": 0.1}

    trainer, saved, loaded = resumed("SophiaG", age)
    assert trainer.epoch == 2
    for key, state in saved["state"].items():
        assert torch.equal(loaded["state"][key]["hessian"], state["hessian"])
    group = trainer.optimizer.param_groups[0]
    assert group["keep_float32"] is True and group["cautious"] is False and group["rho"] == 0.1
    with Path(trainer.csv).open() as file:
        assert [row["epoch"] for row in csv.DictReader(file, skipinitialspace=True)] == ["1", "2", "3"]


@pytest.mark.compat
def test_other_parameter_groups_are_refused(resumed):
    def regroup(checkpoint: dict[str, Any]) -> None:
        first, second, *_ = checkpoint["optimizer"]["param_groups"]
        first["params"].append(second["params"].pop())

    with pytest.raises(
        ValueError, match=r"The state is of groups of \[.*\] parameters, expected \[.*The model or its parameter"
    ):
        resumed("SophiaG", regroup)


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_parameters_of_other_shapes_are_refused_and_nothing_changes(kind):
    def made(*shapes: tuple[int, ...]) -> Any:
        optimizer = kind([torch.nn.Parameter(torch.ones(shape)) for shape in shapes])
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.update_hessian([torch.ones(shape) for shape in shapes])
        optimizer.step(**({"bs": 1} if kind is None else {}))
        return optimizer

    first, second = made((3,), (2, 2)), made((2, 2), (3,))
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg of shape \(3,\) for parameter 0, expected \(2, 2\)\. The model or"):
        second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"of groups of \[1\] parameters, expected \[2\]"):
        second.load_state_dict(made((2, 2)).state_dict())
    for key, state in before["state"].items():
        assert torch.equal(second.state_dict()["state"][key]["hessian"], state["hessian"])
    state = first.state_dict()
    del state["state"][0]["exp_avg"]
    with pytest.raises(ValueError, match="found some without exp_avg or hessian"):
        first.load_state_dict(state)

"""Trainings and comparisons at once, on the same data and in the same folders: none disturbs another."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ultralytics.utils.patches import torch_load

from yolo_sophia.compare.plan import parse, runs
from yolo_sophia.integration.checkpoints import STAGING, staged
from yolo_sophia.runs.worker import RECEIPT, read_curve
from yolo_sophia.shapes import generate

OPTIMIZERS = ("SophiaG", "AdamW", "SophiaG", "SGD")
TRAIN = """
import json, sys
from ultralytics import YOLO
arguments = json.loads(sys.argv[1])
YOLO(arguments.pop("model")).train(**arguments)
"""


def start(*arguments: object, log: Path) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, *map(str, arguments)], stdout=file, stderr=file, env={**os.environ})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch_load(folder / "weights" / "last.pt", map_location="cpu")["model"].state_dict()


@pytest.mark.slow
@pytest.mark.compat
def test_two_trainings_in_one_folder(tiny_run, tmp_path):
    """With another optimizer two such trainings end normally; each file is that of one of them."""
    run = {**tiny_run, "epochs": 3, "exist_ok": True, "save_period": 1, "optimizer": "SophiaG"}
    logs = [tmp_path / f"{number}.txt" for number in range(2)]
    processes = [start("-c", TRAIN, json.dumps({**run, "seed": seed}), log=log) for seed, log in enumerate(logs)]
    codes = [process.wait(500) for process in processes]
    assert codes == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)
    folder = Path(run["project"]) / "run" / "weights"
    found = {path.name: torch_load(path, map_location="cpu") for path in folder.glob("*.pt")}
    assert sorted(path.name for path in folder.iterdir()) == sorted(found)
    assert found["last.pt"]["optimizer"] is found["best.pt"]["optimizer"] is None


def test_staging_folders_are_separate(tmp_path):
    """Several threads save into one folder; each moves its own files, and none removes those of another."""
    barrier, errors = threading.Barrier(4, timeout=30), []

    def save(number: int) -> None:
        try:
            for turn in range(20):
                with staged(tmp_path) as folder:
                    assert list(folder.glob("*.pt")) == []
                    (folder / "last.pt").write_text(f"{number} {turn}")
                    barrier.wait()  # all are in the middle of it
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert (tmp_path / "last.pt").read_text().endswith(" 19")


@pytest.mark.slow
@pytest.mark.parametrize("columns", ["other", "both"])
def test_a_table_with_rows_of_another_training(columns, tiny_run):
    """sophia.png shows the rows that have its columns; without any, the training ends with a warning."""
    from ultralytics import YOLO
    from ultralytics.utils import LOGGER

    def share(trainer) -> None:
        header, *rows = trainer.csv.read_text().splitlines()
        plain = ["epoch,time,train/box_loss", "1,1,1"]
        trainer.csv.write_text("\n".join(plain if columns == "other" else [header, *plain, header, *rows]) + "\n")

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    model = YOLO(tiny_run["model"])
    model.add_callback("on_model_save", share)
    LOGGER.addHandler(handler)
    try:
        del tiny_run["model"]
        model.train(**{**tiny_run, "epochs": 1, "plots": True, "optimizer": "SophiaG"})
    finally:
        LOGGER.removeHandler(handler)
    drawn = Path(model.trainer.save_dir, "sophia.png").is_file()
    assert drawn == (columns == "both") != any("sophia.png was not drawn: " in line for line in said)


HOLD = """
import sys, time
from pathlib import Path
from yolo_sophia.integration.checkpoints import staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "last.pt").write_text("half")
    time.sleep(600)
"""


def test_only_the_staging_folder_of_a_killed_process_is_removed(tmp_path):
    (tmp_path / STAGING).mkdir()  # as yolo-sophia 0.1.0 left it
    other = start("-c", HOLD, tmp_path, log=tmp_path / "log.txt")
    try:
        while not (found := list(tmp_path.glob(f"{STAGING}-*/last.pt"))):
            assert other.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.05)
        with staged(tmp_path):
            pass
        assert found[0].read_text() == "half"
        assert not (tmp_path / STAGING).exists()
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    with staged(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


@pytest.mark.slow
@pytest.mark.long
def test_company(tiny_run, tmp_path):
    root = generate(tmp_path / "set", train=32, val=8, size=64)  # fresh: all of them find no cache of labels
    data = tmp_path / "set.yaml"
    data.write_text(
        yaml.safe_dump({"path": str(root), "train": "images/train", "val": "images/val", "names": [*"abcdef"]})
    )
    run = {**tiny_run, "data": str(data), "epochs": 3, "val": True}
    words = [
        f"data={data}", f"model={run['model']}", "imgsz=64", "batch=4", "nbs=4", "epochs=2", "device=cpu",
        "optimizers=SophiaG,AdamW", "seeds=2", "workers=1", f"out={tmp_path / 'out'}",
    ]  # fmt: skip
    company, logs = [], []
    for number, optimizer in enumerate(OPTIMIZERS):
        logs.append(tmp_path / f"{number}.txt")
        given = json.dumps({**run, "optimizer": optimizer, "name": f"train{number}"})
        company.append(start("-c", TRAIN, given, log=logs[-1]))
    for number in range(2):
        logs.append(tmp_path / f"compare{number}.txt")
        company.append(start("-m", "yolo_sophia.cli", "compare", *words, log=logs[-1]))
    codes = [process.wait(1500) for process in company]
    assert codes == [0] * 6, "\n".join(log.read_text()[-1500:] for log, code in zip(logs, codes) if code)

    # The caches of labels are whole, and those of a training alone.
    for split, count in (("train", 32), ("val", 8)):
        cache = np.load(str(root / "labels" / f"{split}.cache"), allow_pickle=True).item()
        assert len(cache["labels"]) == count
    # Each training has its own results: those of the same command alone.
    for number, optimizer in enumerate(OPTIMIZERS):
        folder = Path(run["project"]) / f"train{number}"
        assert yaml.safe_load((folder / "args.yaml").read_text())["optimizer"] == optimizer
        text = (folder / "results.csv").read_text()
        assert len(text.splitlines()) == 4 and ("sophia/rho" in text) == (optimizer == "SophiaG")
    first, twin = (weights(Path(run["project"]) / f"train{number}") for number in (0, 2))
    alone = start("-c", TRAIN, json.dumps({**run, "optimizer": "SophiaG", "name": "alone"}), log=tmp_path / "alone.txt")
    assert alone.wait(600) == 0
    for key, value in weights(Path(run["project"]) / "alone").items():
        assert torch.equal(value, first[key]) and torch.equal(value, twin[key]), key
    # The two comparisons have shared the work: each run once, whole, and under its own key.
    for planned in runs(parse(words)):
        folder = tmp_path / "out" / "runs" / planned.key
        receipt = json.loads((folder / RECEIPT).read_text())
        assert (receipt["key"], receipt["args"]["optimizer"], receipt["args"]["seed"]) == (
            planned.key, planned.arm, planned.seed,
        )  # fmt: skip
        rows = read_curve(folder)
        assert [row["epoch"] for row in rows] == [1, 2]
        assert all(("sophia/rho" in row) == (planned.arm == "SophiaG") for row in rows)
    assert (tmp_path / "out" / "report.html").is_file()

"""Four trainings and two comparisons at once, on the same data and in the same folders: none gets another's results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ultralytics.utils.patches import torch_load

from yolo_sophia.compare.plan import parse, runs
from yolo_sophia.runs.worker import RECEIPT, read_curve
from yolo_sophia.shapes import generate

pytestmark = [pytest.mark.slow, pytest.mark.long]
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

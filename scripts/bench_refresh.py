"""Epoch time and peak memory of SophiaG (or another optimizer) over AdamW, YOLOv8n, batch 16, two trainings by turns.

Usage: python scripts/bench_refresh.py [imgsz=160] [nbs=16] [seconds=200] [optimizer=SophiaG] [file=cycles.jsonl]
       [key=value ...]     (other keys: Ultralytics arguments, Sophia's own for the second training alone)

Each training is a process of its own, and only one runs at a time, for ten micro-batches. A ratio is that of one whole
refresh cycle (hessian_interval optimizer steps) of each, data loading included; the medians are printed when `seconds`
are over. Cycles are added to `file` and read back from it: several short calls make one long measurement. On a machine
with other work the CPU time tells more than the clock (OMP_NUM_THREADS=1: idle threads count as work).
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TURN = 10  # micro-batches
BATCH = 16
INTERVAL = 10  # optimizer steps: hessian_interval
TARGETS = {16: 1.05, 64: 1.02}  # by nbs
FIGURES = ("epoch", "cpu", "cpu_without_loading", "peak")
ADAMW = {"lr0": 0.001, "warmup_bias_lr": 0.0}


def train(pipe: Connection, arguments: dict[str, Any]) -> None:
    """Train turn by turn, in a process of its own.

    Args:
        pipe: Gives True for a turn and False for the end; gets for each turn the seconds, those of CPU time, those of
            CPU time without data loading, and the peak of the resident memory so far in bytes.
        arguments: Of the training.
    """
    from ultralytics import YOLO

    turn: dict[str, float] = {}

    def wait(trainer) -> None:
        if not pipe.recv():
            os._exit(0)  # in the middle of an epoch: nothing of this training is of use
        turn.update(batches=0, start=time.perf_counter(), cpu_start=time.process_time(), busy=0.0)

    def on_batch_start(trainer) -> None:
        turn["batch_start"] = time.process_time()

    def on_batch_end(trainer) -> None:
        now, cpu_now = time.perf_counter(), time.process_time()
        turn["busy"] += cpu_now - turn["batch_start"]
        turn["batches"] += 1
        if turn["batches"] == TURN:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            pipe.send((now - turn["start"], cpu_now - turn["cpu_start"], turn["busy"], peak))
            wait(trainer)

    model = YOLO("yolov8n.yaml")
    for event, callback in (("start", wait), ("batch_start", on_batch_start), ("batch_end", on_batch_end)):
        model.add_callback(f"on_train_{event}", callback)
    model.train(**arguments)


def cycles(arms: list[dict[str, Any]], turns: int, seconds: float) -> list[dict[str, Any]]:
    """Let both trainings take turns for some time.

    Args:
        arms: Arguments of both trainings.
        turns: Turns of a refresh cycle.
        seconds: No cycle begins after these.

    Returns:
        Per cycle the figures of both under `FIGURES`: seconds a batch, and bytes.
    """
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    pipes, found = [], []
    for arguments in arms:
        ours, theirs = context.Pipe()
        context.Process(target=train, args=(theirs, arguments)).start()
        theirs.close()
        pipes.append(ours)

    def take_turn(pipe: Connection) -> tuple[float, ...]:
        pipe.send(True)
        return pipe.recv()

    for pipe in pipes:  # warm up: allocators, oneDNN's choice of kernels, the first refresh
        take_turn(pipe)
    while time.monotonic() < end or not found:
        # ABBA: a slow drift of the machine falls on both.
        taken = {i: [] for i in range(2)}
        for n in range(turns):
            for i in (0, 1) if (n + len(found)) % 2 else (1, 0):
                taken[i].append(take_turn(pipes[i]))
        columns = [list(zip(*taken[i])) for i in (0, 1)]
        cycle = {name: [sum(of[n]) / (turns * TURN) for of in columns] for n, name in enumerate(FIGURES[:-1])}
        found.append({**cycle, FIGURES[-1]: [of[-1][-1] for of in columns]})
    for pipe in pipes:
        pipe.send(False)
    return found


def ratios(found: list[dict[str, Any]], key: str) -> str:
    """Median and range of the second training's figures over the first one's."""
    pairs = [cycle[key] for cycle in found]
    each = sorted(b / a for a, b in pairs)
    return f"{statistics.median(each):.3f} ({each[0]:.3f} to {each[-1]:.3f})"


def main() -> None:
    """Measure, add to the file, print the medians over the file."""
    from ultralytics.cfg import parse_key_value_pair

    from yolo_sophia.presets import KNOBS
    from yolo_sophia.shapes import generate

    os.environ.setdefault("YOLO_VERBOSE", "false")  # of the trainings; theirs would be in each other's way
    given = dict(map(parse_key_value_pair, sys.argv[1:]))
    imgsz, nbs, seconds = (given.pop(key, default) for key, default in (("imgsz", 160), ("nbs", 16), ("seconds", 200)))
    optimizer, file = given.pop("optimizer", "SophiaG"), given.pop("file", None)
    knobs = {key: given.pop(key) for key in (*KNOBS, "sophia") if key in given}
    turns = math.ceil(knobs.get("hessian_interval", INTERVAL) * max(1, round(nbs / BATCH)) / TURN)
    with tempfile.TemporaryDirectory() as folder:
        root = generate(f"{folder}/shapes", train=640, val=8)
        names = "".join(f"  {i}: c{i}\n" for i in range(6))
        data = Path(folder, "shapes.yaml")
        data.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames:\n{names}")
        same = {"data": str(data), "imgsz": imgsz, "batch": BATCH, "nbs": nbs, "epochs": 1000, "warmup_epochs": 0}
        same |= {
            "val": False,
            "plots": False,
            "save": False,
            "verbose": False,
            "workers": 0,
            "project": folder,
            **given,
        }
        arms = [{**same, **ADAMW, "optimizer": "AdamW", "name": "a"}, {**same, "optimizer": optimizer, "name": "b"}]
        arms[1] |= knobs
        found = cycles(arms, turns, seconds)
    row = {"imgsz": imgsz, "nbs": nbs, "optimizer": optimizer, "arguments": {**given, **knobs}}
    if file:
        with Path(file).open("a") as lines:
            lines.writelines(json.dumps({**row, **cycle}) + "\n" for cycle in found)
        everything = map(json.loads, Path(file).read_text().splitlines())
        found = [cycle for cycle in everything if {key: cycle[key] for key in row} == row]
    import torch

    threads = torch.get_num_threads()
    print(f"{optimizer} {knobs} over AdamW, YOLOv8n, batch {BATCH}, {imgsz} px, nbs {nbs}, {len(found)} cycles of "
          f"{turns * TURN} batches, {threads} threads, torch {torch.__version__}, {platform.machine()}")  # fmt: skip
    print(f"AdamW {statistics.median(cycle['epoch'][0] for cycle in found):.3f} s a batch")
    goal = f"  (goal {TARGETS[nbs]})" if nbs in TARGETS and optimizer == "SophiaG" else ""
    print(f"epoch time  {ratios(found, 'epoch')}{goal}")
    print(f"CPU time    {ratios(found, 'cpu')}; without data loading {ratios(found, 'cpu_without_loading')}")
    print(f"peak memory {ratios(found, 'peak')}; AdamW {max(cycle['peak'][0] for cycle in found) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()

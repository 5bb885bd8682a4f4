"""Epoch time and peak memory of SophiaG (or another optimizer) over AdamW: YOLOv8n, batch 16, alternating trainings.

Usage: python scripts/bench_refresh.py [imgsz=160] [nbs=16] [seconds=150] [optimizer=SophiaG] [file=batches.jsonl]
       [key=value ...]     (other keys: Ultralytics arguments; Sophia's apply to the second training only)

Each training is a process of its own. Only one runs at a time, for two micro-batches. Data loading is included. A
micro-batch belongs to an optimizer step with or without a Hessian update and has a position in it; the time of a cycle
of hessian_interval = 10 is the sum of the medians of these kinds. During the measurement every third step has a Hessian
update, so that a short call sees enough of both; the monitor's sample of every tenth step is not in the medians. Rows
are appended to `file` and read from it, so several short calls make one long measurement. On a machine with other work
the CPU time is more reliable than wall-clock time (OMP_NUM_THREADS=1: idle threads count as work).
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TURN = 2  # micro-batches
BATCH = 16
INTERVAL, MEASURED = 10, 3  # optimizer steps: hessian_interval of the result, and while measuring
TARGETS = {16: 1.05, 64: 1.02}  # by nbs
FIGURES = ("epoch", "cpu", "cpu_without_loading", "peak")
ADAMW = {"lr0": 0.001, "warmup_bias_lr": 0.0}


def train(pipe: Connection, arguments: dict[str, Any]) -> None:
    """Train turn by turn, in a process of its own.

    Args:
        pipe: Gives True for a turn and False for the end; gets a row of `FIGURES` for each micro-batch of the turn.
        arguments: Of the training.
    """
    from ultralytics import YOLO

    marks: dict[str, float] = {}
    rows: list[tuple[float, ...]] = []

    def wait(trainer) -> None:
        if not pipe.recv():
            os._exit(0)  # in the middle of an epoch: nothing of this training is of use
        rows.clear()
        marks.update(clock=time.perf_counter(), cpu=time.process_time())

    def on_batch_start(trainer) -> None:
        marks["loaded"] = time.process_time()

    def on_batch_end(trainer) -> None:
        clock, cpu = time.perf_counter(), time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        rows.append((clock - marks["clock"], cpu - marks["cpu"], cpu - marks["loaded"], peak))
        marks.update(clock=clock, cpu=cpu)
        if len(rows) == TURN:
            pipe.send(rows)
            wait(trainer)

    model = YOLO("yolov8n.yaml")
    for event, callback in (("start", wait), ("batch_start", on_batch_start), ("batch_end", on_batch_end)):
        model.add_callback(f"on_train_{event}", callback)
    model.train(**arguments)


def turns(arms: list[dict[str, Any]], seconds: float) -> Iterator[list[list[tuple[float, ...]]]]:
    """Let both trainings take turns, from their first micro-batch on.

    Args:
        arms: Arguments of both trainings.
        seconds: No turn begins after these.

    Yields:
        For each training the rows of its turn.
    """
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    pipes = []
    for arguments in arms:
        ours, theirs = context.Pipe()
        context.Process(target=train, args=(theirs, arguments)).start()
        theirs.close()
        pipes.append(ours)
    order = (0, 1)
    while time.monotonic() < end:
        taken: list[list[tuple[float, ...]]] = [[], []]
        for i in order:
            pipes[i].send(True)
            taken[i] = pipes[i].recv()
        order = order[::-1]  # ABBA: a slow drift of the machine falls on both
        yield taken
    for pipe in pipes:
        pipe.send(False)


def seconds_a_batch(rows: list[dict[str, Any]], arm: int, name: str, accumulate: int) -> float:
    """Mean over a cycle of `INTERVAL`, made up of the median of each kind of micro-batch.

    Raises:
        ValueError: One of the kinds was not seen: the measurement was too short.
    """
    kinds: dict[tuple[bool, int], list[float]] = {}
    for row in rows:
        step, place = divmod(row["batch"], accumulate)
        if row["arm"] == arm and step > 0:  # the first step warms up: allocators, oneDNN's choice of kernels
            kinds.setdefault((step % MEASURED == 0, place), []).append(row[name])
    if len(kinds) < 2 * accumulate:
        raise ValueError(f"{len(rows)} micro-batches were too few to see a refresh; call it again with more seconds.")
    total = sum(statistics.median(v) * (1 if refresh else INTERVAL - 1) for (refresh, _), v in kinds.items())
    return total / (accumulate * INTERVAL)


def main() -> None:
    """Measure, add to the file, print the medians over the file."""
    from ultralytics.cfg import parse_key_value_pair

    from yolo_sophia.options import OPTIONS
    from yolo_sophia.shapes import generate

    os.environ.setdefault("YOLO_VERBOSE", "false")  # of the trainings; theirs would be in each other's way
    given = dict(map(parse_key_value_pair, sys.argv[1:]))
    imgsz, nbs, seconds = (given.pop(key, default) for key, default in (("imgsz", 160), ("nbs", 16), ("seconds", 150)))
    optimizer, file = given.pop("optimizer", "SophiaG"), given.pop("file", None)
    knobs = {key: given.pop(key) for key in (OPTIONS.keys() | {"sophia"}) - {"hessian_interval"} if key in given}
    knobs.setdefault("hessian_warmup", 0)  # the refreshes of the first steps are not part of a cycle
    knobs["hessian_interval"], accumulate = MEASURED, max(1, round(nbs / BATCH))
    with tempfile.TemporaryDirectory() as folder:
        root = generate(f"{folder}/shapes", train=640, val=8)
        names = "".join(f"  {i}: c{i}\n" for i in range(6))
        data = Path(folder, "shapes.yaml")
        data.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames:\n{names}")
        same = {"data": str(data), "imgsz": imgsz, "batch": BATCH, "nbs": nbs, "epochs": 1000, "warmup_epochs": 0}
        same |= {"val": False, "plots": False, "save": False, "verbose": False, "workers": 0, "project": folder}
        same |= given
        arms = [{**same, **ADAMW, "optimizer": "AdamW", "name": "a"}, {**same, "optimizer": optimizer, "name": "b"}]
        arms[1] |= knobs if optimizer.lower().startswith("sophia") else {}
        key = {"imgsz": imgsz, "nbs": nbs, "optimizer": optimizer, "arguments": {**given, **knobs}}
        file = Path(file or f"{folder}/batches.jsonl")
        for n, taken in enumerate(turns(arms, seconds)):
            with file.open("a") as lines:  # at once: a call that is cut short loses nothing
                for arm, j in itertools.product((0, 1), range(TURN)):
                    row = dict(zip(FIGURES, taken[arm][j]))
                    lines.write(json.dumps({**key, "arm": arm, "batch": n * TURN + j, **row}) + "\n")
        everything = map(json.loads, file.read_text().splitlines())
        rows = [row for row in everything if {name: row[name] for name in key} == key]
    import torch

    print(f"{optimizer} {key['arguments']} over AdamW, YOLOv8n, batch {BATCH}, {imgsz} px, nbs {nbs}")
    refreshes = sum(row["arm"] == 1 and row["batch"] % (MEASURED * accumulate) == 0 < row["batch"] for row in rows)
    print(f"{len(rows)} batches, {refreshes} refreshes, {torch.get_num_threads()} threads, torch {torch.__version__}")
    goals = {"epoch": f"  (goal {TARGETS.get(nbs, '-')})", "peak": "  (goal 1.1)"}
    for name in FIGURES[:-1]:
        theirs, ours = (seconds_a_batch(rows, arm, name, accumulate) for arm in (0, 1))
        print(f"{name:20} {ours / theirs:.3f}  ({theirs:.3f} s a batch with AdamW){goals.get(name, '')}")
    peaks = [max(row["peak"] for row in rows if row["arm"] == arm) for arm in (0, 1)]
    print(f"{'peak':20} {peaks[1] / peaks[0]:.3f}  ({peaks[0] / 2**20:.0f} MiB with AdamW){goals['peak']}")


if __name__ == "__main__":
    main()

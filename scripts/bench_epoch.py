"""Training time of SophiaG over Ultralytics' AdamW, both in one process and in alternation: data loading to EMA.

Usage: python scripts/bench_epoch.py [device=0] [models=yolov8n,yolov8m] [imgsz=160,320,640] [nbs=16,64]
       [amp=False,True] [batch=16] [cycles=12] [optimizer=SophiaG] [file=epoch.jsonl] [key=value ...]
       (other keys: Ultralytics arguments; Sophia's apply to the second training only)

Both trainings run Ultralytics' own loop on generated images, each in a thread; one waits while the other takes a turn
of one cycle: hessian_interval optimizer steps, one of them with a Hessian update. Reported: the median time of a turn
and the median of the ratios of neighbouring turns, without each training's first turn (allocators, compilation). With
a GPU, a turn begins and ends with an idle device, and the peak of its memory over what both hold is given as well.
AdamW is what Ultralytics builds: fused=True on CUDA since 8.4. A row of JSON per combination is appended to `file`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

LISTS = {"models": "yolov8n,yolov8m", "imgsz": "160,320,640", "nbs": "16,64", "amp": "False,True"}
ADAMW = {"optimizer": "AdamW", "lr0": 0.001, "warmup_bias_lr": 0.0}


class Enough(Exception):
    """Ends a training."""


class Arm:
    """A training that runs turn by turn.

    Args:
        arguments: Of the training.
        batches: Micro-batches of a turn.
    """

    def __init__(self, arguments: dict[str, Any], batches: int):
        self._arguments, self._batches = dict(arguments), batches
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._count, self._ends = 0, False
        self._error: BaseException | None = None
        threading.Thread(target=self._train, daemon=True).start()
        self._wait()

    def _train(self) -> None:
        from ultralytics import YOLO

        try:
            model = YOLO(self._arguments.pop("model"))
            model.add_callback("on_train_start", lambda trainer: self._pause())
            model.add_callback("on_train_batch_end", self._on_batch_end)
            model.train(**self._arguments)
        except Enough:
            pass
        except BaseException as error:  # raised again by the turn that waits
            self._error = error
        self._done.release()

    def _on_batch_end(self, _: Any) -> None:
        self._count += 1
        if self._count % self._batches == 0:
            self._pause()

    def _pause(self) -> None:
        self._done.release()
        self._go.acquire()
        if self._ends:
            raise Enough

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def turn(self, on_gpu: bool) -> tuple[float, float]:
        """Seconds of a turn, and MiB that it takes on the device."""
        held = 0
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        self._go.release()
        self._wait()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return seconds, (torch.cuda.max_memory_allocated() - held) / 2**20 if on_gpu else math.nan

    def end(self) -> None:
        """End the training."""
        self._ends = True
        self._go.release()
        self._wait()


def measure(adamw: dict[str, Any], sophia: dict[str, Any], batches: int, cycles: int, on_gpu: bool) -> dict[str, float]:
    """Alternate, in the order ABBA; see the module.

    Args:
        adamw: Arguments of the one training.
        sophia: Of the other.
        batches: Micro-batches of a turn.
        cycles: Turns of each that count.
        on_gpu: Whether they run on a GPU.
    """
    arms = [Arm(arguments, batches) for arguments in (adamw, sophia)]
    taken: list[list[tuple[float, float]]] = [[], []]
    for cycle in range(cycles + 1):
        for i in (0, 1) if cycle % 2 else (1, 0):
            taken[i].append(arms[i].turn(on_gpu))
    for arm in arms:
        arm.end()
    seconds, memory = ([[turn[k] for turn in turns[1:]] for turns in taken] for k in (0, 1))
    ratios = sorted(ours / theirs for theirs, ours in zip(*seconds))
    theirs, ours = (1e3 * statistics.median(s) / batches for s in seconds)
    figures = {"adamw_ms": theirs, "ours_ms": ours, "ratio": statistics.median(ratios), "low": ratios[0]}
    figures |= {"high": ratios[-1], "adamw_mib": max(memory[0]), "ours_mib": max(memory[1])}
    return {key: None if math.isnan(value) else round(value, 4) for key, value in figures.items()}


def main() -> None:
    """Measure every combination; print a Markdown table."""
    os.environ.setdefault("YOLO_VERBOSE", "false")  # of the trainings; read when Ultralytics is imported
    import ultralytics
    from ultralytics.cfg import parse_key_value_pair

    from yolo_sophia.options import OPTIONS
    from yolo_sophia.shapes import generate

    words = dict(word.split("=", 1) for word in sys.argv[1:])
    lists = [words.pop(key, default).split(",") for key, default in LISTS.items()]
    given = dict(parse_key_value_pair(f"{key}={value}") for key, value in words.items())
    batch, cycles, file = (given.pop(k, v) for k, v in (("batch", 16), ("cycles", 12), ("file", None)))
    optimizer = given.pop("optimizer", "SophiaG")
    own = {key: given.pop(key) for key in (*OPTIONS, "sophia") if key in given}
    own = {"hessian_interval": 10, "hessian_warmup": 0, **own, "optimizer": optimizer}
    device = given.setdefault("device", 0 if torch.cuda.is_available() else "cpu")
    on_gpu = str(device) != "cpu"
    place = torch.cuda.get_device_name(int(device)) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{optimizer} {own}, {place}, torch {torch.__version__}, Ultralytics {ultralytics.__version__}\n")
    print(
        "| model | px | nbs | AMP | AdamW, ms per batch | ours | ratio (range) | MiB over AdamW |\n" + "|---" * 8 + "|"
    )
    # The check of AMP would download a model.
    with tempfile.TemporaryDirectory() as folder, mock.patch("ultralytics.engine.trainer.check_amp", lambda _: True):
        root = generate(f"{folder}/shapes", train=40 * batch, val=8)
        data = Path(folder, "shapes.yaml")
        data.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [a, b, c, d, e, f]\n")
        for model, imgsz, nbs, amp in itertools.product(*lists):
            same = {"model": f"{model}.yaml", "imgsz": int(imgsz), "nbs": int(nbs), "amp": amp == "True"}
            same |= {"data": str(data), "batch": batch, "epochs": 1000, "warmup_epochs": 0, "val": False}
            same |= {"plots": False, "save": False, "verbose": False, "project": folder, **given}
            batches = own["hessian_interval"] * max(1, round(int(nbs) / batch))
            arms = ({**same, **ADAMW, "name": "adamw"}, {**same, **own, "name": "ours"})
            found = measure(*arms, batches, cycles, on_gpu)
            more = found["ours_mib"] - found["adamw_mib"] if on_gpu else math.nan
            print(
                f"| {model} | {imgsz} | {nbs} | {amp} | {found['adamw_ms']:.2f} | {found['ours_ms']:.2f} | "
                f"{found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f}) | {more:.1f} |",
                flush=True,
            )
            if file:
                key = {"model": model, "imgsz": int(imgsz), "nbs": int(nbs), "amp": amp == "True", "batch": batch}
                key |= {"arguments": own, "place": place, "torch": torch.__version__, "cycles": cycles}
                with Path(file).open("a") as rows:
                    rows.write(json.dumps({**key, "ultralytics": ultralytics.__version__, **found}) + "\n")


if __name__ == "__main__":
    main()

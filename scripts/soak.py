"""Train a tiny model for thousands of steps and check that nothing grows: memory, file handles, objects, time.

    python scripts/soak.py [steps=3000] [output=FOLDER] [key=value of yolo train]...

A fresh process trains on generated shapes, with a Hessian update in every tenth step (in each of the first steps), and
a checkpoint and a validation per epoch. Once per epoch it appends a line to `soak.jsonl`: steps, resident memory, open
file handles, live Python objects, tensors and state entries, median processor time of a step. It prints the means and
the slopes after the first quarter with their standard errors (least squares over means of blocks of epochs, because
neighbours are correlated). The exit code is 1 if a slope is positive by more than three standard errors and by more
than an allowance over the whole run. optimizer=AdamW shows what is due to Ultralytics itself.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from verify_bit_identity import run_child, split

DEFAULTS = {"imgsz": "64", "batch": "8", "nbs": "8", "device": "cpu", "plots": "False", "workers": "0", "val": "True"}
IMAGES = 400
STEPS_PER_EPOCH = IMAGES // 8
RECORD = "soak.jsonl"
BLOCKS = 8
ALLOWED = {"rss_mib": 16.0, "handles": 0.5, "objects": 500.0, "tensors": 0.5, "state": 0.5, "step_ms": 2.0}
"""What may be gained over the whole run before a slope is called growth: pages that the allocator keeps, the epochs'
rows of results that Ultralytics and the loggers hold, and noise of a shared machine."""


def main(arguments: list[str]) -> int:
    """Print the table; 1 if anything grows."""
    if arguments[:1] == ["--train"]:
        train(arguments[1:])
        return 0
    options = split(arguments)
    steps = int(options.pop("steps", "3000"))
    output = Path(options.pop("output", "") or tempfile.mkdtemp(prefix="soak-")).resolve()
    output.mkdir(parents=True, exist_ok=True)
    if "model" not in options or "data" not in options:
        options = {"model": str(tiny_model(output)), "data": str(data(output))} | options
    epochs = -(-steps // STEPS_PER_EPOCH)
    options = DEFAULTS | {"epochs": str(epochs), "optimizer": "SophiaG"} | options
    if options["optimizer"].startswith("Sophia"):
        options.setdefault("hessian_interval", "10")
    options |= {"project": str(output), "name": "run", "exist_ok": "True"}
    run_child(__file__, ["--train", *(f"{k}={v}" for k, v in options.items())], output / "log.txt")
    return report(output / "run" / RECORD)


def data(output: Path) -> Path:
    """data.yaml of generated shapes."""
    from yolo_sophia.shapes import NAMES, generate

    root = generate(output / "shapes", train=IMAGES, val=32, size=64)
    path = output / "shapes.yaml"
    path.write_text(json.dumps({"path": str(root), "train": "images/train", "val": "images/val", "names": list(NAMES)}))
    return path


def tiny_model(output: Path) -> Path:
    """YAML of a YOLOv8 with the real head and loss and 1/16 of the width."""
    import yaml
    from ultralytics.utils import ROOT

    content = yaml.safe_load((ROOT / "cfg/models/v8/yolov8.yaml").read_text())
    path = output / "yolov8n-tiny.yaml"
    path.write_text(yaml.safe_dump(content | {"scales": {"n": [0.33, 0.0625, 256]}, "nc": 6}))
    return path


def train(arguments: list[str]) -> None:
    """In the child: train, and write a line at the end of each epoch."""
    import psutil
    import torch
    from ultralytics import YOLO
    from ultralytics.cfg import parse_key_value_pair

    torch.set_num_threads(1)
    process, seconds, mark = psutil.Process(), [], [0.0]

    def batch_start(trainer: Any) -> None:
        mark[0] = time.process_time()  # others use the machine as well

    def batch_end(trainer: Any) -> None:
        seconds.append(time.process_time() - mark[0])

    def epoch_end(trainer: Any) -> None:
        if len(seconds) < STEPS_PER_EPOCH:  # the event comes once more after the final validation
            return
        gc.collect()
        objects = gc.get_objects()
        optimizer = trainer.optimizer
        row = {
            "steps": int(next(iter(optimizer.state.values()))["step"]),
            "refreshes": optimizer.param_groups[0].get("hessian_updates", 0),
            "dropped": optimizer.param_groups[0].get("hessian_dropped", 0),
            "rss_mib": process.memory_info().rss / 2**20,
            "handles": process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
            "objects": len(objects),
            "tensors": sum(issubclass(type(o), torch.Tensor) for o in objects),
            "state": sum(map(len, optimizer.state.values())) + sum(map(len, optimizer.param_groups)),
            "step_ms": 1e3 * statistics.median(seconds),
        }
        del objects
        seconds.clear()
        with (trainer.save_dir / RECORD).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    options = dict(map(parse_key_value_pair, arguments))
    model = YOLO(options.pop("model"))
    model.add_callback("on_train_batch_start", batch_start)
    model.add_callback("on_train_batch_end", batch_end)
    model.add_callback("on_fit_epoch_end", epoch_end)
    model.train(**options)


def slope(x: list[float], y: list[float]) -> tuple[float, float]:
    """Least-squares slope over means of `BLOCKS` blocks of neighbours, and its standard error."""
    size = len(x) // BLOCKS
    x, y = ([statistics.fmean(v[i * size : (i + 1) * size]) for i in range(BLOCKS)] for v in (x, y))
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    squares = sum((a - mean_x) ** 2 for a in x)
    found = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / squares
    rest = sum((b - mean_y - found * (a - mean_x)) ** 2 for a, b in zip(x, y))
    return found, (rest / (len(x) - 2) / squares) ** 0.5


def report(record: Path) -> int:
    """Print means and slopes; 1 if anything grows."""
    rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    last, kept = rows[-1], rows[len(rows) // 4 :]
    if len(kept) < BLOCKS:
        sys.exit(f"{len(rows)} epochs are too few for a slope: take at least steps={2 * BLOCKS * STEPS_PER_EPOCH}")
    print(
        f"{last['steps']} steps, {last['refreshes']} Hessian updates, {last['dropped']} dropped; "
        f"{platform.machine()}, {os.cpu_count()} processors, {time.strftime('%Y-%m-%d')}"
    )
    good, steps = True, [row["steps"] for row in kept]
    for name, allowed in ALLOWED.items():
        values = [row[name] for row in kept]
        found, error = slope(steps, values)
        gained = found * last["steps"]
        grows = found > 3 * error and gained > allowed
        good &= not grows
        print(
            f"{name}: mean {statistics.fmean(values):.2f}, first {values[0]:.2f}, last {values[-1]:.2f}, "
            f"slope {1e3 * found:+.3f} +- {1e3 * error:.3f} per 1000 steps{'  GROWS' if grows else ''}"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

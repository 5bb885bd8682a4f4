"""One training in a process of its own: `python -m yolo_sophia.runs.worker FOLDER`.

The folder has all state. `run.json` is the order, `curve.jsonl` has one line per finished epoch, `checkpoint.pt` is the
last intact checkpoint, and `result.json` is the receipt, written last: without it the run is not finished, and is
resumed from its checkpoint. The process that trains holds the lock of the folder, and ends when its parent does.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil  # a dependency of Ultralytics

from yolo_sophia.atomic import atomic_copy, atomic_write, remove_leftovers
from yolo_sophia.runs.run import Run

CURVE, RECEIPT, ORDER, CHECKPOINT, TRAINING = "curve.jsonl", "result.json", "run.json", "checkpoint.pt", "train"
LOG, FAILURE = "log.txt", "failure.txt"
BUSY = 75
"""Exit code where another process trains in this folder (EX_TEMPFAIL)."""


def write_order(folder: Path, run: Run, threads: int) -> None:
    """Write what the worker is to train, and with how many threads."""
    arguments = dict(run.arguments)
    tuples = [key for key, value in arguments.items() if isinstance(value, tuple)]  # JSON has lists only
    order = {**vars(run), "arguments": arguments, "threads": threads, **({"tuples": tuples} if tuples else {})}
    atomic_write(folder / ORDER, json.dumps(order, indent=1))


def read_order(folder: Path) -> dict[str, Any]:
    """Read the order of a folder."""
    order = json.loads((folder / ORDER).read_text(encoding="utf-8"))
    order["arguments"] |= {key: tuple(order["arguments"][key]) for key in order.get("tuples", ())}
    return order


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """The finished epochs, each once, in order; a line that was cut off is left out."""
    rows: dict[int, dict[str, Any]] = {}
    path = folder / CURVE
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row["epoch"]] = row  # an epoch that was trained again after a cut counts as it was the last time
    return [rows[epoch] for epoch in sorted(rows)]


class Recorder:
    """Counts steps, images and training seconds, and writes a line per epoch into the run's folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.steps = self.images = self._epoch_images = 0
        self.seconds = self._mark = 0.0
        self._save_metrics: Any = None
        self._parent = psutil.Process(os.getppid())

    def on_train_start(self, trainer: Any) -> None:
        """Restore the counters of the last checkpoint, and count from there."""
        done = [row for row in read_curve(self.folder) if row["epoch"] <= trainer.start_epoch]
        atomic_write(self.folder / CURVE, "".join(json.dumps(row) + "\n" for row in done))
        if done:
            self.steps, self.images, self.seconds = (done[-1][key] for key in ("steps", "images", "seconds"))
        trainer.optimizer.register_step_post_hook(self._count_step)
        self._save_metrics = trainer.save_metrics
        trainer.save_metrics = lambda metrics: self._write_row(trainer, metrics)

    def _count_step(self, *_: Any) -> None:
        self.steps += 1

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Start the clock: validation and checkpoints are not counted."""
        self._mark, self._epoch_images = time.perf_counter(), 0  # out of memory: the epoch starts again

    def on_train_batch_end(self, trainer: Any) -> None:
        """Count images; the last batch of an epoch may be short."""
        # An orphan gets another parent; on Windows it keeps the number of the one that is gone.
        if os.getppid() != self._parent.pid or not self._parent.is_running():
            raise SystemExit("the process that ordered this training is gone")
        epoch_images = len(trainer.train_loader.dataset)
        self.images += min(trainer.batch_size, epoch_images - self._epoch_images)
        self._epoch_images = min(self._epoch_images + trainer.batch_size, epoch_images)

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self._mark

    def _write_row(self, trainer: Any, metrics: dict[str, Any]) -> None:
        """Write the epoch's line before its checkpoint: a checkpoint without its line would lose the counts."""
        self._save_metrics(metrics)
        row = {
            "epoch": trainer.epoch + 1,
            "steps": self.steps,
            "images": self.images,
            "seconds": round(self.seconds, 3),
            **{key: _plain(value) for key, value in {**metrics, **trainer.metrics}.items()},
        }
        with (self.folder / CURVE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def on_model_save(self, trainer: Any) -> None:
        """Keep an intact checkpoint: Ultralytics writes last.pt in place, and a kill may cut it.

        None of the last epoch: Ultralytics refuses to resume a training that has none left, and a kill between it and
        the receipt would leave a run that can never finish.
        """
        if trainer.stop:
            return
        atomic_copy(trainer.last, self.folder / CHECKPOINT)


def _plain(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def train(folder: Path) -> dict[str, Any]:
    """Train what the folder orders, or what is left of it; returns the receipt."""
    recorder = Recorder(folder)  # before the slow imports: it remembers the parent, which may be gone after them
    from yolo_sophia.integration.run import run_training

    order = read_order(folder)
    checkpoint = folder / CHECKPOINT
    remove_leftovers(checkpoint)
    resume = checkpoint if checkpoint.is_file() and not order.get("restart") else None
    if resume and not is_intact(checkpoint):
        sys.stderr.write(f"{checkpoint} is damaged and cannot be resumed from: this training starts again.\n")
        resume = None
    if resume is None:
        (folder / CURVE).unlink(missing_ok=True)
    for weights in (folder / TRAINING / "weights").glob("*.pt") if resume else ():
        if not is_intact(weights):  # cut as it was written; best.pt is read at the end, whether new or old
            shutil.copyfile(checkpoint, weights)
    events = ("train_start", "train_epoch_start", "train_batch_end", "train_epoch_end", "model_save")
    fixed = {"project": str(folder.resolve()), "name": TRAINING, "exist_ok": True}
    started = time.time()
    facts = run_training(
        {"plots": False, "verbose": False, **order["arguments"], **fixed},
        resume=resume,
        callbacks={f"on_{event}": getattr(recorder, f"on_{event}") for event in events},
        bn_recalibrate=order["bn_recalibrate"],
        threads=int(order.get("threads") or 0),
    )
    receipt = {
        "key": order["key"],
        "epochs": len(read_curve(folder)),
        "wall_seconds": round(time.time() - started, 1),
        **facts,
        "versions": _versions(),
    }
    atomic_write(folder / RECEIPT, json.dumps(receipt, indent=1, default=str))
    checkpoint.unlink(missing_ok=True)
    return receipt


def is_intact(checkpoint: Path) -> bool:
    """Whether a file that torch saved can be read to its end, with the sums that it holds; nothing is unpickled."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError):
        return False


def _versions() -> dict[str, str]:
    from importlib import metadata

    names = ("yolo-sophia", "ultralytics", "torch", "numpy")
    return {name: metadata.version(name) for name in names} | {"python": sys.version.split()[0]}


def main(folder: Path) -> int:
    """Train in a folder unless another process does."""
    from filelock import FileLock, Timeout  # a dependency of torch

    try:
        with FileLock(folder / ".lock", timeout=0):
            if not (folder / RECEIPT).is_file():
                train(folder)
    except Timeout:
        return BUSY
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

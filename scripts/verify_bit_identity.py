"""Check that this package does not affect other optimizers: the same trainings with and without it, bit for bit.

    python scripts/verify_bit_identity.py [optimizers=SGD,AdamW,MuSGD,auto] [output=FOLDER] [key=value of yolo train]...

Two fresh interpreters train the same optimizers, one with the hooks active, one with YOLO_SOPHIA_AUTOLOAD=0. The script
compares the float32 weights and averaged weights, all tensors of the optimizer and of last.pt, results.csv except for
its time, and args.yaml except for paths. The exit code is 1 if anything differs. Without `data` the generated shapes of
configs/data are used.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIMIZERS = "SGD,AdamW,MuSGD,auto"
DEFAULTS = {
    "model": "yolov8n.yaml",
    "data": str(Path(__file__).parents[1] / "configs" / "data" / "shapes.yaml"),
    "imgsz": "160",
    "epochs": "2",
    "device": "cpu",
    "plots": "False",
}
PATHS = ("project", "save_dir")


def main(arguments: list[str]) -> int:
    """Print one line per optimizer; 1 if anything differs."""
    if arguments[:1] == ["--train"]:
        train(arguments[1:])
        return 0
    options = DEFAULTS | split(arguments)
    optimizers = options.pop("optimizers", OPTIMIZERS).split(",")
    output = Path(options.pop("output", "") or tempfile.mkdtemp(prefix="bit-identity-")).resolve()
    for side, autoload in (("with", "1"), ("without", "0")):
        run_child(
            __file__,
            ["--train", ",".join(optimizers), *(f"{k}={v}" for k, v in options.items()), f"project={output / side}"],
            output / f"{side}.log",
            YOLO_SOPHIA_AUTOLOAD=autoload,
        )
    good = True
    for name in optimizers:
        tensors, difference = compare(output / "with" / name, output / "without" / name)
        same_csv = results(output / "with" / name) == results(output / "without" / name)
        same_args = settings(output / "with" / name) == settings(output / "without" / name)
        good &= difference == 0 and same_csv and same_args
        print(
            f"{name}: max abs difference {difference:g} over {tensors} tensors, "
            f"results.csv {'equal' if same_csv else 'DIFFERS'}, args.yaml {'equal' if same_args else 'DIFFERS'}"
        )
    return 0 if good else 1


def train(arguments: list[str]) -> None:
    """In the child: train each optimizer in turn, and keep what is in memory at the end."""
    import torch
    from ultralytics import YOLO
    from ultralytics.cfg import parse_key_value_pair

    autoload = sys.modules.get("yolo_sophia.autoload")
    hooked = autoload is not None and autoload.installed()
    if hooked != (os.environ["YOLO_SOPHIA_AUTOLOAD"] == "1"):
        raise SystemExit(f"the hooks are {'set' if hooked else 'not set'}, against YOLO_SOPHIA_AUTOLOAD")

    def keep(trainer: Any) -> None:
        kept = {
            "model": trainer.model.state_dict(),
            "ema": trainer.ema.ema.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
        }
        torch.save(kept, trainer.save_dir / "memory.pt")

    options = dict(map(parse_key_value_pair, arguments[1:]))
    for name in arguments[0].split(","):
        model = YOLO(options["model"])
        model.add_callback("on_train_end", keep)
        model.train(**{k: v for k, v in options.items() if k != "model"}, optimizer=name, name=name)


def split(arguments: list[str]) -> dict[str, str]:
    """Take `key=value` words apart."""
    return dict(word.split("=", 1) for word in arguments)


def run_child(script: str, arguments: list[str], log: Path, expect: int = 0, **environment: str) -> None:
    """Run a script in a fresh interpreter, its output in a file; end this one where it does not end as expected."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, script, *arguments], stdout=file, stderr=file, env={**os.environ, **environment}
        ).returncode
    if code != expect:
        raise SystemExit(f"the training ended with code {code}, expected {expect}: {log}\n{log.read_text()[-2000:]}")


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts and lists with their paths."""
    if isinstance(tree, dict):
        tree = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        tree = list(enumerate(tree))
    else:
        yield path, tree
        return
    for key, value in tree:
        yield from flat(value, f"{path}/{key}")


def largest_difference(one: Any, other: Any) -> tuple[int, float]:
    """Number of tensors in two nested states, and their largest absolute difference; inf where other things differ."""
    import torch

    one, other, tensors, largest = dict(flat(one)), dict(flat(other)), 0, 0.0
    if one.keys() != other.keys():
        return 0, float("inf")
    for key, a in one.items():
        b = other[key]
        if not isinstance(a, torch.Tensor):
            largest = largest if a == b else float("inf")
            continue
        tensors += 1
        if a.dtype != b.dtype or a.shape != b.shape:
            largest = float("inf")
        elif not torch.equal(a, b):
            largest = max(largest, (a.double() - b.double()).abs().max().nan_to_num(float("inf")).item())
    return tensors, largest


def compare(one: Path, other: Path) -> tuple[int, float]:
    """Compare the tensors of two run folders: what `train` kept, and last.pt."""
    from ultralytics.utils.patches import torch_load

    def tensors(folder: Path) -> dict[str, Any]:
        last = torch_load(folder / "weights" / "last.pt", map_location="cpu")
        memory = torch_load(folder / "memory.pt", map_location="cpu")
        return {"last": (last.get("ema") or last["model"]).state_dict(), **memory}

    return largest_difference(tensors(one), tensors(other))


def results(folder: Path) -> list[dict[str, str]]:
    """Rows of results.csv without the time."""
    with (folder / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k.strip() != "time"} for row in csv.DictReader(file)]


def settings(folder: Path) -> list[str]:
    """Lines of args.yaml but for paths."""
    lines = (folder / "args.yaml").read_text().splitlines()
    return [line for line in lines if line.partition(":")[0] not in PATHS]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Check that a killed SophiaG training resumes with exactly its state: momentum, curvature, counters and settings.

    python scripts/verify_resume.py [output=FOLDER] [key=value of yolo train]...

A fresh interpreter trains and is killed right after the first epoch's last.pt is written. Two others resume from that
file with no other argument than `resume`. The script compares bit for bit the optimizer's state in memory when the file
was written, the state in the file, the state after loading, and the final states of the two resumed runs. The exit code
is 1 if anything differs. Without `data` the generated shapes of configs/data are used.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from verify_bit_identity import DEFAULTS, largest_difference, run_child, split

KILLED = 9
CLOCK = ("rho", "hessian_interval", "hessian_age", "refresh_index", "hessian_updates", "hessian_dropped")


def main(arguments: list[str]) -> int:
    """Print what was compared; 1 if anything differs."""
    if arguments[:1] == ["--train"]:
        train(arguments[1:])
        return 0
    if arguments[:1] == ["--resume"]:
        resume(Path(arguments[1]), Path(arguments[2]))
        return 0
    options = DEFAULTS | {"epochs": "3", "optimizer": "SophiaG"} | split(arguments)
    output = Path(options.pop("output", "") or tempfile.mkdtemp(prefix="resume-")).resolve()
    options |= {"project": str(output), "name": "run"}
    run_child(__file__, ["--train", *(f"{k}={v}" for k, v in options.items())], output / "killed.log", expect=KILLED)
    shutil.copytree(output / "run", output / "killed")
    for name in ("first", "second"):  # both in the folder that the checkpoint names, put back as it was
        shutil.rmtree(output / "run")
        shutil.copytree(output / "killed", output / "run")
        run_child(
            __file__,
            ["--resume", str(output / "run" / "weights" / "last.pt"), str(output / f"{name}.pt")],
            output / f"{name}.log",
        )
    return report(output)


def train(arguments: list[str]) -> None:
    """In the child: train, keep the optimizer's state as it is in memory at the first save, and die."""
    import torch
    from ultralytics import YOLO
    from ultralytics.cfg import parse_key_value_pair

    def die(trainer: Any) -> None:
        torch.save(trainer.optimizer.state_dict(), trainer.save_dir / "memory.pt")
        sys.stdout.flush()
        os._exit(KILLED)

    options = dict(map(parse_key_value_pair, arguments))
    model = YOLO(options.pop("model"))
    model.add_callback("on_model_save", die)
    model.train(**options)


def resume(last: Path, target: Path) -> None:
    """In the child: resume, and keep the optimizer's state as loaded and the state at the end."""
    from copy import deepcopy

    import torch
    from ultralytics import YOLO

    kept: dict[str, Any] = {}

    def loaded(trainer: Any) -> None:
        kept["loaded"] = deepcopy(trainer.optimizer.state_dict())

    def end(trainer: Any) -> None:
        kept["end"] = {
            "optimizer": trainer.optimizer.state_dict(),
            "model": trainer.model.state_dict(),
            "ema": trainer.ema.ema.state_dict(),
        }

    model = YOLO(last)
    model.add_callback("on_pretrain_routine_end", loaded)  # Ultralytics has just loaded, and not stepped yet
    model.add_callback("on_train_end", end)
    model.train(resume=True)
    torch.save(kept, target)


def report(output: Path) -> int:
    """Compare the states that the children left."""
    from ultralytics.utils.patches import torch_load

    memory = torch_load(output / "killed" / "memory.pt", map_location="cpu")
    saved = torch_load(output / "killed" / "weights" / "last.pt", map_location="cpu")["optimizer"]
    first, second = (torch_load(output / f"{name}.pt", map_location="cpu") for name in ("first", "second"))
    for state in (memory, saved, first["loaded"], second["loaded"]):
        for group in state["param_groups"]:
            group.pop("fused", None)  # Ultralytics adds this key as it loads
    good = True
    for title, one, other in (
        ("last.pt equals memory", memory, saved),
        ("optimizer state equal", saved, first["loaded"]),
        ("optimizer state equal", saved, second["loaded"]),
        ("two resumed runs end alike", first["end"], second["end"]),
    ):
        tensors, difference = largest_difference(one, other)
        good &= tensors > 0 and difference == 0
        print(f"{title}: {tensors} tensors, max abs diff {difference:g}")
    for title, state in (("saved", saved), ("loaded", first["loaded"]), ("end", first["end"]["optimizer"])):
        group = state["param_groups"][0]
        print(f"{title}: " + ", ".join(f"{key}={group[key]}" for key in CLOCK))
    kinds = {str(state["hessian"].dtype) for state in saved["state"].values()}
    print(f"h in last.pt: {', '.join(sorted(kinds))}")
    return 0 if good and kinds == {"torch.float32"} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

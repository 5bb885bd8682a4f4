"""The study behind the first preset: bccd fine-tuning and generated shapes from scratch, and three variants.

Variants are changes to the product made here for the measurement only: what CIoU adds to h (none, or a random sign
times its gradient, instead of its positive semi-definite Hessian), and Ultralytics' norm clip at 10 put back.

Each run is a process with one thread and a folder of its own; finished ones are not repeated.

Usage:
    python scripts/study_first_preset.py DATA_FOLDER OUTPUT [--workers 2] [--only SUBSTRING]
    DATA_FOLDER holds bccd/data.yaml and weights/yolov8n-dequantised.pt
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOPHIA = {"optimizer": "SophiaG", "lr0": 0.001, "beta2": 0.99, "hessian_interval": 10, "rho": 0.1, "momentum": 0.9}
SOPHIA |= {"weight_decay": 0.0005, "warmup_bias_lr": 0.0}
ADAMW = {"optimizer": "AdamW", "lr0": 0.00143, "warmup_bias_lr": 0.0}
FINE = {"imgsz": 192, "epochs": 15, "batch": 16, "nbs": 16}
SHAPES = {"imgsz": 160, "epochs": 12, "batch": 16, "nbs": 16}


def plan() -> dict[str, dict]:
    """Arguments of every run by its name; `variant` is taken out before Ultralytics sees them."""
    runs: dict[str, dict] = {}
    for seed in range(3):
        runs[f"bccd-adamw-s{seed}"] = {**FINE, **ADAMW, "seed": seed}
        runs[f"bccd-rho0.1-s{seed}"] = {**FINE, **SOPHIA, "seed": seed}
    for rho in (0.02, 0.05, 0.25):
        runs[f"bccd-rho{rho}"] = {**FINE, **SOPHIA, "rho": rho}
    for rho in (0.02, 0.1, 0.5):
        runs[f"bccd-rho{rho}-b2.95-k5"] = {**FINE, **SOPHIA, "rho": rho, "beta2": 0.95, "hessian_interval": 5}
    runs["bccd-rho0.5-b2.95-k2"] = {**FINE, **SOPHIA, "rho": 0.5, "beta2": 0.95, "hessian_interval": 2}
    runs["bccd-lr0.0015"] = {**FINE, **SOPHIA, "lr0": 0.0015}
    for variant in ("ciou-none", "ciou-sign", "norm-clip"):
        runs[f"bccd-{variant}"] = {**FINE, **SOPHIA, "variant": variant}
    runs["shapes-adamw"] = {**SHAPES, **ADAMW, "lr0": 0.002}
    for rho, lr in ((0.1, 0.001), (0.1, 0.002), (0.05, 0.001), (0.02, 0.002)):
        runs[f"shapes-rho{rho}-lr{lr}"] = {**SHAPES, **SOPHIA, "rho": rho, "lr0": lr}
    return runs


def apply_variant(name: str, model) -> None:
    """Change the product for one measurement."""
    import types

    import torch
    from ultralytics.engine.trainer import BaseTrainer

    from yolo_sophia.curvature import Quadratic
    from yolo_sophia.integration.criteria import DetectionTap

    original = DetectionTap.terms
    if name == "norm-clip":

        def put_back(trainer):
            trainer.optimizer_step = types.MethodType(BaseTrainer.optimizer_step, trainer)

        model.add_callback("on_train_start", put_back)
    elif name == "ciou-none":
        DetectionTap.terms = lambda self: [t for t in original(self) if not isinstance(t, Quadratic)]
    elif name == "ciou-sign":

        class Sign(Quadratic):
            def sampled(self, generator):
                sign = torch.randint(0, 2, self.gradient.shape[:-1] + (1,), generator=generator) * 2 - 1
                return self.gradient * sign

        def terms(self):
            return [Sign(t.output, t.root, t.gradient) if isinstance(t, Quadratic) else t for t in original(self)]

        DetectionTap.terms = terms
    else:
        raise ValueError(f"no variant {name!r}")


def train(name: str, data: Path, output: Path) -> None:
    """Run one training in this process."""
    import torch

    torch.set_num_threads(1)
    from ultralytics import YOLO

    arguments = {"plots": False, "verbose": False, "exist_ok": True, **plan()[name]}
    variant = arguments.pop("variant", None)
    bccd = name.startswith("bccd")
    arguments["data"] = str(data / "bccd/data.yaml" if bccd else ROOT / "configs/data/shapes.yaml")
    model = YOLO(str(data / "weights/yolov8n-dequantised.pt") if bccd else "yolov8n.yaml")
    if variant:
        apply_variant(variant, model)
    model.train(**arguments, project=str(output), name=name)
    (output / name / "finished").write_text(json.dumps(plan()[name]))


def table(output: Path) -> str:
    """What the finished runs ended with, as a Markdown table."""
    rows = ["| run | mAP50-95 after epochs 3 / 8 / last | last train loss | clip fraction, first -> last | s/epoch |"]
    rows.append("|---|---|---|---|---|")
    for name in plan():
        if not (output / name / "finished").exists():
            continue
        with (output / name / "results.csv").open() as file:
            run = [{k.strip(): float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        score = [row["metrics/mAP50-95(B)"] for row in run]
        loss = sum(run[-1][f"train/{part}_loss"] for part in ("box", "cls", "dfl"))
        clip = [row.get("sophia/clip_fraction") for row in run]
        shown = f"{clip[0]:.2f} -> {clip[-1]:.2f}" if clip[0] is not None else ""
        seconds = run[-1]["time"] / len(run)
        rows.append(
            f"| {name} | {score[2]:.3f} / {score[7]:.3f} / **{score[-1]:.3f}** | {loss:.3f} | {shown} | {seconds:.1f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="run the names that contain this")
    parser.add_argument("--one", help="run this one in this process")
    options = parser.parse_args()
    data, output = options.data.resolve(), options.output.resolve()
    if options.one:
        train(options.one, data, output)
        return
    output.mkdir(parents=True, exist_ok=True)
    missing = [name for name in plan() if options.only in name and not (output / name / "finished").exists()]

    def run(name: str) -> None:
        command = [sys.executable, __file__, str(data), str(output), "--one", name]
        with (output / f"{name}.log").open("w") as log:
            code = subprocess.run(
                command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            ).returncode
        print(f"{name}: {'finished' if code == 0 else f'failed, see {output / name}.log'}", flush=True)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(run, missing))
    print(table(output))


if __name__ == "__main__":
    main()

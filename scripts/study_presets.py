"""The search behind the presets of 2026-11-26: SophiaG and AdamW with the same optional parts, on small trainings.

The parts that the product has are arguments of it by now; those that lost exist only here: `per_tensor` (a rho for each
tensor), `root` (the root of h), `floor` (h is at least this share of its tensor's mean), `nesterov`, `ema_span` (a
longer average of the weights), and AdamW's own `cautious` mask, rescaled as in arXiv 2411.16085.

Usage: python scripts/study_presets.py search.csv DATA_FOLDER OUT [rows=0,5,7]
search.csv is the record (docs/studies/2026-11-26-presets): a row for each run with its settings and its result. Rows
are trained again, one after the other, on one thread, and printed beside the record.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yolo_sophia import install
from yolo_sophia.optim import SophiaG

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "docs/studies/2026-11-26-presets"
COMMON = {
    "batch": 16,
    "nbs": 16,
    "cache": "ram",
    "workers": 0,
    "plots": False,
    "verbose": False,
    "val": False,
    "seed": 0,
}
ARMS = {
    "adamw": {"optimizer": "AdamW", "warmup_bias_lr": 0.0},
    "labadamw": {"optimizer": "study_presets.AdamWithParts", "momentum": 0.9, "warmup_bias_lr": 0.0},
    "sophia": {  # every setting that a preset could bring is named
        "optimizer": "SophiaG",
        "sophia": "published",
        "rho": 0.1,
        "beta2": 0.95,
        "hessian_interval": 10,
        "hessian_fraction": 1.0,
        "momentum": 0.9,
        "weight_decay": 0.0005,
        "warmup_bias_lr": 0.0,
        "warmup_epochs": 3.0,
        "bn_momentum": 0.03,
    },
}
PARTS: dict[str, Any] = {}
"""The parts of the run that is trained."""


def sets(data: Path) -> dict[str, dict[str, Any]]:
    """The small trainings by name; `coco` needs what scripts/fresh_head.py makes of the weights, in the data folder."""
    weights = str(data / "weights/yolov8n-dequantised.pt")
    return {
        "bccd": {"model": weights, "data": str(data / "bccd/data.yaml"), "imgsz": 128, "epochs": 10},
        "cards": {"model": weights, "data": str(data / "cards/data.yaml"), "imgsz": 128, "epochs": 8},
        "cocop": {"model": weights, "data": str(data / "coco_open/data.yaml"), "imgsz": 160, "epochs": 3},
        "coco": {"model": str(data / "fresh.pt"), "data": str(data / "coco_open/data.yaml"), "imgsz": 160, "epochs": 4},
        "shapes": {
            "model": str(STUDY / "yolov8n-narrow.yaml"),
            "data": str(ROOT / "configs/data/shapes.yaml"),
            "imgsz": 96,
            "epochs": 24,
        },
    }


def masked(update: Tensor, gradient: Tensor) -> Tensor:
    """The cautious mask: rescaled by its mean, or "plain"."""
    mask = (update * gradient > 0).to(update.dtype)
    return update * mask if PARTS["cautious"] == "plain" else update * mask / mask.mean().clamp(min=1e-3)


class SophiaWithParts(SophiaG):
    """SophiaG, step by step, with the parts of `PARTS`."""

    due, log_rhos = True, None

    @torch.no_grad()
    def update_hessian(self, estimates):
        """Average over kernels if asked for; the next step measures rho."""
        for group in self.param_groups:
            group["hessian_average"] = PARTS.get("average")
        super().update_hessian(estimates)
        self.due = True

    def _curvature(self, group: dict, state: dict) -> Tensor:
        updates = state["hessian_updates"]
        h = state["hessian"] / (1 - group["betas"][1] ** updates if updates else 1.0)
        if "floor" in PARTS:
            h = h.clamp(min=PARTS["floor"] * h.mean())
        return h.sqrt() if PARTS.get("root") else h

    def _measure(self, ratios: list[Tensor]) -> None:
        """Quantile of |m| / h over all tensors, or in each; a running average of the logarithm."""
        noise = torch.Generator().manual_seed(0)
        samples = [r[torch.randint(0, len(r), (min(len(r), max(16, len(r) // 64)),), generator=noise)] for r in ratios]
        groups = samples if PARTS.get("per_tensor") else [torch.cat(samples)]
        values = [float(g.sort().values[int((1 - PARTS["target"]) * (len(g) - 1))]) for g in groups]
        new = [math.log(max(v, 1e-30)) for v in values] * (len(ratios) // len(values))
        old = self.log_rhos or new
        self.log_rhos = [0.7 * a + 0.3 * b for a, b in zip(old, new)]
        self.due = False

    @torch.no_grad()
    def step(self, closure=None, bs=None):
        """One step."""
        work = []
        for group in self.param_groups:
            beta1 = group["betas"][0]
            for p in group["params"]:
                if p.grad is not None:
                    state = self._state_of(group, p)
                    state["step"] += 1
                    m = state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                    m = beta1 * m + (1 - beta1) * p.grad if PARTS.get("nesterov") else m
                    work.append((group, p, m, self._curvature(group, state)))
        if self.due:
            self._measure([(m.abs() / (h + 1e-30)).flatten() for _, _, m, h in work])
        for (group, p, m, h), log_rho in zip(work, self.log_rhos):
            group["rho"], lr = math.exp(log_rho), float(group["lr"])
            update = (m / (group["rho"] * h + 1e-30)).clamp_(-1, 1)
            if PARTS.get("cautious"):
                update = masked(update, p.grad)
            p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)


class AdamWithParts(torch.optim.AdamW):
    """AdamW with the cautious mask: the control."""

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999)):
        super().__init__(params, lr=lr, betas=betas, eps=1e-8, weight_decay=0.0, foreach=False)

    @torch.no_grad()
    def step(self, closure=None):
        """One step: torch's, with its update masked."""
        params = [(g, p, p.detach().clone()) for g in self.param_groups for p in g["params"] if p.grad is not None]
        super().step()
        for group, p, before in params:
            if PARTS.get("cautious"):
                kept = before * (1 - group["lr"] * group["weight_decay"])
                p.copy_(kept - masked(kept - p, p.grad))


def train(row: dict[str, str], data: Path, out: Path) -> float:
    """Train what a row of the record describes; returns the final mAP50-95."""
    from ultralytics import YOLO

    from yolo_sophia.integration import build

    install()
    setup, lab = json.loads(row["arguments"]), json.loads(row["setup"])
    PARTS.clear()
    PARTS.update(json.loads(row["parts"]))
    arguments = {**COMMON, **sets(data)[row["set"]], **ARMS[row["arm"]], "hessian_warmup": lab.get("warm", 0), **setup}
    if row["arm"] != "sophia":
        del arguments["hessian_warmup"]
    build.SophiaG = SophiaWithParts
    sys.modules["study_presets"] = sys.modules[__name__]

    def start(trainer: Any) -> None:
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d) and "bn" in lab:
                module.momentum = lab["bn"]
        if span := lab.get("ema_span"):
            trainer.ema.decay = lambda x: min(0.9999, x / (x + span))

    model = YOLO(arguments.pop("model"))
    model.add_callback("on_train_start", start)
    model.train(**arguments, project=str(out.resolve()), name=f"row{row['row']}", exist_ok=True)
    return float(model.trainer.metrics["metrics/mAP50-95(B)"])


def main() -> None:
    """Train the rows asked for."""
    words = [w for w in sys.argv[1:] if "=" not in w]
    if len(words) != 3:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    chosen = dict(w.split("=") for w in sys.argv[1:] if "=" in w).get("rows", "")
    with Path(words[0]).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not chosen or row["row"] in chosen.split(",")]
    for row in rows:
        found = train(row, Path(words[1]).resolve(), Path(words[2]))
        print(f"row {row['row']}: mAP50-95 {found:.4f}, recorded {row['mAP50-95']}", flush=True)


if __name__ == "__main__":
    main()

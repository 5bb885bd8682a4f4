"""The dry run of a comparison: the plan in words, its steps, and an estimate of time and disk from one measured step.

The table for a GPU is not measured: floating-point operations of a YOLOv8 size, times three for forward and backward
pass, over an assumed effective speed.
"""

from __future__ import annotations

from yolo_sophia.compare.plan import Plan, runs
from yolo_sophia.compare.tuning import tune_plans
from yolo_sophia.runs.estimate import costs
from yolo_sophia.runs.run import data_name
from yolo_sophia.tune.plan import TunePlan

GFLOPS_640 = {"n": 8.7, "s": 28.6, "m": 78.9, "l": 165.2, "x": 257.8}
"""Forward pass of YOLOv8 per image at 640 px, as Ultralytics' documentation lists them."""
EFFECTIVE_TFLOPS = 25.0
"""Assumed: an NVIDIA A100 under AMP, data loading and validation included."""
COCO_IMAGES = 118_287


def estimate(plan: Plan) -> str:
    """The dry run's text.

    Raises:
        ValueError: A data set or the model is not there.
    """
    ordered = runs(plan)
    studies = tune_plans(plan).values()
    trials = [run for study in studies for run in study.runs({}) * study.trials]
    lines = [
        f"{len(ordered)} runs: arms {', '.join(arm.name for arm in plan.arms)} (reference {plan.reference}) x "
        f"seeds {list(plan.seeds)} x data {[data_name(d) for d in plan.data]} x horizons {list(plan.horizons)}",
        f"tuning: {len(trials)} trials; " + "; ".join(f"{study.arm.name} over {_space(study)}" for study in studies)
        if trials
        else "tuning: none, the report will say untuned",
        *costs(plan, ordered + trials, plan.local_workers),
    ]
    lines += ["", "Full COCO on one A100, hours per arm and seed (an estimate, 640 px, not measured):"]
    for size, flops in GFLOPS_640.items():
        hours = 3 * flops * 1e9 * COCO_IMAGES * plan.epochs / (EFFECTIVE_TFLOPS * 1e12) / 3600
        lines.append(f"  YOLOv8{size}: {hours:8.1f} h for {plan.epochs} epochs")
    return "\n".join(lines)


def _space(study: TunePlan) -> str:
    return ", ".join(f"{key} {dimension}" for key, dimension in study.space.items()) or "nothing"

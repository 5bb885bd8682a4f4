"""The dry run of a comparison: the plan in words, its cost from one measured step, and how many seeds it should have.

The table for a GPU is not measured: floating-point operations of a YOLOv8 size, times three for forward and backward
pass, over an assumed effective speed.
"""

from __future__ import annotations

import math

from yolo_sophia.compare.aggregate import seeds_needed
from yolo_sophia.compare.plan import Plan, runs
from yolo_sophia.compare.statistics import compute
from yolo_sophia.compare.tuning import tune_plans
from yolo_sophia.runs.estimate import costs
from yolo_sophia.runs.results import RunResult, load
from yolo_sophia.runs.run import Run, data_name
from yolo_sophia.runs.worker import ORDER, read_order
from yolo_sophia.tune.plan import TunePlan

GFLOPS_640 = {"n": 8.7, "s": 28.6, "m": 78.9, "l": 165.2, "x": 257.8}
"""Forward pass of YOLOv8 per image at 640 px, as Ultralytics' documentation lists them."""
EFFECTIVE_TFLOPS = 25.0
"""Assumed: an NVIDIA A100 under AMP, data loading and validation included."""
COCO_IMAGES = 118_287
WORTH_SHOWING = 0.01
"""Difference of mAP50-95 that the number of seeds is given for."""


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
        *seeds(plan),
    ]
    lines += ["", "Full COCO on one A100, hours per arm and seed (an estimate, 640 px, not measured):"]
    for size, flops in GFLOPS_640.items():
        hours = 3 * flops * 1e9 * COCO_IMAGES * plan.epochs / (EFFECTIVE_TFLOPS * 1e12) / 3600
        lines.append(f"  YOLOv8{size}: {hours:8.1f} h for {plan.epochs} epochs")
    return "\n".join(lines)


def seeds(plan: Plan) -> list[str]:
    """The number of seeds that would show a difference of .01 mAP50-95, from the scatter of the runs finished so far.

    The scatter of a data set is the standard deviation of the final mAP50-95 of an arm minus the reference's with the
    same seed, pooled over the arms but A/A controls: the root of sum (n - 1) s^2 / sum (n - 1). `seeds_needed` has the
    formula. For the mean over k data sets, the scatter is the root of the sum of their squares over k.
    """
    found = {}
    result = compute(plan, _finished(plan))
    for data in result.data:
        gaps = [arm.difference for arm in data.arms if arm.difference and arm.name not in result.repeated]
        gaps = [gap for gap in gaps if gap.scatter is not None]
        if freedom := sum(gap.mean.count - 1 for gap in gaps):
            pooled = math.sqrt(sum((gap.mean.count - 1) * gap.scatter**2 for gap in gaps) / freedom)
            found[data.name] = pooled, freedom + len(gaps)
    if not found:
        return ["seeds: no two seeds of an arm and of the reference have finished here, so their scatter is not known"]
    aim = f"would show a difference of {WORTH_SHOWING:g} mAP50-95 with 80 % power"
    lines = [
        f"seeds: {seeds_needed(scatter, WORTH_SHOWING)} {aim} on {name} (scatter {scatter:.4f} of {pairs} pairs)"
        for name, (scatter, pairs) in found.items()
    ]
    if len(found) > 1:
        overall = math.sqrt(sum(scatter**2 for scatter, _ in found.values())) / len(found)
        lines.append(
            f"seeds: {seeds_needed(overall, WORTH_SHOWING)} {aim} in the mean over these {len(found)} data sets"
        )
    return lines


def _finished(plan: Plan) -> list[RunResult]:
    """The finished runs of a plan in its folder; with tuning, whatever settings it has found."""
    planned = {(run.arm, run.data, run.seed, run.horizon): run.key for run in runs(plan)}
    found: dict[tuple[str, str, int, float], Run] = {}
    for path in (plan.out / "runs").glob(f"*/{ORDER}"):
        order = read_order(path.parent)
        name = order["arm"], order["data"], order["seed"], order["horizon"]
        if name in planned and (plan.tune_trials or order["key"] == planned[name]):
            found[name] = Run(order["key"], *name, order["arguments"])
    return [result for result in load(plan.out, found.values()) if result.receipt is not None]


def _space(study: TunePlan) -> str:
    return ", ".join(f"{key} {dimension}" for key, dimension in study.space.items()) or "nothing"

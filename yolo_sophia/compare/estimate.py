"""The dry run: the plan in words, its steps, and an estimate of time and disk from one measured step.

The GPU table is an estimate of an estimate: floating-point operations of a YOLOv8 size, times three for forward and
backward pass, over an assumed effective speed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from yolo_sophia.compare.plan import Plan, runs
from yolo_sophia.compare.tuning import trial_runs
from yolo_sophia.runs.progress import duration
from yolo_sophia.runs.run import Run, data_name
from yolo_sophia.search_space import space_of

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
    trials = [run for group in trial_runs(plan).values() for _, run in group] if plan.tune_trials else []
    workers = plan.workers or max(1, len(plan.devices))
    lines = [
        f"{len(ordered)} runs: arms {', '.join(arm.name for arm in plan.arms)} (reference {plan.reference}) x "
        f"seeds {list(plan.seeds)} x data {[data_name(d) for d in plan.data]} x horizons {list(plan.horizons)}",
        f"tuning: {len(trials)} trials; " + "; ".join(f"{arm.name} over {_space(arm)}" for arm in plan.arms)
        if trials
        else "tuning: none, the report will say untuned",
        *costs(plan, ordered + trials, workers),
    ]
    lines += ["", "Full COCO on one A100, hours per arm and seed (an estimate, 640 px, not measured):"]
    for size, flops in GFLOPS_640.items():
        hours = 3 * flops * 1e9 * COCO_IMAGES * plan.epochs / (EFFECTIVE_TFLOPS * 1e12) / 3600
        lines.append(f"  YOLOv8{size}: {hours:8.1f} h for {plan.epochs} epochs")
    return "\n".join(lines)


def costs(plan: Plan, ordered: Sequence[Run], workers: int) -> list[str]:
    """Time and disk that trainings of a plan will take, from one measured step; a line per fact.

    Args:
        plan: The plan.
        ordered: The trainings.
        workers: How many go on side by side.

    Raises:
        ValueError: A data set or the model is not there.
    """
    from yolo_sophia.integration.measure import count_images, measure_step

    threads = plan.cpus or 1 if plan.engine == "ray" else max(1, (os.cpu_count() or 1) // workers)
    batch = int(plan.common.get("batch", 16))
    accumulate = max(1, round(int(plan.common.get("nbs", 64)) / max(1, batch)))
    seconds, parameters, gflops = measure_step(plan.common, threads)
    lines = [
        f"measured: {seconds:.2f} s for one batch of {batch} ({parameters / 1e6:.1f} M parameters, {gflops:.1f} GFLOPs "
        f"per image), {threads} thread{'s' if threads > 1 else ''}",
    ]
    total, images_of = 0.0, {data: count_images(data) for data in plan.data}
    for data, images in images_of.items():
        batches = math.ceil(images / batch)
        if not images:
            lines.append(f"{data_name(data)}: its images are not there yet; no estimate")
            continue
        epochs = [int(run.arguments["epochs"]) for run in ordered if run.data == data]
        work = sum(epochs)
        total += work * batches * seconds
        lines.append(
            f"{data_name(data)}: {images} images, {batches} batches and about {max(1, batches // accumulate)} "
            f"optimizer steps an epoch, {len(epochs)} trainings of {work} epochs together"
        )
    disk = len(ordered) * parameters * (2 + 2 + 2 + 12) / 1e9
    lines.append(
        f"time: about {duration(total / workers)} with {workers} worker{'s' if workers > 1 else ''} like this machine "
        f"(validation and optimizer not counted); disk: about {disk:.2f} GB"
    )
    return lines


def _space(arm) -> str:
    space = space_of(arm.arguments)
    return ", ".join(f"{key} {dimension}" for key, dimension in space.items()) or "nothing"

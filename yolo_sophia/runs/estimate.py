"""Time and disk space of trainings, estimated from one measured step."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from yolo_sophia.runs.checks import as_list
from yolo_sophia.runs.plan import BasePlan
from yolo_sophia.runs.progress import duration
from yolo_sophia.runs.run import Run, data_name

AUTO_BATCH = 16
"""Batch that is measured where AutoBatch decides; Ultralytics takes it on a CPU."""


def costs(plan: BasePlan, runs: Sequence[Run], workers: int) -> list[str]:
    """Time and disk that trainings of a plan will take, from one measured step; a line per fact.

    Args:
        plan: The plan.
        runs: The trainings.
        workers: How many run side by side.

    Raises:
        ValueError: A data set or the model is not there.
    """
    from yolo_sophia.integration.measure import count_images, measure_step

    images_of = {data: count_images(data) for data in plan.data}
    threads = plan.cpus or 1 if plan.engine == "ray" else max(1, (os.cpu_count() or 1) // workers)
    given = plan.common.get("batch") or AUTO_BATCH
    batch = int(given) if given >= 1 else AUTO_BATCH
    first = {run.data: run.arguments for run in reversed(runs)}
    sizes = {data: max(map(int, as_list(own.get("imgsz") or 640))) for data, own in first.items()}
    accumulate = max(1, round(plan.common.get("nbs", 64) / batch))
    lines, seconds = [], {}
    for size in sorted(set(sizes.values())):
        seconds[size], parameters, gflops = measure_step(str(plan.common["model"]), batch, size, threads)
        lines.append(
            f"measured: {seconds[size]:.2f} s for one batch of {batch} at {size} px ({parameters / 1e6:.1f} M "
            f"parameters, {gflops:.1f} GFLOPs per image), {threads} thread{'s' if threads > 1 else ''}"
        )
    lines += [f"batch={given}: AutoBatch chooses the batch of each training; {batch} was measured"] * (given < 1)
    total = 0.0
    for data, images in images_of.items():
        if not images:
            lines.append(f"{data_name(data)}: its images are not there yet; no estimate")
            continue
        batches = math.ceil(images / batch)
        epochs = [int(run.arguments["epochs"]) for run in runs if run.data == data]
        total += sum(epochs) * batches * seconds[sizes[data]]
        lines.append(
            f"{data_name(data)}: {images} images, {batches} batches and about {max(1, batches // accumulate)} "
            f"optimizer steps an epoch, {len(epochs)} trainings of {sum(epochs)} epochs together"
        )
    disk = len(runs) * parameters * (2 + 2 + 2 + 12) / 1e9
    lines.append(
        f"time: about {duration(total / workers)} with {workers} worker{'s' if workers > 1 else ''} like this machine "
        f"(validation and optimizer not counted); disk: about {disk:.2f} GB"
    )
    return lines

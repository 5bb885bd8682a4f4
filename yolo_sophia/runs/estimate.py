"""Time and disk space of trainings, estimated from one measured step."""

from __future__ import annotations

import os
from collections.abc import Sequence

from yolo_sophia.runs.checks import as_list
from yolo_sophia.runs.plan import BasePlan
from yolo_sophia.runs.progress import duration
from yolo_sophia.runs.run import Run, data_name


def costs(plan: BasePlan, runs: Sequence[Run], workers: int) -> list[str]:
    """Time and disk that trainings of a plan will take with this many side by side; a line per fact.

    Raises:
        ValueError: A data set or the model is not there.
    """
    from yolo_sophia.integration.measure import count_images, measure_step
    from yolo_sophia.integration.run_length import AUTO_BATCH, images_used, run_length

    images_of = {data: count_images(data) for data in plan.data}
    threads = plan.cpus or 1 if plan.engine == "ray" else max(1, (os.cpu_count() or 1) // workers)
    given = plan.common.get("batch") or AUTO_BATCH
    batch = int(given) if given >= 1 else AUTO_BATCH
    first = {run.data: {**run.arguments, "batch": batch, "time": None} for run in reversed(runs)}
    sizes = {data: max(map(int, as_list(own.get("imgsz") or 640))) for data, own in first.items()}
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
        images = images_used(images, first[data].get("fraction") or 1.0)
        length = run_length(first[data], images)
        epochs = [int(run.arguments["epochs"]) for run in runs if run.data == data]
        total += sum(epochs) * length.batches * seconds[sizes[data]]
        lines.append(
            f"{data_name(data)}: {images} images, {length.batches} batches an epoch, {length.steps} optimizer steps in "
            f"{length.epochs} epochs, {len(epochs)} trainings of {sum(epochs)} epochs together"
        )
    disk = len(runs) * parameters * (2 + 2 + 2 + 12) / 1e9
    lines.append(
        f"time: about {duration(total / workers)} with {workers} worker{'s' if workers > 1 else ''} like this machine "
        f"(validation and optimizer not counted); disk: about {disk:.2f} GB"
    )
    return lines

"""One training with Ultralytics' own API, called by the worker process of a comparison."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from yolo_sophia import autoload
from yolo_sophia.integration.recalibration import recalibrate_before_validation


def run_training(
    arguments: Mapping[str, Any],
    *,
    resume: Path | None = None,
    callbacks: Mapping[str, Callable[[Any], None]],
    bn_recalibrate: bool = False,
    threads: int = 0,
) -> dict[str, Any]:
    """Train, or resume a training.

    Args:
        arguments: Ultralytics arguments with `model`; of a resumed training only the model's task is used.
        resume: Checkpoint of an unfinished training.
        callbacks: Functions of the trainer by Ultralytics' event names.
        bn_recalibrate: Recalibrate BatchNorm statistics before each validation.
        threads: Threads of the processor to use; 0 leaves torch's choice.

    Returns:
        `peak_memory_bytes`, `device`, and `args` as Ultralytics recorded them.
    """
    import torch
    from ultralytics import YOLO

    with contextlib.suppress(RuntimeError):  # raised again by a run that needs what does not fit
        autoload.install()  # a worker may have no active `.pth` line
    if threads:
        torch.set_num_threads(threads)
    arguments = dict(arguments)
    model_name = str(arguments.pop("model"))
    model = YOLO(str(resume) if resume else model_name)
    for event, function in callbacks.items():
        model.add_callback(event, function)
    if bn_recalibrate:
        model.add_callback("on_train_start", recalibrate_before_validation)
    if resume:
        model.train(resume=str(resume))
    else:
        model.train(**arguments)
    plain = (int, float, str, bool, list, dict, type(None))
    return {
        "peak_memory_bytes": peak_memory(),
        "device": str(model.trainer.device),
        "args": {k: v if isinstance(v, plain) else str(v) for k, v in vars(model.trainer.args).items()},
    }


def peak_memory() -> int:
    """Most memory in use so far: of the GPU if one is there, else of this process, in bytes; 0 where unknown."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    kib_per_unit = 1 / 1024 if sys.platform == "darwin" else 1
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib_per_unit * 1024)

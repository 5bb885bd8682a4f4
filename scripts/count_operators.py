"""Operators of a training step, of a Hessian update and of their parts; on CUDA each is a kernel launch or a few.

Usage: python scripts/count_operators.py [model=yolov8n.yaml] [imgsz=160] [file=operators.json] [key=value ...]
       (other keys: Ultralytics arguments, Sophia's among them)

A short training on generated images is profiled on the CPU: one micro-batch with a Hessian update and one without.
The optimizer takes multi-tensor kernels, as it does on CUDA for all but the step itself, which is one kernel there.
Counted are operators that no other operator calls, without views, and each by the innermost part that it belongs to.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

VIEWS = (
    "view reshape _unsafe_view expand permute transpose t slice select unsqueeze squeeze split split_with_sizes chunk "
    "unbind detach detach_ alias as_strided narrow unfold flatten view_as expand_as empty empty_like empty_strided "
    "resize_ set_ lift_fresh result_type to is_nonzero item _local_scalar_dense resolve_conj resolve_neg numpy_T"
).split()
"""Operators that launch nothing, or nothing but what they call."""

INTERVAL = 3


def parts() -> dict[str, list[tuple[Any, str]]]:
    """Functions by the part of a step that they are."""
    from yolo_sophia.curvature import GaussNewtonBartlett
    from yolo_sophia.integration import estimate
    from yolo_sophia.integration.criteria import CriterionRecorder
    from yolo_sophia.integration.monitor import Monitor
    from yolo_sophia.integration.skipping import Skipping
    from yolo_sophia.integration.window import Window
    from yolo_sophia.optim import SophiaG

    return {
        "forward pass": [(estimate, "loss_of_part")],
        "terms": [(CriterionRecorder, "terms")],
        "cotangents": [(GaussNewtonBartlett, "cotangent")],
        "pull-back": [(GaussNewtonBartlett, "__call__")],
        "scale and check": [(Window, "scale"), (Window, "is_finite")],
        "update of h": [(SophiaG, "update_hessian")],
        "rho": [(SophiaG, "_set_rho")],
        "monitor": [(Monitor, "before_step"), (Monitor, "after_step")],
        "step": [(SophiaG, "_move_parameters")],
        "check of the gradient": [(Skipping, "step")],
    }


@contextmanager
def labelled() -> Iterator[None]:
    """Name the parts in a profile."""

    def named(name: str, original: Callable) -> Callable:
        def call(*args, **kwargs):
            with torch.profiler.record_function(name):
                return original(*args, **kwargs)

        return call

    from yolo_sophia.integration import build, monitor
    from yolo_sophia.optim import SophiaG

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(build, "SophiaG", partial(SophiaG, foreach=True)))
        stack.enter_context(mock.patch.object(monitor, "SAMPLE_EVERY", 1))
        for name, functions in parts().items():
            for owner, attribute in functions:
                stack.enter_context(mock.patch.object(owner, attribute, named(name, getattr(owner, attribute))))
        yield


def counted(profile: torch.profiler.profile) -> Counter[str]:
    """Operators by part; "training" has those of none."""
    names, found = {*parts()}, Counter()
    for event in profile.events():
        if not event.name.startswith("aten::") or event.name.removeprefix("aten::") in VIEWS:
            continue
        parents = []
        parent = event.cpu_parent
        while parent is not None:
            parents.append(parent.name)
            parent = parent.cpu_parent
        if not any(name.startswith("aten::") and name.removeprefix("aten::") not in VIEWS for name in parents):
            found[next((name for name in parents if name in names), "training")] += 1
    return found


def measure(arguments: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Operators of a micro-batch with and of one without a Hessian update, by part."""
    from ultralytics import YOLO

    from yolo_sophia.shapes import generate

    profiles: list[torch.profiler.profile] = []

    def start(trainer) -> None:
        profiles.append(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]))
        profiles[-1].start()

    with tempfile.TemporaryDirectory() as folder, labelled():
        root = generate(f"{folder}/shapes", train=16 * (INTERVAL + 2), val=8)
        data = Path(folder, "shapes.yaml")
        data.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [a, b, c, d, e, f]\n")
        model = YOLO(arguments.pop("model"))
        model.add_callback("on_train_batch_start", start)
        model.add_callback("on_train_batch_end", lambda trainer: profiles[-1].stop())
        same = {"data": str(data), "batch": 16, "nbs": 16, "epochs": 1, "warmup_epochs": 0, "workers": 0, "val": False}
        same |= {"plots": False, "save": False, "project": folder, "device": "cpu", "optimizer": "SophiaG"}
        model.train(**{**same, "hessian_interval": INTERVAL, "hessian_warmup": 0, **arguments})
    return {
        "with a Hessian update": dict(counted(profiles[INTERVAL])),
        "without": dict(counted(profiles[INTERVAL + 1])),
    }


def main() -> None:
    """Measure, print a table, and write it to a file."""
    from ultralytics.cfg import parse_key_value_pair

    given = {"model": "yolov8n.yaml", "imgsz": 160, **dict(map(parse_key_value_pair, sys.argv[1:]))}
    file = given.pop("file", None)
    shown = dict(given)
    found = measure(given)
    print(f"{shown}, torch {torch.__version__}")
    for part in ["training", *parts()]:
        print(f"  {part:24}" + "".join(f"{column.get(part, 0):8}" for column in found.values()))
    print(f"  {'all':24}" + "".join(f"{sum(column.values()):8}" for column in found.values()))
    if file:
        Path(file).write_text(json.dumps({"arguments": shown, "torch": torch.__version__, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

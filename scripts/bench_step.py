"""Time of an optimizer step over torch's fused AdamW, on the parameter lists of YOLOv8.

Usage: python scripts/bench_step.py [yolov8n yolov8x ...] [device=cuda] [repeats=31] [threads=1] [clock=cpu]
       [file=step.jsonl]
Each repeat takes one step with every optimizer, in another order each time, after `zero_grad(set_to_none=True)` and
gradients in memory of their own, as a trainer leaves them. Printed: median time and the median of the ratios to AdamW
of the same repeat. `clock=cpu` measures processor time, which other work on the machine disturbs less; of several
threads it is the sum, spinning included. With device=cuda a step begins and ends with an idle device; printed as well:
the time between two events on the device, and the memory that a step takes beside parameters, gradients and states.
"SophiaG default" is the Triton kernel on CUDA and the single-tensor step on a CPU. Every optimizer's medians are
appended to `file` as a row of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import Parameter

from yolo_sophia.optim import SophiaG

Clock = Callable[[], float]
BASE = "AdamW fused"
WEIGHT_DECAY = 5e-4


def optimizers() -> dict[str, Callable]:
    """Name -> function from parameter groups to an optimizer; the official release where it is installed."""
    found: dict[str, Callable] = {
        BASE: lambda groups: torch.optim.AdamW(groups, fused=True),
        "SophiaG default": SophiaG,
        "SophiaG foreach": lambda groups: SophiaG(groups, foreach=True),
        "SophiaG single": lambda groups: SophiaG(groups, foreach=False),
        "AdamW default": torch.optim.AdamW,
        "AdamW foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
        "AdamW single": lambda groups: torch.optim.AdamW(groups, foreach=False),
        "SGD foreach": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9, foreach=True),
    }
    if importlib.util.find_spec("sophia_opt"):
        from sophia_opt import SophiaG as Official

        found["official SophiaG"] = Official
    return found


@dataclass
class Cost:
    """Of one step: seconds, seconds between two events on the device, and bytes that it takes for itself."""

    host: float
    device: float = math.nan
    memory: int = 0


def groups(shapes: list[torch.Size], device: torch.device) -> list[dict]:
    """Parameter groups as Ultralytics makes them: weights decay, biases and norms do not."""
    params = [Parameter(torch.randn(s, device=device) * 0.05) for s in shapes]
    kernels = [p for p in params if p.dim() > 1]
    return [
        {"params": kernels, "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]


def step_cost(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor], name: str, clock: Clock) -> Cost:
    """Cost of one step on copies of the gradients."""
    optimizer.zero_grad(set_to_none=True)
    for p, gradient in zip((p for group in optimizer.param_groups for p in group["params"]), gradients):
        p.grad = gradient.clone()
    step = partial(optimizer.step, **({"bs": 16} if name == "official SophiaG" else {}))
    if not gradients[0].is_cuda:
        start = clock()
        step()
        return Cost(clock() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, start = torch.cuda.memory_allocated(), clock()
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return Cost(clock() - start, first.elapsed_time(last) / 1e3, torch.cuda.max_memory_allocated() - held)


def measure(shapes: list[torch.Size], repeats: int, clock: Clock, device: torch.device) -> dict[str, list[Cost]]:
    """Costs of every optimizer, repeat by repeat."""
    made, gradients = {}, [torch.randn_like(p) for group in groups(shapes, device) for p in group["params"]]
    for name, build in optimizers().items():
        made[name] = build(groups(shapes, device))
        if isinstance(made[name], SophiaG):
            made[name].update_hessian([g.square() for g in gradients])
        for _ in range(3):  # makes the states
            step_cost(made[name], gradients, name, clock)
    costs: dict[str, list[Cost]] = {name: [] for name in made}
    for _ in range(repeats):
        for name in random.sample(list(made), len(made)):
            costs[name].append(step_cost(made[name], gradients, name, clock))
    return costs


def main() -> None:
    """Print one table per model."""
    words = dict(w.split("=") for w in sys.argv[1:] if "=" in w)
    device = torch.device(words.get("device", "cpu"))
    clock = time.process_time if words.get("clock") == "cpu" else time.perf_counter
    torch.set_num_threads(int(words.get("threads", 1)))
    from ultralytics.nn.tasks import DetectionModel

    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    for model in [w for w in sys.argv[1:] if "=" not in w] or ["yolov8n", "yolov8x"]:
        shapes = [p.shape for p in DetectionModel(f"{model}.yaml", verbose=False).parameters()]
        count = sum(s.numel() for s in shapes)
        print(f"{model}: {count / 1e6:.2f} M parameters in {len(shapes)} tensors, {place}")
        costs = measure(shapes, int(words.get("repeats", 31)), clock, device)
        for name, found in costs.items():
            ratio = statistics.median(c.host / base.host for c, base in zip(found, costs[BASE]))
            row = f"  {name:<34}{1e3 * statistics.median(c.host for c in found):8.2f} ms   {ratio:.2f}"
            if device.type == "cuda":
                row += f"   {1e3 * statistics.median(c.device for c in found):8.2f} ms on the device"
                row += f"   {max(c.memory for c in found) / 2**20:8.1f} MiB"
            print(row, flush=True)
            if "file" in words:
                figures = {"ms": 1e3 * statistics.median(c.host for c in found), "ratio": ratio}
                if device.type == "cuda":
                    figures["device_ms"] = 1e3 * statistics.median(c.device for c in found)
                    figures["memory_mib"] = max(c.memory for c in found) / 2**20
                key = {"model": model, "optimizer": name, "place": place, "torch": torch.__version__}
                with open(words["file"], "a") as rows:
                    rows.write(json.dumps({**key, **{k: round(v, 4) for k, v in figures.items()}}) + "\n")


if __name__ == "__main__":
    main()

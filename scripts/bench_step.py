"""Time of an optimizer step over torch's fused AdamW, on the parameter lists of YOLOv8.

Usage: python scripts/bench_step.py [yolov8n yolov8x ...] [repeats=31] [threads=1] [clock=cpu] [source=yes]
Each repeat takes one step with every optimizer, in another order each time, after `zero_grad(set_to_none=True)` and
gradients in memory of their own, as a trainer leaves them. Printed: median time and the median of the ratios to AdamW
of the same repeat. `clock=cpu` measures processor time, which other work on the machine disturbs less; of several
threads it is the sum, spinning included. `source=yes` prints, instead, the kernel that fused=True compiles on CPU and
the compiler's command.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import Parameter

from yolo_sophia.optim import SophiaG, compiler

Clock = Callable[[], float]
BASE = "AdamW fused"
WEIGHT_DECAY = 5e-4


def optimizers() -> dict[str, Callable]:
    """Name -> function from parameter groups to an optimizer; the official release where it is installed."""
    found: dict[str, Callable] = {
        BASE: lambda groups: torch.optim.AdamW(groups, fused=True),
        "SophiaG default": SophiaG,
        "SophiaG fused": lambda groups: SophiaG(groups, fused=True),
        "SophiaG foreach": lambda groups: SophiaG(groups, foreach=True),
        "SophiaG reference": lambda groups: SophiaG(groups, foreach=False),
        "SophiaG default, h and m bfloat16": lambda groups: SophiaG(
            groups, hessian_dtype=torch.bfloat16, momentum_dtype=torch.bfloat16
        ),
        "SophiaG fused, h and m bfloat16": lambda groups: SophiaG(
            groups, hessian_dtype=torch.bfloat16, momentum_dtype=torch.bfloat16, fused=True
        ),
        "AdamW foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
        "AdamW single": lambda groups: torch.optim.AdamW(groups, foreach=False),
        "SGD foreach": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9, foreach=True),
    }
    if importlib.util.find_spec("sophia_opt"):
        from sophia_opt import SophiaG as Official

        found["official SophiaG"] = Official
    return found


def groups(shapes: list[torch.Size]) -> list[dict]:
    """Parameter groups as Ultralytics makes them: weights decay, biases and norms do not."""
    params = [Parameter(torch.randn(s) * 0.05) for s in shapes]
    kernels = [p for p in params if p.dim() > 1]
    return [
        {"params": kernels, "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]


def step_time(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor], name: str, clock: Clock) -> float:
    """Seconds of one step on copies of the gradients."""
    optimizer.zero_grad(set_to_none=True)
    for p, gradient in zip((p for group in optimizer.param_groups for p in group["params"]), gradients):
        p.grad = gradient.clone()
    start = clock()
    optimizer.step(**({"bs": 16} if name == "official SophiaG" else {}))
    return clock() - start


def measure(shapes: list[torch.Size], repeats: int, clock: Clock) -> dict[str, list[float]]:
    """Times of every optimizer, repeat by repeat."""
    made, gradients = {}, [torch.randn_like(p) for group in groups(shapes) for p in group["params"]]
    for name, build in optimizers().items():
        made[name] = build(groups(shapes))
        if isinstance(made[name], SophiaG):
            made[name].update_hessian([g.square() for g in gradients])
        step_time(made[name], gradients, name, clock)  # makes the states
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(repeats):
        for name in random.sample(list(made), len(made)):
            times[name].append(step_time(made[name], gradients, name, clock))
    return times


def main() -> None:
    """Print one table per model."""
    words = dict(w.split("=") for w in sys.argv[1:] if "=" in w)
    if words.get("source"):
        command = " ".join([*compiler.command(), "-DPARAM=float -DEXP_AVG=float -DHESSIAN=float"])
        print(f"// {command}\n{Path(compiler.__file__).with_name('fused.cpp').read_text()}")
        return
    clock = time.process_time if words.get("clock") == "cpu" else time.perf_counter
    torch.set_num_threads(int(words.get("threads", 1)))
    from ultralytics.nn.tasks import DetectionModel

    for model in [w for w in sys.argv[1:] if "=" not in w] or ["yolov8n", "yolov8x"]:
        shapes = [p.shape for p in DetectionModel(f"{model}.yaml", verbose=False).parameters()]
        count = sum(s.numel() for s in shapes)
        print(f"{model}: {count / 1e6:.2f} M parameters in {len(shapes)} tensors, {torch.get_num_threads()} threads")
        times = measure(shapes, int(words.get("repeats", 31)), clock)
        for name, seconds in times.items():
            ratio = statistics.median(t / base for t, base in zip(seconds, times[BASE]))
            print(f"  {name:<34}{1e3 * statistics.median(seconds):8.2f} ms   {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Cost and quality of a Hessian estimate, by the way it is made, and a picture of both.

    python scripts/measure_refresh.py run OUT.json model=... data=... [steps=0] [batches=80] [key=value ...]
    python scripts/measure_refresh.py draw PICTURE.png A.json [B.json ...]

`run` trains for some AdamW steps, then holds the weights fixed and makes `batches` estimates in every way in turn, each
from another augmented batch and other sampled labels. The reference is the mean of the estimates from all images. Even
and odd batches are summed separately, so that a squared distance of means is a product of two independent ones and has
no bias from noise. Per parameter tensor, relative to the squared norm of the reference:
    bias2  squared distance of the way's mean from the reference's
    var    variance of one estimate about its way's mean
both as the 10 %, 50 % and 90 % quantile over the tensors; `trace` is the ratio of all sums. `cost` is CPU time over
that of the forward and backward pass of the whole batch.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH = 16
HORIZON, INTERVALS = 200, (5, 10, 20, 40)  # optimizer steps of the picture
WAYS = {f"all {BATCH} images, same graph": BATCH} | {f"{n} images, own pass": n for n in (8, 4, 2)}
FROZEN = f"4 images, BatchNorm statistics of all {BATCH} as constants"


class Enough(Exception):
    """Ends the training once everything is measured."""


class Moments:
    """Sums over the estimates of one way."""

    def __init__(self) -> None:
        self.count, self.sums = [0, 0], [[], []]
        self.squares: Tensor | float = 0.0
        self.seconds: list[float] = []

    def add(self, estimate: list[Tensor], half: int, seconds: float) -> None:
        """Add an estimate to one of the halves."""
        wide = [e.double() for e in estimate]
        self.sums[half] = [s + e for s, e in zip(self.sums[half], wide)] if self.count[half] else wide
        self.count[half] += 1
        self.squares = self.squares + torch.stack([e.square().sum() for e in wide])
        self.seconds.append(seconds)

    def means(self) -> list[list[Tensor]]:
        """Means of the two halves."""
        return [[s / n for s in sums] for n, sums in zip(self.count, self.sums)]


def dots(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Inner product of each pair."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b)])


def compared(way: Moments, reference: Moments, step: float) -> dict[str, Any]:
    """Figures of one way; see the module."""
    (a1, a2), (r1, r2) = way.means(), reference.means()
    size = dots(r1, r2)
    bias = dots([x - y for x, y in zip(a1, r1)], [x - y for x, y in zip(a2, r2)]) / size
    var = (way.squares / sum(way.count) - dots(a1, a2)) / size
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    return {
        "estimates": sum(way.count),
        "cost": statistics.median(way.seconds) / step,
        "bias2": bias.quantile(quantiles).tolist(),
        "var": var.quantile(quantiles).tolist(),
        "trace": float(sum(x.sum() for x in a1 + a2) / sum(x.sum() for x in r1 + r2)),
    }


@contextmanager
def constant_statistics(model: torch.nn.Module, statistics_of: dict) -> Iterator[None]:
    """BatchNorm with the given means and variances, which carry no gradient."""
    for norm, (mean, var) in statistics_of.items():
        norm.forward = lambda x, n=norm, m=mean, v=var: F.batch_norm(x, m, v, n.weight, n.bias, False, 0.0, n.eps)
    try:
        yield
    finally:
        for norm in statistics_of:
            del norm.forward


def measure(trainer: Any, steps: int, batches: int, report: Callable[[dict], None]) -> None:
    """Measure on a trainer that is about to begin."""
    from yolo_sophia.curvature import GaussNewtonBartlett
    from yolo_sophia.integration.criteria import recorder_for
    from yolo_sophia.integration.subsample import loss_of_part

    model, noise = trainer.model.train(), torch.Generator().manual_seed(0)
    model.criterion = model.init_criterion()
    recorder, estimator = recorder_for(model, model.criterion), GaussNewtonBartlett()
    params = [p for p in model.parameters() if p.requires_grad]
    batches_of = (trainer.preprocess_batch(b) for _ in iter(int, 1) for b in trainer.train_loader)
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(next(batches_of))[0].sum().backward()
        torch.nn.utils.clip_grad_norm_(params, 10.0)
        optimizer.step()
    optimizer.zero_grad()

    def estimate(images: int) -> list[Tensor]:
        found = estimator(recorder.terms(), params, noise)
        return [torch.zeros_like(p) if e is None else e * (BATCH / images) for e, p in zip(found, params)]

    moments, passes = {name: Moments() for name in (*WAYS, FROZEN)}, []
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for i in range(batches):
        batch, seen, clock = next(batches_of), {}, time.process_time
        hooks = [m.register_forward_pre_hook(lambda m, x, to=seen: to.update({m: x[0].detach()})) for m in norms]
        loss_of_part(model, batch, BATCH)
        for hook in hooks:
            hook.remove()
        seen = {m: torch.var_mean(x, (0, 2, 3), correction=0)[::-1] for m, x in seen.items()}
        start = clock()
        recorder.start()
        loss = loss_of_part(model, batch, BATCH)
        forward = clock()
        moments[next(iter(WAYS))].add(estimate(BATCH), i % 2, clock() - forward)
        backward = clock()
        torch.autograd.grad(loss, params)
        passes.append(forward - start + clock() - backward)
        for name, images in [*list(WAYS.items())[1:], (FROZEN, 4)]:
            with constant_statistics(model, seen if name == FROZEN else {}):
                start = clock()
                recorder.start()
                loss_of_part(model, batch, images)
                moments[name].add(estimate(images), i % 2, clock() - start)
        if i % 10 == 9 or i == batches - 1:
            step, reference = statistics.median(passes), next(iter(moments.values()))
            report({name: compared(way, reference, step) for name, way in moments.items()})
    raise Enough


def run(out: Path, words: list[str]) -> None:
    """Measure and write a JSON file."""
    from ultralytics.cfg import parse_key_value_pair
    from ultralytics.models.yolo.detect import DetectionTrainer

    torch.set_num_threads(1)
    given = dict(map(parse_key_value_pair, words))
    steps, batches = given.pop("steps", 0), given.pop("batches", 80)
    title = (
        f"{Path(given['model']).stem}, {Path(given['data']).parent.name}, {given.get('imgsz', 160)} px, {steps} steps"
    )

    def report(ways: dict[str, Any]) -> None:
        out.write_text(json.dumps({"title": title, "ways": ways}, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        same = {"imgsz": 160, "batch": BATCH, "nbs": BATCH, "epochs": 1, "workers": 0, "val": False, "plots": False}
        trainer = DetectionTrainer(overrides={**same, "project": folder, **given})
        trainer.add_callback("on_train_start", lambda trainer: measure(trainer, steps, batches, report))
        try:
            trainer.train()
        except Enough:
            pass


def draw(picture: Path, files: list[str]) -> None:
    """Error of h after some steps with fixed weights against the cost, a line for each way over the interval."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(5.2 * len(files), 5.2), layout="constrained")
    for ax, file in zip(figure.subplots(1, len(files), squeeze=False)[0], files):
        content = json.loads(Path(file).read_text())
        for name, way in content["ways"].items():
            bias2, var = max(0.0, way["bias2"][1]), way["var"][1]
            cost = [100 * way["cost"] / k for k in INTERVALS]
            error = [math.sqrt(bias2 + var * k / HORIZON) for k in INTERVALS]
            (line,) = ax.plot(cost, error, marker="o", markersize=4, label=name)
            ax.plot(cost[1], error[1], marker="o", markersize=9, color=line.get_color())
        ax.set(xscale="log", yscale="log", title=content["title"], xlabel="cost of the refreshes, % of training time")
        ax.set_ylabel(f"relative error of h after {HORIZON} steps")
        ax.grid(alpha=0.3, which="both")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle(f"hessian_interval {', '.join(map(str, INTERVALS))} from right to left; large dot: 10", fontsize=10)
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in {"run", "draw"}:
        sys.exit(__doc__)
    (run if sys.argv[1] == "run" else draw)(Path(sys.argv[2]), sys.argv[3:])

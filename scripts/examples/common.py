"""What the examples share: a learning-rate grid, seeds, the training loop, a figure and a table.

The rule: every optimizer gets the same learning rates, seeds, initial weights, batches, schedule and weight decay. Its
learning rate is the one whose last validation score is best on average over the seeds; what is compared is the test
score there. Nothing else is searched.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator
from PIL import Image
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from yolo_sophia.report.figure_style import Style

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
WEIGHT_DECAY = 0.01
K = 10
"""Steps from one Hessian update to the next."""
BETAS = (0.95, 0.9)
"""Decays of m and h for Sophia; the default of h, 0.99 per update, remembers 1000 steps: more than trained here."""


@dataclass
class Problem:
    """What is trained on, made anew for every training.

    Attributes:
        model: The model, its weights drawn from the seed.
        batch: Arguments of a training step, from its number; draws from a generator of its own.
        score: Score of the model on "validation" or "test"; the model is in eval mode.
    """

    model: nn.Module
    batch: Callable[[int], tuple]
    score: Callable[[str], float]


Arm = Callable[[Problem, float], tuple[Optimizer, Callable[..., None]]]
"""From problem and learning rate to the optimizer and the function that trains one step: step(number, *batch)."""


@dataclass(frozen=True)
class Example:
    """An example.

    Attributes:
        name: Stem of the files it writes.
        title: Title of the figure.
        score: What the scores are, with unit.
        problem: The problem of a seed.
        arms: Optimizers by name, the reference first.
        steps: Steps of a training.
        larger_is_better: Whether the best score is the largest.
        scores: Validation scores of a training.
        seeds: Number of seeds.
    """

    name: str
    title: str
    score: str
    problem: Callable[[int], Problem]
    arms: Mapping[str, Arm]
    steps: int
    larger_is_better: bool = False
    scores: int = 20
    seeds: int = 3


@dataclass
class Training:
    """Scores of one training: validation by step, test at the end, and the CPU time of its steps."""

    steps: list[int] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    test: float = math.nan
    seconds: float = 0.0


Results = dict[str, dict[float, list[Training]]]
"""Trainings by optimizer and learning rate, one for each seed."""


def adamw(problem: Problem, lr: float, loss: Callable[..., torch.Tensor]) -> tuple[Optimizer, Callable[..., None]]:
    """The reference arm; `loss` takes the model and a batch."""
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)

    def step(number: int, *batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss(problem.model, *batch).backward()
        optimizer.step()

    return optimizer, step


def fit(example: Example, arm: Arm, lr: float, seed: int, steps: int) -> Training:
    """Train once; the learning rate falls linearly to 0."""
    torch.manual_seed(seed)
    problem, training = example.problem(seed), Training()
    optimizer, step = arm(problem, lr)
    schedule = LambdaLR(optimizer, lambda done: 1 - done / steps)
    for number in range(steps):
        batch = problem.batch(number)
        start = time.process_time()
        step(number, *batch)
        schedule.step()
        training.seconds += time.process_time() - start
        if (number + 1) % max(1, steps // example.scores) == 0 or number + 1 == steps:
            training.steps.append(number + 1)
            training.validation.append(scored(problem, "validation"))
    training.test = scored(problem, "test")
    return training


def scored(problem: Problem, split: str) -> float:
    """Score of the model in eval mode."""
    problem.model.eval()
    with torch.no_grad():
        score = problem.score(split)
    problem.model.train()
    return score


def best_learning_rate(trainings: Mapping[float, list[Training]], larger_is_better: bool) -> float:
    """The learning rate of the best mean of the last validation scores; one that diverged is never chosen."""
    sign = 1 if larger_is_better else -1

    def merit(lr: float) -> float:
        mean = sign * statistics.fmean(t.validation[-1] for t in trainings[lr])
        return mean if math.isfinite(mean) else -math.inf

    return max(trainings, key=merit)


def table(example: Example, results: Results) -> str:
    """Markdown: mean validation score at each learning rate, test score at the best one."""
    rates = list(next(iter(results.values())))
    rows = [
        ["optimizer", *(f"lr {lr:g}" for lr in rates), "test: mean ± sd", "test of each seed", "CPU s"],
        ["---"] * (len(rates) + 4),
    ]
    for name, trainings in results.items():
        best = best_learning_rate(trainings, example.larger_is_better)
        means = {lr: f"{statistics.fmean(t.validation[-1] for t in runs):.4g}" for lr, runs in trainings.items()}
        tests = [t.test for t in trainings[best]]
        spread = f" ± {statistics.stdev(tests):.2g}" if len(tests) > 1 else ""
        cells = [f"**{mean}**" if lr == best else mean for lr, mean in means.items()]
        seconds = statistics.median(t.seconds for runs in trainings.values() for t in runs)
        tested = [f"{statistics.fmean(tests):.4g}{spread}", " ".join(f"{t:.4g}" for t in tests), f"{seconds:.2g}"]
        rows.append([name, *cells, *tested])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def figure(example: Example, results: Results) -> Figure:
    """Validation over steps at each optimizer's best learning rate; last validation score over the learning rate."""
    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    over_steps, over_rates = drawn.subplots(1, 2, sharey=True)
    for number, (name, trainings) in enumerate(results.items()):
        line = Style(name, number).line
        best = best_learning_rate(trainings, example.larger_is_better)
        steps, curves = trainings[best][0].steps, list(zip(*(t.validation for t in trainings[best])))
        over_steps.plot(steps, [*map(statistics.fmean, curves)], label=f"{name}, lr {best:g}", markevery=4, **line)
        over_steps.fill_between(steps, [*map(min, curves)], [*map(max, curves)], color=line["color"], alpha=0.12, lw=0)
        last = {lr: [t.validation[-1] for t in runs] for lr, runs in trainings.items()}
        over_rates.plot(list(last), [*map(statistics.fmean, last.values())], **line)
        over_rates.fill_between(
            list(last), [*map(min, last.values())], [*map(max, last.values())], color=line["color"], alpha=0.12, lw=0
        )
    over_steps.set(xlabel="step", ylabel=f"validation: {example.score}", title="at the best learning rate")
    over_rates.set(xscale="log", xlabel="learning rate", title="at the last step")
    over_rates.set_xticks(list(last), [f"{lr:g}" for lr in last], minor=False)
    over_rates.xaxis.set_minor_locator(NullLocator())
    for axes in (over_steps, over_rates):
        axes.grid(alpha=0.3, which="both")
    if not example.larger_is_better:
        over_steps.set_yscale("log")
        over_steps.yaxis.set_major_formatter("{x:g}")
        over_steps.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    count = len(next(iter(next(iter(results.values())).values())))
    drawn.suptitle(f"{example.title}; mean and range of {count} seed{'s' if count > 1 else ''}", fontsize=11)
    drawn.legend(*over_steps.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return drawn


def save(drawn: Figure, path: Path) -> None:
    """Write a PNG of few colours, a third as large as one of all."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=110)
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)


def main(example: Example, description: str | None) -> None:
    """Run the comparison; write NAME.png and NAME.md."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder of figure and table")
    parser.add_argument("--seeds", type=int, default=example.seeds, help="trainings at each learning rate")
    parser.add_argument("--steps", type=int, default=example.steps, help="steps of a training")
    parser.add_argument("--quick", action="store_true", help="one seed, two learning rates, a few steps: does it run?")
    given = parser.parse_args()
    rates, seeds, steps = (LEARNING_RATES[1:3], 1, 12) if given.quick else (LEARNING_RATES, given.seeds, given.steps)
    torch.set_num_threads(1)  # the models are small: more threads cost more than they give
    results: Results = {}
    for name, arm in example.arms.items():
        results[name] = {lr: [fit(example, arm, lr, seed, steps) for seed in range(seeds)] for lr in rates}
        print(f"{name}: done", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{example.name}.md").write_text(table(example, results))
    save(figure(example, results), given.out / f"{example.name}.png")
    print(f"\n{example.title}: {example.score}\n\n{table(example, results)}\n{given.out / example.name}.png")

"""The dry run of a study: the space in words, and what its trials would cost if none were pruned."""

from __future__ import annotations

from yolo_sophia.runs.estimate import costs
from yolo_sophia.runs.run import data_name
from yolo_sophia.tune.plan import TunePlan


def estimate(plan: TunePlan) -> str:
    """The dry run's text.

    Raises:
        ValueError: A data set or the model is not there.
    """
    lines = [
        f"study {plan.study} in {plan.storage}: {plan.trials} trials of {plan.arm.name} x seeds {list(plan.seeds)} x "
        f"data {[data_name(data) for data in plan.data]}, {plan.epochs} epochs each",
        f"sampler {plan.sampler}; pruner {plan.pruner}"
        + (f" after epoch {plan.prune_after} of {plan.trial_epochs}" if plan.pruner != "none" else ""),
        "space:",
    ]
    for key, dimension in plan.space.items():
        own = f" (the optimizer's own: {plan.start[key]})" if key in plan.start else ""
        lines.append(f"  {key:<20} {dimension}{own}")
    lines += costs(plan, plan.runs({}) * plan.trials, plan.local_workers)
    return "\n".join([*lines, "Pruning reduces this."])

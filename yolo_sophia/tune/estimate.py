"""The dry run of a study: the space in words, and what its trials would cost if none were pruned."""

from __future__ import annotations

from yolo_sophia.compare.estimate import costs
from yolo_sophia.compare.tables import scalar
from yolo_sophia.runs.run import data_name
from yolo_sophia.tune.plan import TunePlan


def estimate(plan: TunePlan) -> str:
    """The dry run's text.

    Raises:
        ValueError: A data set or the model is not there.
    """
    base = plan.base
    lines = [
        f"study {plan.study} in {plan.storage}: {plan.trials} trials of {plan.arm.name} x seeds {list(base.seeds)} x "
        f"data {[data_name(data) for data in base.data]}, {base.epochs} epochs each",
        f"sampler {plan.sampler}; pruner {plan.pruner}"
        + (f" after epoch {plan.prune_after} of {plan.epochs}" if plan.pruner != "none" else ""),
        "space:",
    ]
    for key, dimension in plan.space.items():
        own = f" (the optimizer's own: {scalar(plan.start[key])})" if key in plan.start else ""
        lines.append(f"  {key:<20} {dimension}{own}")
    return "\n".join([*lines, *costs(base, plan.runs({}) * plan.trials, plan.workers), "pruning will save some of it"])

"""Logistic regression of rows of a linear layer: minimised by L-BFGS, all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 100
"""Largest number of L-BFGS iterations."""

TOLERANCE = 1e-4
"""Largest entry of the gradient, of the loss per positive, at which the iterations end."""


def fit_rows(
    inputs: Tensor,
    targets: Tensor,
    weights: Tensor,
    rows: Tensor,
    bias: Tensor,
    precision: float,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Tensor]:
    """Fit rows of a linear layer, each by a logistic regression of its own.

    A row (w, b) with targets t_n in [0, 1] minimises

        sum_n weights_n BCE(w . x_n + b, t_n) + precision / 2 sum_j (s_j w_j)^2,

    where s_j is the standard deviation of input j: a Gaussian prior of mean 0 on what each input adds to the logit. The
    prior does not change with the number of samples, so a class with few positives stays near the rate of its class,
    and one with many follows them. b has no prior. A row without positives has no minimum, and is returned as it is.

    The iterations start from the given w with the b that has the right mean rate: at the usual initial bias,
    p (1 - p) is so small that a step scaled by the curvature diverges.

    Args:
        inputs: Inputs of the layer, shape (N, C).
        targets: Targets of the rows, shape (N, R).
        weights: How many samples each stands for, shape (N,).
        rows: Weights that the iterations start from, shape (R, C).
        bias: Biases of the rows, shape (R,).
        precision: Of the prior, >= 0.
        iterations: Largest number of iterations.
        tolerance: Largest entry of the gradient at which they end; each row's loss is divided by its positives.

    Returns:
        Weights and biases, shapes (R, C) and (R,).
    """
    positives = (weights[:, None] * targets).sum(0)
    total = weights.sum()
    fitted = (positives > 0) & (positives < total)
    if not fitted.any():
        return rows.clone(), bias.clone()
    mean = (weights[:, None] * inputs).sum(0) / total
    scale = ((weights[:, None] * inputs.square()).sum(0) / total - mean.square()).clamp(min=0).sqrt()
    scale = torch.where(scale > 1e-6 * scale.max().clamp(min=1e-30), scale, torch.inf)  # a constant input: no weight
    targets, positives = targets[:, fitted], positives[fitted]
    parts = weights[:, None] / positives
    rate = positives / total
    v = torch.where(scale.isinf(), 0, rows[fitted] * scale).clone()
    point = torch.cat([v, (rate / (1 - rate)).log()[:, None]], 1).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point], max_iter=iterations, tolerance_grad=tolerance, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    @torch.no_grad()
    def loss_and_gradient() -> Tensor:
        v, b = point[:, :-1], point[:, -1]
        w = v / scale
        logits = torch.addmm(b - w @ mean, inputs, w.t())
        residual = parts * (logits.sigmoid() - targets)
        sums = residual.sum(0)
        slopes = (residual.t() @ inputs - sums[:, None] * mean) / scale
        prior = precision / positives[:, None] * v
        point.grad = torch.cat([slopes + prior, sums[:, None]], 1)
        return (parts * (torch.nn.functional.softplus(logits) - targets * logits)).sum() + 0.5 * (prior * v).sum()

    optimizer.step(loss_and_gradient)
    rows, bias, w = rows.clone(), bias.clone(), (point.detach()[:, :-1] / scale)
    rows[fitted], bias[fitted] = w, point.detach()[:, -1] - w @ mean
    return rows, bias

"""PyTorch's common losses as loss terms: which likelihood, and which coefficient per prediction.

The second derivative of the loss by the model's output equals that of the term (but for the absolute error, which has
none). Labels are drawn from the model; weights and the divisor of "mean" are PyTorch's, from the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yolo_sophia.curvature.likelihoods import Bernoulli, Categorical, Gaussian, Laplace, LossTerm, wide


def _divided(coefficient: Tensor, count: Tensor | float, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"Invalid reduction: found {reduction!r}, expected 'mean' or 'sum', which give a scalar loss.")
    return coefficient / count if reduction == "mean" else coefficient


def cross_entropy(
    output: Tensor,
    target: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> list[LossTerm]:
    """Softmax cross-entropy, with the arguments of `torch.nn.functional.cross_entropy`.

    Per prediction the loss is  -sum_c a_c log p_c  with a_c from label, class weights and smoothing. Its Hessian by the
    logits is  (sum_c a_c) (diag(p) - p p^T): a categorical term with the coefficient sum_c a_c.

    Args:
        output: Logits, shape (classes,) or (N, classes, ...).
        target: Class numbers, shape (N, ...), or probabilities of the shape of the logits. None where neither `weight`
            nor `ignore_index` depends on it: every prediction then counts.
        weight: Weight per class, shape (classes,).
        ignore_index: Label of predictions that take no part.
        reduction: "mean" or "sum".
        label_smoothing: Part of the label spread evenly over all classes, in [0, 1].

    Raises:
        ValueError: The reduction gives no scalar, or class weights were given without a target.
    """
    rows = output.movedim(1, -1) if output.dim() > 1 else output
    classes, dtype = rows.shape[-1], wide(output)
    if target is None:
        if weight is not None:
            raise ValueError("cross_entropy with class weights needs the targets: the labels decide the weights.")
        ones = torch.ones(rows.shape[:-1], dtype=dtype, device=rows.device)
        return [Categorical(rows, _divided(ones, ones.numel(), reduction)[..., None])]
    weights = torch.ones(classes, dtype=dtype, device=rows.device) if weight is None else weight.to(dtype)
    if target.is_floating_point():
        shares = target.movedim(1, -1) if target.dim() > 1 else target
        shares = (shares * (1 - label_smoothing) + label_smoothing / classes) * weights
        count: Tensor | float = rows.numel() / classes
    else:
        taking_part = target != ignore_index
        labels = F.one_hot(target.where(taking_part, torch.zeros_like(target)), classes).to(dtype)
        shares = (labels * (1 - label_smoothing) + label_smoothing / classes) * weights * taking_part[..., None]
        count = (labels * weights * taking_part[..., None]).sum()
    total = shares.sum(-1, keepdim=True)
    target = torch.where(total > 0, shares / total, 1 / classes)
    return [Categorical(rows, _divided(total, count, reduction), target)]


def binary_cross_entropy_with_logits(
    output: Tensor,
    target: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> list[LossTerm]:
    """Binary cross-entropy, with the arguments of `torch.nn.functional.binary_cross_entropy_with_logits`.

    With  l = -w (q t log p + (1 - t) log(1 - p)), q the pos_weight, the second derivative by the logit is
    w (q t + 1 - t) p (1 - p). So the label is sampled from the model's p, as without a pos_weight, and the factor
    q t + 1 - t stays that of the true label: it says how much an element of the data counts, and q is no part of the
    model's distribution. (Weighting by q where the *sampled* label is positive has another second moment.)

    Args:
        output: Logits, any shape.
        target: Labels in [0, 1], of the shape of the logits; needed with a pos_weight.
        weight: w, broadcastable to the logits.
        pos_weight: q, broadcastable to the logits.
        reduction: "mean" or "sum".

    Raises:
        ValueError: The reduction gives no scalar, or a pos_weight was given without a target.
    """
    coefficient = torch.ones((), dtype=wide(output), device=output.device)
    if weight is not None:
        coefficient = coefficient * weight
    if pos_weight is not None:
        if target is None:
            raise ValueError("binary cross-entropy with a pos_weight needs the targets: they decide the weights.")
        factor = pos_weight * target + 1 - target
        coefficient, target = coefficient * factor, pos_weight * target / factor.clamp(min=1e-30)
    return [Bernoulli(output, _divided(coefficient, output.numel(), reduction), target)]


def mse_loss(output: Tensor, target: Tensor | None = None, *, reduction: str = "mean") -> list[LossTerm]:
    """Squared error: a Gaussian with the coefficient 2, for its negative log-likelihood has the half of the square.

    The arguments are those of `torch.nn.functional.mse_loss`.

    Raises:
        ValueError: The reduction gives no scalar.
    """
    two = torch.full((), 2.0, dtype=wide(output), device=output.device)
    return [Gaussian(output, _divided(two, output.numel(), reduction), target)]


def l1_loss(output: Tensor, target: Tensor | None = None, *, reduction: str = "mean") -> list[LossTerm]:
    """Absolute error: a Laplace distribution of scale 1, whose Fisher information stands in for a Hessian that is 0.

    The arguments are those of `torch.nn.functional.l1_loss`.

    Raises:
        ValueError: The reduction gives no scalar.
    """
    one = torch.ones((), dtype=wide(output), device=output.device)
    return [Laplace(output, _divided(one, output.numel(), reduction), target)]


def gaussian_nll_loss(output: Tensor, target: Tensor | None, var: Tensor, *, reduction: str = "mean") -> list[LossTerm]:
    """Gaussian negative log-likelihood with a given variance: the curvature of an element is 1 / var.

    A variance that the model predicts as well is a second output; its curvature is not part of this term.

    Args:
        output: Means, any shape.
        target: Observations of the same shape.
        var: Variance, broadcastable to the means, > 0.
        reduction: "mean" or "sum".

    Raises:
        ValueError: The reduction gives no scalar.
    """
    return [Gaussian(output, _divided(1 / var.detach().to(wide(output)), output.numel(), reduction), target)]


def distribution_focal_loss(output: Tensor, target: Tensor | None, coefficient: Tensor) -> list[LossTerm]:
    """Distribution focal loss (arXiv 2006.04388): cross-entropy with the two bins beside a distance.

    Args:
        output: Logits of the bins, shape (..., bins).
        target: Distances in bins, in [0, bins - 1), shape (...).
        coefficient: Coefficient of each distance in the loss, broadcastable to (..., 1).
    """
    return [Categorical(output, coefficient, None if target is None else two_bins(target, output.shape[-1]))]


def two_bins(distance: Tensor, bins: int) -> Tensor:
    """A distance in [0, bins - 1) as a distribution over the bins below and above it, shape (..., bins)."""
    low = distance.long()
    target = torch.zeros(*distance.shape, bins, dtype=distance.dtype, device=distance.device)
    target.scatter_(-1, low[..., None], (low + 1 - distance)[..., None])
    return target.scatter_(-1, low[..., None] + 1, (distance - low)[..., None])


FUNCTIONS: dict[Callable, Callable[..., list[LossTerm]]] = {
    F.cross_entropy: cross_entropy,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
    F.mse_loss: mse_loss,
    F.l1_loss: l1_loss,
}
"""Terms of PyTorch's functions."""

MODULES: dict[type[nn.Module], tuple[Callable[..., list[LossTerm]], tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (cross_entropy, ("weight", "ignore_index", "reduction", "label_smoothing")),
    nn.BCEWithLogitsLoss: (binary_cross_entropy_with_logits, ("weight", "pos_weight", "reduction")),
    nn.MSELoss: (mse_loss, ("reduction",)),
    nn.L1Loss: (l1_loss, ("reduction",)),
}
"""Terms of PyTorch's modules, and the attributes that are their arguments."""


def likelihood_of(loss_function: Callable) -> Callable[[Any, Any], list[LossTerm]]:
    """The function from output and target (None without) to the terms of a loss.

    Args:
        loss_function: One of `MODULES` or `FUNCTIONS`, or a function of your own that returns such terms, for instance
            `functools.partial(losses.cross_entropy, label_smoothing=0.1)`.

    Raises:
        TypeError: It is another module, not callable, or (when called) returns no terms.
    """
    if type(loss_function) in MODULES:
        terms, names = MODULES[type(loss_function)]
        return lambda output, target: terms(output, target, **{n: getattr(loss_function, n) for n in names})
    expected = (
        f"expected one of {[kind.__name__ for kind in MODULES]}, its functional form, or a function that returns "
        "loss terms (yolo_sophia.curvature.losses). A loss that is no likelihood goes with the estimator Hutchinson, "
        "or with a function that returns sign_randomised(loss, [output])"
    )
    if isinstance(loss_function, nn.Module) or not callable(loss_function):
        raise TypeError(f"No likelihood is known for {type(loss_function).__name__}: {expected}.")
    function = FUNCTIONS.get(loss_function, loss_function)

    def checked(output: Any, target: Any) -> list[LossTerm]:
        terms = function(output, target)
        if not isinstance(terms, (list, tuple)) or not all(hasattr(term, "sampled") for term in terms):
            raise TypeError(f"The loss function returned {type(terms).__name__}, no loss terms: {expected}.")
        return list(terms)

    return checked

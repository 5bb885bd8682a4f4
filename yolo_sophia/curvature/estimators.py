"""Estimators of a diagonal curvature, behind one protocol.

An estimator pulls cotangents back through an existing graph. It runs no forward pass, writes no `.grad`, and
touches no buffer and no global random state. The graph stays usable for the ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Generator, Tensor

from yolo_sophia.curvature.autocast import no_autocast
from yolo_sophia.curvature.likelihoods import LossTerm
from yolo_sophia.curvature.signs import rademacher


class Estimator(Protocol):
    """From loss terms to one estimate of the diagonal per parameter."""

    def __call__(
        self,
        terms: Sequence[LossTerm],
        params: Sequence[Tensor],
        generator: Generator | None = None,
        scale: float = 1.0,
    ) -> list[Tensor | None]:
        """Estimate the diagonal.

        Args:
            terms: The terms of the loss, their outputs in one autograd graph.
            params: Parameters to estimate for.
            generator: Source of the noise, on the outputs' device; None for the global one.
            scale: Factor for the pulled-back cotangents against underflow in half precision; cancels in the result.

        Returns:
            Per parameter a tensor of its shape at the scale of the loss, or None where no term depends on it.
        """


def _squared_pullback(
    cotangent: Callable[[LossTerm], Tensor], terms: Sequence[LossTerm], params: Sequence[Tensor], scale: float
) -> list[Tensor | None]:
    """Pull the cotangents of all terms back to the parameters in one vector-Jacobian product, and square."""
    if not terms:
        return [None for _ in params]
    outputs = [term.output for term in terms]
    # Cotangents are made in float32 and are final: autocast must touch neither them nor the pass, whoever calls.
    with no_autocast(outputs[0].device):
        # A half-precision pass runs in the outputs' dtype: the scale goes in before the cast, out before the square.
        cotangents = [(cotangent(term) * scale).to(term.output.dtype) for term in terms]
        grads = torch.autograd.grad(outputs, params, cotangents, retain_graph=True, allow_unused=True)
    return [None if g is None else (g.detach() / scale if scale != 1 else g.detach()).square_() for g in grads]


class GaussNewtonBartlett:
    """Unbiased diagonal of the Gauss-Newton matrix: labels sampled from the model (arXiv 2305.14342, section 2.3)."""

    def __call__(
        self,
        terms: Sequence[LossTerm],
        params: Sequence[Tensor],
        generator: Generator | None = None,
        scale: float = 1.0,
    ) -> list[Tensor | None]:
        """Estimate with one sample of all labels; see `Estimator`."""
        return _squared_pullback(lambda term: term.sampled(generator), terms, params, scale)


class EmpiricalFisher:
    """The same with the true labels: the squared gradient that is often taken for Gauss-Newton-Bartlett.

    Kept as a named ablation. It is weighted as the sampled one, so that the two differ in the labels alone; it is no
    curvature, and vanishes where the gradient does.
    """

    def __call__(
        self,
        terms: Sequence[LossTerm],
        params: Sequence[Tensor],
        generator: Generator | None = None,
        scale: float = 1.0,
    ) -> list[Tensor | None]:
        """Estimate with the true labels; draws no noise; see `Estimator`."""
        return _squared_pullback(lambda term: term.observed(), terms, params, scale)


class RandomSigns:
    """The true labels' cotangents with a random sign for each output element: an empirical Gauss-Newton diagonal.

    Unlike the empirical Fisher it has no cross terms of different elements; see `signs.py`.
    """

    def __call__(
        self,
        terms: Sequence[LossTerm],
        params: Sequence[Tensor],
        generator: Generator | None = None,
        scale: float = 1.0,
    ) -> list[Tensor | None]:
        """Estimate with one set of signs; see `Estimator`."""

        def signed(term: LossTerm) -> Tensor:
            observed = term.observed()
            return observed * rademacher(observed, generator)

        return _squared_pullback(signed, terms, params, scale)


ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "gnb": GaussNewtonBartlett,
    "empirical_fisher": EmpiricalFisher,
    "sign": RandomSigns,
}
"""Estimators by the name that `hessian_estimator=` takes; an entry added here is accepted there."""

"""Estimators of a diagonal curvature, behind one interface.

An estimator pulls cotangents back through an existing graph. It runs no forward pass, writes no `.grad`, and
touches no buffer and no global random state. The graph stays usable for the ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from yolo_sophia.curvature.autocast import no_autocast
from yolo_sophia.curvature.likelihoods import LossTerm
from yolo_sophia.curvature.signs import rademacher


class Estimator:
    """From loss terms to one estimate of the diagonal per parameter; subclasses choose the cotangent of a term."""

    def cotangent(self, term: LossTerm, generator: Generator | None) -> Tensor:
        """What is pulled back for a term: a tensor of its output's shape, in float32 at least."""
        raise NotImplementedError

    def __call__(
        self,
        terms: Sequence[LossTerm],
        params: Sequence[Tensor],
        generator: Generator | None = None,
        scale: float = 1.0,
    ) -> list[Tensor | None]:
        """Pull the cotangents of all terms back to the parameters in one vector-Jacobian product, and square.

        Args:
            terms: The terms of the loss, their outputs in one autograd graph.
            params: Parameters to estimate for.
            generator: Source of the noise, on the outputs' device; None for the global one.
            scale: Factor for the cotangents against underflow in half precision; cancels in the result.

        Returns:
            Per parameter a tensor of its shape at the scale of the loss, or None where no term depends on it.
        """
        if not terms:
            return [None for _ in params]
        outputs = [term.output for term in terms]
        # Cotangents are made in float32 and are final: autocast must change neither them nor the pass.
        with no_autocast(outputs[0].device):
            # In half precision, the scale goes in before the cast and out before the square.
            cotangents = [(self.cotangent(term, generator) * scale).to(term.output.dtype) for term in terms]
            grads = torch.autograd.grad(outputs, params, cotangents, retain_graph=True, allow_unused=True)
        reached = [g.detach() for g in grads if g is not None]
        squares = iter(squared(torch._foreach_div(reached, scale) if scale != 1 else reached))
        return [None if g is None else next(squares) for g in grads]


def squared(grads: Sequence[Tensor]) -> list[Tensor]:
    """Squares of gradients, in their memory where it is theirs alone: a + b gives a and b the same tensor."""
    seen: set[int] = set()
    own = [g.clone() if g.data_ptr() in seen or seen.add(g.data_ptr()) or 0 in g.stride() else g for g in grads]
    torch._foreach_mul_(own, own)
    return own


class GaussNewtonBartlett(Estimator):
    """Unbiased diagonal of the Gauss-Newton matrix: labels sampled from the model (arXiv 2305.14342, section 2.3)."""

    def cotangent(self, term: LossTerm, generator: Generator | None) -> Tensor:
        """For one sample of the labels."""
        return term.sampled(generator)


class EmpiricalFisher(Estimator):
    """The same with the true labels: the squared gradient that is often taken for Gauss-Newton-Bartlett.

    It is an ablation, weighted as the sampled one, so that the two differ in the labels alone. It is no curvature: it
    vanishes where the gradient does.
    """

    def cotangent(self, term: LossTerm, generator: Generator | None) -> Tensor:
        """For the true labels; draws no noise."""
        return term.observed()


class RandomSigns(Estimator):
    """The true labels' cotangents with a random sign for each output element: an empirical Gauss-Newton diagonal.

    Unlike the empirical Fisher it has no cross terms of different elements; see `signs.py`.
    """

    def cotangent(self, term: LossTerm, generator: Generator | None) -> Tensor:
        """For the true labels, with random signs."""
        observed = term.observed()
        return observed * rademacher(observed, generator)


ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "gnb": GaussNewtonBartlett,
    "empirical_fisher": EmpiricalFisher,
    "sign": RandomSigns,
}
"""Estimators by the name that `hessian_estimator=` takes; an entry added here is accepted there."""

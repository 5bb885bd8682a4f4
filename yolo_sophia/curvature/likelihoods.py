"""Loss terms as likelihoods: from model outputs and loss coefficients to sampled cotangents.

A term  L = sum_i c_i * nll(y_i | f_i)  adds  sum_i c_i J_i^T S_i J_i  to the Gauss-Newton matrix, with
S_i = Cov(mu_i - y) for y drawn from the model's own p(. | f_i). The squared pull-back of the cotangent
sqrt(c_i) (mu_i - y_i) is, in expectation, the diagonal of that matrix (arXiv 2305.14342, section 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from yolo_sophia.curvature.signs import rademacher


class LossTerm(Protocol):
    """One term of a loss: an output in the autograd graph, and the cotangents that belong to it.

    Both methods return a tensor of the output's shape, detached, in float32 or the output's wider dtype.
    """

    output: Tensor

    def sampled(self, generator: Generator | None) -> Tensor:
        """Cotangent for labels drawn from the model; its second moment is the term's output curvature."""

    def observed(self) -> Tensor:
        """Cotangent for the true labels, weighted alike: the root of the coefficient times the gradient of the NLL."""


def wide(x: Tensor) -> torch.dtype:
    """The dtype to compute coefficients and curvatures in: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    """Detached, in at least float32: half-precision probabilities are too coarse to sample from."""
    return x.detach().to(wide(x))


@dataclass
class Likelihood:
    """A negative log-likelihood of an output, summed with coefficients: sum c nll(t | f).

    Attributes:
        output: f.
        coefficient: c, broadcastable to the output (for `Categorical` to a row of it), >= 0.
        target: t, of the shape of the output; used by `observed` only.
    """

    output: Tensor
    coefficient: Tensor
    target: Tensor | None = None

    @property
    def _root(self) -> Tensor:
        return self.coefficient.sqrt()


class Bernoulli(Likelihood):
    """Binary cross-entropy with logits, summed: sum c (softplus(f) - t f).

    The curvature p (1 - p) does not depend on the target t, which may be soft.
    """

    def sampled(self, generator: Generator | None) -> Tensor:
        """sqrt(c) (p - y), y ~ Bernoulli(p)."""
        p = _wide(self.output).sigmoid()
        return (p - torch.bernoulli(p, generator=generator)) * self._root

    def observed(self) -> Tensor:
        """sqrt(c) (p - t)."""
        return (_wide(self.output).sigmoid() - self.target) * self._root


class Categorical(Likelihood):
    """Cross-entropy over the last dimension, summed: sum c (logsumexp(f) - t . f).

    The output has the shape (..., classes). The curvature diag(p) - p p^T does not depend on the target t, which may be
    soft (distribution focal loss spreads it over two bins). A coefficient of 0 takes a row out of the loss.
    """

    def sampled(self, generator: Generator | None) -> Tensor:
        """sqrt(c) (p - onehot(y)), y ~ Categorical(p), by inversion of the cumulative distribution."""
        p = _wide(self.output).softmax(-1)
        u = torch.rand(p.shape[:-1] + (1,), generator=generator, device=p.device, dtype=p.dtype)
        # u < 1, but the sum can round below u: the last class takes what is left.
        y = (p.cumsum(-1) <= u).sum(-1, keepdim=True).clamp_(max=p.shape[-1] - 1)
        return p.scatter_add(-1, y, torch.full_like(u, -1.0)) * self._root

    def observed(self) -> Tensor:
        """sqrt(c) (p - t)."""
        return (_wide(self.output).softmax(-1) - self.target) * self._root


class Laplace(Likelihood):
    """Absolute error, summed: sum c |f - t|, the NLL of a Laplace distribution of scale 1.

    Its Hessian is 0 almost everywhere. The Fisher information 1 stands in for it. It depends on the unit of f: a scale
    of 1 is a convention.
    """

    def sampled(self, generator: Generator | None) -> Tensor:
        """sqrt(c) sign(f - y), y ~ Laplace(f): either sign with probability 1/2."""
        return rademacher(_wide(self.output), generator) * self._root

    def observed(self) -> Tensor:
        """sqrt(c) sign(f - t)."""
        return (_wide(self.output) - self.target).sign() * self._root


class Gaussian(Likelihood):
    """Negative log-likelihood of a normal distribution of unit variance, summed: sum c (f - t)^2 / 2.

    Another variance is part of the coefficient: c / variance.
    """

    def sampled(self, generator: Generator | None) -> Tensor:
        """sqrt(c) (f - y), y ~ Normal(f, 1)."""
        f = _wide(self.output)
        e = torch.randn(f.shape, generator=generator, device=f.device, dtype=f.dtype)
        return e * self._root

    def observed(self) -> Tensor:
        """sqrt(c) (f - t)."""
        return (_wide(self.output) - self.target) * self._root


@dataclass
class Quadratic:
    """A loss that is no likelihood, given by a positive semi-definite curvature of its output rows.

    Attributes:
        output: Outputs f, shape (..., d).
        root: A with A A^T the curvature of a row, coefficient included, shape (..., d, r).
        gradient: Gradient of the loss over the root of its coefficient, shape (..., d); used by `observed` only.
        coefficient: Coefficient of the loss, broadcastable to the gradient.
    """

    output: Tensor
    root: Tensor
    gradient: Tensor | None = None
    coefficient: Tensor | None = None

    def sampled(self, generator: Generator | None) -> Tensor:
        """A e, e ~ Normal(0, I)."""
        shape = self.root.shape[:-2] + (self.root.shape[-1], 1)
        e = torch.randn(shape, generator=generator, device=self.root.device, dtype=self.root.dtype)
        return (self.root @ e).squeeze(-1)

    def observed(self) -> Tensor:
        """The gradient as given."""
        return self.gradient

"""Hutchinson's estimate of the diagonal of the Hessian itself, for any scalar loss that can be differentiated twice.

For signs v with E[v v^T] = I, the elementwise product  v * (H v)  has the diagonal of H as its expectation
(arXiv 2305.14342, section 2.3). Unlike a Gauss-Newton diagonal it can be negative: where the loss curves down, or by
noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Generator, Tensor

from yolo_sophia.curvature.autocast import no_autocast
from yolo_sophia.curvature.signs import rademacher


class Hutchinson:
    """Unbiased diagonal of the Hessian from Hessian-vector products.

    As with the other estimators, no forward, no `.grad`, no buffer and no global random state is touched, and
    the graph stays usable for the ordinary backward pass. A sample costs about two backward passes.

    Args:
        n_samples: Sign vectors to average over, >= 1; the variance falls with their number.
        probes: The name of `n_samples` in version 0.1.

    Raises:
        ValueError: `n_samples` is out of range.
    """

    def __init__(self, n_samples: int = 1, *, probes: int | None = None):
        if probes is not None:
            warnings.warn("Hutchinson: probes= is now n_samples=; the old name will go.", FutureWarning, stacklevel=2)
            n_samples = probes
        if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
            raise ValueError(f"Invalid n_samples: found {n_samples!r}, expected an integer >= 1.")
        self.n_samples = n_samples

    def __call__(
        self, loss: Tensor, params: Sequence[Tensor], generator: Generator | None = None
    ) -> list[Tensor | None]:
        """Estimate the diagonal.

        Args:
            loss: Scalar loss, its graph not yet freed.
            params: Parameters to estimate for.
            generator: Source of the signs; None for the global one.

        Returns:
            Per parameter a tensor of its shape at the scale of the loss, or None where the loss does not depend on it.

        Raises:
            RuntimeError: The graph is freed or missing, or has an operation without a second derivative.
        """
        try:
            with no_autocast(loss.device):
                return self._estimate(loss, params, generator)
        except RuntimeError as error:
            reasons = (
                "scalar outputs",
                "does not require grad",
                "second time",
                "is not implemented",
                "once_differentiable",
            )
            if not any(reason in str(error) for reason in reasons):
                raise
            raise RuntimeError(
                "Hutchinson's estimate differentiates the loss twice, which failed here. It needs a scalar loss whose "
                "graph is still there (before backward(), or after backward(retain_graph=True)) and operations with a "
                f"second derivative; Gauss-Newton-Bartlett needs one derivative only. PyTorch says: {error}"
            ) from error

    def _estimate(self, loss: Tensor, params: Sequence[Tensor], generator: Generator | None) -> list[Tensor | None]:
        gradients = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        curved = [g for g in gradients if g is not None and g.requires_grad]  # the others are constant in all of them
        sums = [None if g is None else torch.zeros_like(p) for g, p in zip(gradients, params)]
        for _ in range(self.n_samples):
            signs = [rademacher(p, generator) for p in params]
            if not curved:
                break
            given = [v for g, v in zip(gradients, signs) if g is not None and g.requires_grad]
            products = torch.autograd.grad(curved, params, given, retain_graph=True, allow_unused=True)
            for total, v, product in zip(sums, signs, products):
                if product is not None and total is not None:
                    total.addcmul_(v, product.detach(), value=1 / self.n_samples)
        return sums


def twice_differentiable() -> AbstractContextManager:
    """Context in which attention uses operations that have a second derivative; the fused ones have none."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)

"""Random signs: the fallback for a loss that is no likelihood, and the noise of Hutchinson's estimate.

For a loss  L = sum_i l_i(f_i)  whose element i has the coefficient c_i, the cotangent  s_i l_i' / sqrt(c_i)  with
independent signs s_i has the empirical Gauss-Newton matrix  sum_i c_i (l_i' / c_i)^2 J_i J_i^T  as the second moment of
its pull-back. Like the empirical Fisher, it vanishes where the loss is fitted (docs/decisions/014-signed-gradients.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from yolo_sophia.curvature.autocast import no_autocast


def rademacher(like: Tensor, generator: Generator | None) -> Tensor:
    """Independent signs, -1 or 1 with equal probability, of the shape, dtype and device of a tensor."""
    device = like.device if generator is None else generator.device
    bits = torch.randint(0, 2, like.shape, generator=generator, device=device)
    return bits.to(like.device, like.dtype).mul_(2).sub_(1)


@dataclass
class SignRandomised:
    """A term known by its gradient alone, with a sign drawn for each output element.

    Attributes:
        output: Outputs f, any shape.
        gradient: l' / sqrt(c) per element, of the shape of the outputs, detached.
    """

    output: Tensor
    gradient: Tensor

    def sampled(self, generator: Generator | None) -> Tensor:
        """The gradient s l' / sqrt(c), s = -1 or 1 for each element."""
        return self.gradient * rademacher(self.gradient, generator)

    def observed(self) -> Tensor:
        """The gradient as given."""
        return self.gradient


def sign_randomised(loss: Tensor, outputs: Sequence[Tensor], coefficient: float = 1.0) -> list[SignRandomised]:
    """Terms of any scalar loss over outputs in its graph; the graph stays usable.

    Args:
        loss: The loss, a sum of terms that each depend on one output element. For others (normalised over a row, say)
            the estimate leaves the coupling of the elements out.
        outputs: Tensors that the loss was computed from, in its graph.
        coefficient: c of each element's term: 1 for a sum, 1/N for a mean over N elements. Without it the estimate of
            a mean is N times too small.

    Raises:
        ValueError: The coefficient is not positive, or the loss depends on none of the outputs.
    """
    if not coefficient > 0:
        raise ValueError(f"coefficient must be positive, found {coefficient}: 1 for a sum, 1/N for a mean.")
    with no_autocast(loss.device):
        gradients = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
    terms = [
        SignRandomised(f, g.detach().to(torch.promote_types(g.dtype, torch.float32)) / coefficient**0.5)
        for f, g in zip(outputs, gradients)
        if g is not None
    ]
    if not terms:
        raise ValueError(f"The loss depends on none of the {len(outputs)} outputs; pass those it was computed from.")
    return terms

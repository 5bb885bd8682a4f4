"""Losses that are no likelihoods, row by row: IoU, keypoint similarity, an angle.

Such a loss is a sum over rows (an anchor's box, a keypoint). Its curvature is the small Hessian of each row
with negative eigenvalues dropped, which makes it a Gauss-Newton matrix of that loss. The criterion's own callable is
differentiated, so its formula is written nowhere here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from yolo_sophia.curvature import Quadratic
from yolo_sophia.curvature.autocast import no_autocast
from yolo_sophia.curvature.likelihoods import wide


def quadratic(output: Tensor, coefficient: Tensor, loss: Callable[[Tensor], Tensor]) -> Quadratic:
    """A loss term with the projected Hessian of each row.

    A row whose Hessian is not finite (degenerate boxes) counts as flat.

    Args:
        output: Rows in the graph, shape (N, d).
        coefficient: Coefficient of each row's loss, shape (N,).
        loss: From detached rows, shape (N, d), to the sum of their losses without coefficients.
    """
    with torch.enable_grad(), no_autocast(output.device):
        rows = output.detach().to(wide(output)).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(rows), rows, create_graph=True)
        hessian = jacobian_of_rows(gradient, rows)
    finite = hessian.isfinite().flatten(1).all(1)[:, None, None]
    values, vectors = eigh(torch.where(finite, hessian + hessian.mT, 0) / 2)
    root = (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.mT  # symmetric: the same on every device
    scale = coefficient.sqrt()[:, None]
    return Quadratic(output, root * scale[..., None], gradient.detach() * scale, coefficient[:, None])


def jacobian_of_rows(outputs: Tensor, rows: Tensor) -> Tensor:
    """Derivatives of each row of the outputs by the row of the same number, shape (N, m, d).

    Args:
        outputs: Rows in the graph, shape (N, m).
        rows: What they were made from, shape (N, d).
    """
    m = outputs.shape[1]
    one = torch.eye(m, dtype=outputs.dtype, device=outputs.device)[:, None].expand(m, *outputs.shape)
    try:  # all columns in one pass: its operators are small and many
        (columns,) = torch.autograd.grad(outputs, rows, one, retain_graph=True, is_grads_batched=True)
    except RuntimeError:  # one of them cannot be batched
        columns = torch.stack([torch.autograd.grad(outputs, rows, g, retain_graph=True)[0] for g in one])
    return columns.movedim(0, 1)


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, shape (N, d), and eigenvectors, shape (N, d, d), of symmetric matrices; on the CPU for MPS."""
    device = matrices.device
    values, vectors = torch.linalg.eigh(matrices.cpu() if device.type == "mps" else matrices)
    return values.to(device), vectors.to(device)

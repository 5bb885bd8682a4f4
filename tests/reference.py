"""Oracles for `SophiaG`: the paper's algorithm, written naively, and the official release under the same gradients.

Nothing here shares code with the package. Paper: arXiv 2305.14342, algorithm 3; eps is added, as in the official code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sophia_opt
import torch
from torch import Tensor

from yolo_sophia.optim import SophiaG


def sophia(
    theta: Tensor,
    gradients: Sequence[Tensor],
    estimates: Mapping[int, Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.965, 0.99),
    rho: float = 0.04,
    weight_decay: float = 0.1,
    eps: float = 1e-15,
    bias_correction: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return theta, m and h after one step per gradient; `estimates[k]` is the h_hat that arrives before step k."""
    (beta1, beta2), updates = betas, 0
    m, h = torch.zeros_like(theta), torch.zeros_like(theta)
    for k, g in enumerate(gradients):
        m = beta1 * m + (1 - beta1) * g
        if k in estimates:
            h = beta2 * h + (1 - beta2) * estimates[k]
            updates += 1
        corrected = h / (1 - beta2**updates) if bias_correction and updates else h
        theta = theta - lr * weight_decay * theta
        theta = theta - lr * torch.clamp(m / (rho * corrected + eps), min=-1, max=1)
    return theta, m, h


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two entries, relative to the largest expected entry; NaN if there is a NaN."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return ((found - expected).abs().max() / scale).item()


def official_parity(dtype: torch.dtype, *, foreach: bool | None, maximize: bool) -> float:
    """Return the largest relative difference to `sophia-opt` of any parameter, momentum or curvature in 100 steps.

    Both optimizers start from the same point and are given the same gradients (of scales from 1e-3 to 1e3, so that some
    coordinates are clipped and some are not); h is updated from `.grad` every 10th step. The three groups differ in
    every hyperparameter; the last tensor gets no gradient in the first 25 steps.
    """
    shapes, bs = ((16, 3, 3, 3), (16,), (8, 16), (8,), ()), 24
    noise = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype)

    start = [draw(shape) for shape in shapes]
    scales = [10 ** (3 * torch.tanh(draw(shape))) for shape in shapes]

    def build(kind: type[torch.optim.Optimizer], **options) -> tuple[list[Tensor], torch.optim.Optimizer]:
        params = [torch.nn.Parameter(p.clone()) for p in start]
        groups = [
            {"params": params[:2], "lr": 3e-2, "rho": 0.04, "weight_decay": 0.2},
            {"params": params[2:3], "lr": 1e-2, "rho": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.95)},
            {"params": params[3:], "lr": 1e-1, "rho": 0.01, "weight_decay": 0.05},
        ]
        return params, kind(groups, maximize=maximize, **options)

    def give_gradients(step: int) -> None:
        for i, scale in enumerate(scales):
            gradient = None if step < 25 and i == len(shapes) - 1 else draw(scale.shape) * scale
            params[i].grad = theirs[i].grad = gradient

    (params, ours), (theirs, official) = build(SophiaG, foreach=foreach), build(sophia_opt.SophiaG)
    errors, clipped = [], []
    for step in range(100):
        if step % 10 == 0:
            give_gradients(step)
            ours.update_hessian()
            official.update_hessian()
        give_gradients(step)
        ours.step(bs=bs)
        official.step(bs=bs)
        for p, q in zip(params, theirs):
            assert (p in ours.state) == (q in official.state)
            pairs = [(ours.state[p][key], value) for key, value in official.state.get(q, {}).items()]
            errors += [relative_difference(*pair) for pair in [(p.detach(), q.detach()), *pairs]]
        m, h = official.state[theirs[0]]["exp_avg"], official.state[theirs[0]]["hessian"]
        clipped.append((m.abs() > 0.04 * bs * h).float().mean())
    share = torch.stack(clipped).mean()
    assert 0.1 < share < 0.9, f"{share:.0%} of the coordinates clipped: the run does not exercise both branches"
    return torch.tensor(errors, dtype=torch.float64).max().item()  # unlike the built-in max, keeps a NaN

"""What Sophia does, in figures: sampled during an epoch, averaged into one row of results.csv.

Nothing waits for the device within an epoch; the samples stay there until the epoch's row is written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from yolo_sophia.optim._base import SophiaBase
from yolo_sophia.optim._hessian import bias_correction_factor
from yolo_sophia.optim._step import denominator, hessian_scale

SAMPLED = ("clip_fraction", "grad_norm", "momentum_norm", "hessian_norm", "update_norm")
SAMPLE_EVERY = 10
"""Optimizer steps from one sample to the next, from the first step of an epoch on: no row is without a gradient norm.
A sample costs about as much as a step of the optimizer."""
TOGETHER = 64
"""Tensors in one call: few kernels on a GPU, and copies of a part of the parameters only."""


class Monitor:
    """Collects an epoch's figures of one optimizer.

    Args:
        optimizer: Its groups hold the counters of `_schedule.COUNTERS`.
    """

    def __init__(self, optimizer: SophiaBase):
        self.optimizer = optimizer
        self.reset()

    def reset(self) -> None:
        """Forget what was sampled since the last row."""
        self.hessian_seconds = 0.0
        self._samples: list[Tensor] = []
        self._grad_norm: Tensor | None = None
        self._steps = 0

    def before_step(self) -> None:
        """Decide whether this step is sampled, and take the gradient's norm while it is there."""
        self._grad_norm = None
        if self._steps % SAMPLE_EVERY == 0:
            grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._grad_norm = torch.stack(torch._foreach_norm(grads)).norm() if grads else None
        self._steps += 1

    def after_step(self) -> None:
        """Sample, if `before_step` decided so."""
        if self._grad_norm is not None:
            grad_norm, found_inf = self._grad_norm.reshape(1).float(), self.optimizer.found_inf
            is_taken = torch.ones_like(grad_norm) if found_inf is None else (found_inf == 0).reshape(1).float()
            self._samples.append(torch.cat([self._state_figures(), grad_norm, is_taken]))
            self._grad_norm = None

    @torch.no_grad()
    def _state_figures(self) -> Tensor:
        """Clipped fraction (before caution), then the norms of m, h (bias corrected) and the update, shape (4,)."""
        parts = []
        for group in self.optimizer.param_groups:
            params = [p for p in group["params"] if self.optimizer.state.get(p)]
            parts += [self._part(group, params[i : i + TOGETHER]) for i in range(0, len(params), TOGETHER)]
        if not parts:
            return torch.full((4,), math.nan)
        count = sum(p.numel() for g in self.optimizer.param_groups for p in g["params"] if p in self.optimizer.state)
        clipped, *squares = torch.stack(parts).sum(0)
        return torch.stack([clipped / count, *(x.sqrt() for x in squares)])

    def _part(self, group: dict, params: list[Tensor]) -> Tensor:
        """Of some parameters of a group: clipped coordinates, then the squared norms, shape (4,)."""
        states = [self.optimizer.state[p] for p in params]
        m, h = ([state[key].float() for state in states] for key in ("exp_avg", "hessian"))
        corrections = [bias_correction_factor(group, state) for state in states]
        scale = hessian_scale(group["rho"], group["hessian_power"])
        update = denominator(
            h,
            [scale / c for c in corrections],
            group["eps"],
            eps_is_minimum=self.optimizer.eps_is_minimum,
            hessian_power=group["hessian_power"],
        )
        update = torch._foreach_div(m, update)
        torch._foreach_clamp_min_(update, -1.0)
        torch._foreach_clamp_max_(update, 1.0)
        moved = update
        if group["cautious"] and all(p.grad is not None for p in params):
            against = torch._foreach_mul(update, [p.grad.float() for p in params])
            torch._foreach_sign_(against)
            torch._foreach_clamp_min_(against, 0.0)
            moved = torch._foreach_mul(update, against)
        norms = [torch._foreach_norm(tensors) for tensors in (m, h, moved)]
        torch._foreach_div_(norms[1], corrections)
        torch._foreach_mul_(norms[2], float(group["lr"]))
        torch._foreach_abs_(update)
        torch._foreach_floor_(update)  # 1 where it is clipped, else 0
        clipped = torch.stack(torch._foreach_norm(update, ord=1)).sum()
        return torch.stack([clipped, *(torch.stack(x).square().sum() for x in norms)])

    def epoch(self) -> dict[str, float]:
        """Means of this epoch's samples and the counters, by their name in results.csv; starts the next epoch."""
        samples = torch.stack(self._samples) if self._samples else torch.empty(0, 6)
        if not len(taken := samples[samples[:, -1] > 0, :-1]):  # no step was taken: the state speaks for the epoch
            figures = self._state_figures()
            taken = torch.cat([figures, figures.new_full((1,), math.nan)]).unsqueeze(0)
        clip, momentum, hessian, update, grad = taken.mean(0).tolist()
        counters = self.optimizer.param_groups[0]
        row = dict(zip(SAMPLED, (clip, grad, momentum, hessian, update)))
        row |= {
            "rho": self._rho(),
            "refreshes": counters["hessian_updates"],
            "dropped": counters["hessian_dropped"],
            "refresh_seconds": self.hessian_seconds,
        }
        self.reset()
        return {f"sophia/{key}": value for key, value in row.items()}

    def _rho(self) -> float:
        """The rho that parameters move with: of a group that is trained, if possible one whose rho is automatic."""
        groups = self.optimizer.param_groups
        trained = [g for g in groups if any(p.requires_grad and self.optimizer.state.get(p) for p in g["params"])]
        automatic = [group for group in trained if group["clip_fraction"] is not None]
        return (automatic or trained or groups)[0]["rho"]

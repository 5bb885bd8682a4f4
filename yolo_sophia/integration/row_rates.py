"""Rows of one tensor that learn at another rate than the rest of it.

The rate that the rows should have is that of a parameter group of its own, which may be empty: Ultralytics' warm-up and
schedule set it as they set the others, results.csv shows it, and a resumed run restores it. Sophia's optimizers take
the factor inside their step. For any other optimizer the move of the rows, decoupled weight decay included, is rescaled
after the step and before the EMA reads the weights. That is exact up to rounding if the move is proportional to lr and
the optimizer keeps no copy of the parameters; `check_rescalable` tries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from yolo_sophia.optim._state import StatefulOptimizer

PROBE_STEPS = 12
"""Steps of the trial: Lookahead moves back every 5 or 6."""
TOLERANCE = 0.05
"""Relative deviation of a move that is allowed in it: layer-wise rates (LAMB) depend on the norm of the parameters."""


@dataclass(frozen=True)
class RowRate:
    """Rows of a parameter with the rate of another group.

    Attributes:
        parameter: The parameter.
        rows: Indices in its first dimension.
        group: Index of the group that it is in.
        reference: Index of the group whose rate the rows should have.
    """

    parameter: nn.Parameter
    rows: tuple[int, ...]
    group: int
    reference: int

    def factor(self, groups: Sequence[Mapping[str, Any]]) -> float:
        """The rate of the rows over that of the group; 1 where the group stands still."""
        current = float(groups[self.group]["lr"])
        return float(groups[self.reference]["lr"]) / current if current > 0 else 1.0


def attach(optimizer: Optimizer, rates: Sequence[RowRate]) -> None:
    """Give rows their rates in every step of an optimizer from now on; a step that is skipped moves nothing."""
    if rates:
        (_InStep if isinstance(optimizer, StatefulOptimizer) else _AfterStep)(optimizer, rates)


class _InStep:
    """Sets `row_factors` of an optimizer of the Sophia family."""

    def __init__(self, optimizer: StatefulOptimizer, rates: Sequence[RowRate]):
        self.optimizer, self.rates = optimizer, rates
        self.factors = [1.0] * len(rates)
        optimizer.register_step_pre_hook(self._before)

    def _before(self, *_: Any) -> None:
        for i, rate in enumerate(self.rates):
            factor = rate.factor(self.optimizer.param_groups)
            if factor != self.factors[i]:
                p = rate.parameter
                factors = torch.ones(len(p), *[1] * (p.dim() - 1), device=p.device)
                factors[list(rate.rows)] = factor
                self.optimizer.row_factors[p], self.factors[i] = factors, factor


class _AfterStep:
    """Rescales the move of rows after the step of any other optimizer."""

    def __init__(self, optimizer: Optimizer, rates: Sequence[RowRate]):
        self.optimizer = optimizer
        self.rates = [(rate, torch.tensor(rate.rows, device=rate.parameter.device)) for rate in rates]
        self.before: list[tuple[nn.Parameter, Tensor, Tensor, float]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, *_: Any) -> None:
        self.before = []
        for rate, rows in self.rates:
            factor = rate.factor(self.optimizer.param_groups)
            if factor != 1:
                self.before.append((rate.parameter, rows, rate.parameter.detach()[rows], factor))

    def _after(self, *_: Any) -> None:
        for parameter, rows, before, factor in self.before:
            values = parameter.detach()
            move = values[rows].float() - before.float()
            values.index_copy_(0, rows, (before.float() + move * factor).to(values.dtype))
        self.before = []


def check_rescalable(
    make: Callable[[list[dict[str, Any]]], Optimizer], groups: Iterable[Mapping[str, Any]], name: str
) -> None:
    """Refuse an optimizer whose moves cannot be rescaled from outside.

    It trains a small tensor twice with the same gradients, the second time at alternating rates with every move doubled
    or not. The moves before rescaling must differ by the rates alone.

    Args:
        make: Constructs the optimizer over parameter groups.
        groups: Parameter groups that have such rows.
        name: Of the optimizer, for the message.

    Raises:
        ValueError: The moves differ in another way, as those of schedule-free optimizers, Lookahead, relative steps and
            distance estimates do.
    """
    for group in groups:
        problem = _problem(make, {key: value for key, value in group.items() if key != "params"})
        if problem:
            raise ValueError(
                f"lr_factors: the new rows of a tensor cannot have a rate of their own with optimizer={name}: "
                f"{problem}. Take {'new'!r} out of lr_factors, or name whole tensors by a pattern."
            )


def _problem(make: Callable, group: dict[str, Any]) -> str | None:
    error = ""
    for dtype in (torch.float64, torch.float32):  # some have kernels for float32 alone
        try:
            plain, changed = (_moves(make, group, dtype, factors) for factors in ((1.0, 1.0), (1.0, 2.0)))
        except Exception as caught:  # third-party code: whatever it does with a small tensor on this device
            error = f"{type(caught).__name__}: {caught}"
            continue
        if not any(bool(move.any()) for move in plain):
            return "a small tensor does not move in a trial"
        for step, (one, other) in enumerate(zip(plain, changed)):
            expected = one * (1.0, 2.0)[step % 2]
            if not float((other - expected).norm()) <= TOLERANCE * float(expected.norm()):
                return "its move is not proportional to lr, or it keeps a copy of the parameters"
        return None
    return f"a trial of it ended in {error}"


def _moves(make: Callable, group: dict[str, Any], dtype: torch.dtype, factors: tuple[float, float]) -> list[Tensor]:
    """The moves of a small tensor at alternating rates; after each, half of its rows are moved once more."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.rand(4, 6, generator=generator, dtype=dtype) + 0.5)
    downhill = torch.randn(p.shape, generator=generator, dtype=dtype)  # a distance estimate grows along it alone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = make([{**group, "params": [p], "weight_decay": 0.0}])
        moves, lr = [], float(optimizer.param_groups[0]["lr"])
        for step in range(PROBE_STEPS):
            optimizer.param_groups[0]["lr"] = lr * factors[step % 2]
            p.grad = downhill + torch.randn(p.shape, generator=generator, dtype=dtype) / 2
            before = p.detach().clone()
            optimizer.step()
            moves.append(p.detach() - before)
            with torch.no_grad():
                p[:2] += moves[-1][:2] * (factors[1] - 1)
    return moves

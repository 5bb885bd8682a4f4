"""What is the curvature worth? AdamW whose denominator the curvature h can raise, with a dial for how often it does.

    m <- b1 m + (1 - b1) g,  v <- b v + (1 - b) g^2,  d = sqrt(v / (1 - b^t)) + eps
    theta <- theta - lr wd theta - lr mask * m / (1 - b1^t) / max(d, rho h)

Rho is steered so that a share s of the coordinates with h > 0 has rho h > d. At s = 0 this is AdamW. For
`scripts/study_runs.py`, as `lab: study_dial.Dial`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from yolo_sophia.optim import SophiaG
from yolo_sophia.optim._auto_rho import _stride, smoothed
from yolo_sophia.optim._hessian import bias_correction_factor
from yolo_sophia.optim._skipping import Members

RECORD_EVERY = 10
"""Steps from one record to the next."""
UPDATES_BEFORE_RATES = 20
"""Hessian updates before the rates of blocks are set."""
LARGEST_RATE = 4.0
"""Rates of blocks are between 1 / 4 and 4."""
RULES = ("dial", "sophia")
CURVATURES = ("own", "permuted", "mean")


@dataclass(frozen=True)
class Settings:
    """Settings of an arm.

    Attributes:
        rule: "dial", or "sophia" for SophiaG's own rule.
        share: s, in [0, 1).
        curvature: The h that the dial uses: "own", "permuted" (the entries of a tensor change places, always in the
            same way) or "mean" (of the tensor).
        v_decay: Decay b of v.
        eps: Added to the square root of v.
        rescaled: Whether the cautious mask is divided by its mean, as in timm.
        exponent: a of the rates by block, (median(s) / s_b)^a with s_b the mean of h in block b; 0 leaves them out.
        shuffled: Whether the blocks exchange their rates.
        seed: Of the permutations.
    """

    rule: str = "dial"
    share: float = 0.6
    curvature: str = "own"
    v_decay: float = 0.999
    eps: float = 1e-8
    rescaled: bool = True
    exponent: float = 0.0
    shuffled: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.rule not in RULES or self.curvature not in CURVATURES or not 0 <= self.share < 1:
            raise ValueError(f"Expected a rule of {RULES}, a curvature of {CURVATURES}, a share in [0, 1): {self}.")


@dataclass
class Record:
    """Means over a training, sampled every few steps.

    Attributes:
        moved: Root mean square of the update before lr, per sample.
        curbed: Share of the coordinates with h > 0 that has rho h > d, per sample.
        rates: Rate by block.
    """

    moved: list[float] = field(default_factory=list)
    curbed: list[float] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)


class Dial(SophiaG):
    """SophiaG with the rule of this file; arguments as there. `settings` are those of `Settings`.

    Rho is shared by all parameter groups. `begin` names the blocks; without it, there are no rates by block.
    """

    settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any):
        self.chosen, self.record = Settings(**self.settings), Record()
        self.blocks: dict[Tensor, str] = {}
        self._permutations: dict[Tensor, Tensor] = {}
        self._rho, self._measurements, self._is_due, self._taken = 0.0, 0, False, 0
        super().__init__(*args, **kwargs)

    @property
    def figures(self) -> dict[str, Any]:
        """What a result file holds of the run."""
        means = {key: sum(x) / len(x) if (x := getattr(self.record, key)) else None for key in ("moved", "curbed")}
        return {**means, "rho": self._rho, "rates": self.record.rates}

    def begin(self, model: nn.Module) -> None:
        """Name the block of each parameter of a YOLOv8 model."""
        self.blocks = {p: block_of(name, len(model.model) - 1) for name, p in model.named_parameters()}

    def _move_hessian(self, values, squared: bool = False) -> None:
        super()._move_hessian(values, squared)
        self._is_due = True
        pairs = [(g, p) for g, p in self._parameters() if self.state.get(p)]
        if self.chosen.exponent and self.blocks and not self.record.rates:
            if min(self.state[p]["hessian_updates"] for _, p in pairs) >= UPDATES_BEFORE_RATES:
                self._set_rates(pairs)

    def _set_rates(self, pairs: Iterable[tuple[dict[str, Any], Tensor]]) -> None:
        sums: dict[str, list[float]] = {}
        for group, p in pairs:
            total = sums.setdefault(self.blocks[p], [0.0, 0])
            total[0] += float(self.state[p]["hessian"].sum()) / bias_correction_factor(group, self.state[p])
            total[1] += p.numel()
        self.record.rates = rates_of({block: total / n for block, (total, n) in sums.items()}, self.chosen)

    def _members(self, group: dict[str, Any]) -> Members | None:
        """As in the base class, the factors times the rate of the block."""
        members = super()._members(group)
        if members is None or not self.record.rates:
            return members
        *tensors, factors = members.columns
        rates = [self.record.rates[self.blocks[p]] for p in tensors[0]]
        factors = [tensors[0][0].new_tensor(r) if f is None else f * r for f, r in zip(factors, rates)]
        return members._replace(columns=(*tensors, factors))

    def _move_parameters(self, factor: float = 1.0) -> None:
        samples = self._taken % RECORD_EVERY == 0
        before = [p.detach().clone() for _, p in self._parameters()] if samples else []
        if self.chosen.rule == "sophia":
            super()._move_parameters(factor)
        else:
            self._dial()
        if samples:
            self._sample(before)
        self._taken += 1

    def _sample(self, before: list[Tensor]) -> None:
        squares, count = 0.0, 0
        for (group, p), old in zip(self._parameters(), before):
            lr, row = float(group["lr"]), self.row_factors.get(p, 1.0)
            rate = self.record.rates[self.blocks[p]] if self.record.rates else 1.0
            if lr > 0 and p.grad is not None:
                squares += float(((p.detach() - old) / (lr * rate * row)).square().sum())
                count += p.numel()
        if count:
            self.record.moved.append((squares / count) ** 0.5)

    # The rule -------------------------------------------------------------------------------------------------------

    def _dial(self) -> None:
        """One step."""
        members = [m for group in self.param_groups if (m := self._members(group)) is not None]
        if self._reads_skip():
            return
        self._count([state for each in members for state in each.states])
        floors = [self._move_moments(each) for each in members]
        if self._is_due and self.chosen.share:
            self._measure_rho(members, floors)
        if self.chosen.share and self._taken % RECORD_EVERY == 0:
            self.record.curbed.append(self._share(members, floors))
        for each, divisors in zip(members, floors):
            self._move(each, divisors)

    def _move_moments(self, members: Members) -> list[Tensor]:
        """Update m and v; returns d for each parameter."""
        (_, grads, momenta, _, _), beta1, b = members.columns, members.group["betas"][0], self.chosen.v_decay
        floors = []
        for g, m, state in zip(grads, momenta, members.states):
            if "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(m)
            v = state["exp_avg_sq"]
            m.lerp_(g, 1 - beta1)
            v.mul_(b).addcmul_(g, g, value=1 - b)
            floors.append((v / (1 - b ** int(state["step"]))).sqrt_().add_(self.chosen.eps))
        return floors

    def _curvature(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """The h that the rule uses for a parameter, bias corrected."""
        h = self.state[p]["hessian"] / bias_correction_factor(group, self.state[p])
        if self.chosen.curvature == "mean":
            return h.mean().expand_as(h)
        if self.chosen.curvature == "permuted":
            if p not in self._permutations:
                generator = torch.Generator().manual_seed(self.chosen.seed + len(self._permutations))
                self._permutations[p] = torch.randperm(p.numel(), generator=generator).to(p.device)
            return h.reshape(-1)[self._permutations[p]].view_as(h)
        return h

    def _pairs(self, members: Iterable[Members], floors: Iterable[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """D and h of every parameter, flat."""
        return [
            (d.reshape(-1), self._curvature(p, each.group).reshape(-1))
            for each, divisors in zip(members, floors)
            for p, d in zip(each.columns[0], divisors)
        ]

    def _measure_rho(self, members: list[Members], floors: list[list[Tensor]]) -> None:
        """Rho for the share s: the s-quantile of d / h over every n-th coordinate, averaged as in SophiaG."""
        pairs = self._pairs(members, floors)
        stride = _stride(sum(d.numel() for d, _ in pairs))
        ratio = torch.cat([(d / h)[h > 0].cpu() for d, h in ((d[::stride], h[::stride]) for d, h in pairs)])
        self._is_due = False
        if len(ratio):
            rank = 1 + int(self.chosen.share * len(ratio))
            quantile = float(ratio.kthvalue(rank).values)
            self._rho = smoothed(self._rho or quantile, self._measurements, quantile)
            self._measurements += 1

    def _share(self, members: list[Members], floors: list[list[Tensor]]) -> float:
        curbed = positive = 0
        for d, h in self._pairs(members, floors):
            curbed += int((self._rho * h > d).sum())
            positive += int((h > 0).sum())
        return curbed / max(positive, 1)

    def _move(self, members: Members, floors: list[Tensor]) -> None:
        group, (params, grads, momenta, _, factors) = members.group, members.columns
        lr = float(group["lr"])
        for p, g, m, d, factor, state in zip(params, grads, momenta, floors, factors, members.states):
            if self._rho:
                d = torch.maximum(d, self._curvature(p, group) * self._rho)
            update = m / d / (1 - group["betas"][0] ** int(state["step"]))
            if group["cautious"]:
                mask = (m * g > 0).to(m.dtype)
                update *= mask.div_(mask.mean().clamp_(min=1e-3)) if self.chosen.rescaled else mask
            factor = 1.0 if factor is None else factor
            p.mul_(1 - lr * group["weight_decay"] * factor)
            p.add_(update * factor, alpha=-lr)


def block_of(name: str, head: int) -> str:
    """The block of a parameter of a YOLOv8 model, whose layer `head` is its detection head."""
    layer = int(re.match(r"(?:module\.)?model\.(\d+)\.", name)[1])
    if ".bn." in name:
        return "BatchNorm"
    if name.endswith(".bias"):
        return "biases"
    if layer == head:
        if ".cv3." in name:
            return "class rows" if re.search(r"\.cv3\.\d\.2\.weight$", name) else "class hidden"
        return "box"
    return "neck" if layer > 9 else ("stem", "C2f 1", "C2f 2", "C2f 3", "C2f 4")[min((layer + 1) // 2, 4)]


def rates_of(means: Mapping[str, float], settings: Settings) -> dict[str, float]:
    """The rate of each block from its mean of h."""
    blocks, values = list(means), torch.tensor(list(means.values()), dtype=torch.float64)
    rates = (values.median() / values).pow(settings.exponent).clamp(1 / LARGEST_RATE, LARGEST_RATE)
    if settings.shuffled:
        rates = rates[torch.randperm(len(rates), generator=torch.Generator().manual_seed(settings.seed))]
    return dict(zip(blocks, rates.tolist()))

"""Rows of one tensor at a rate of their own, against an optimizer in which those rows are a parameter by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from yolo_sophia import SophiaG
from yolo_sophia.integration.row_rates import RowRate, attach, check_rescalable

try:
    from ultralytics.optim import MuSGD
except ImportError:  # before 8.4
    MuSGD = None

pytestmark = pytest.mark.compat

STEPS, FACTOR, ROWS = 12, 7.0, (1, 3)
SCHEDULE = [(0.0, 0.0), (0.02, 0.02), (0.01, 0.04), *[(0.004 * (12 - i), 0.028 * (12 - i)) for i in range(9)]]
"""Rates of the group and of its rows: at first a warm-up, in which both start at the same rate."""
OTHERS = (0, 2, 4)


class CautiousAdamW(torch.optim.Optimizer):
    """AdamW with the mask of arXiv 2411.16085, without the division by its mean, which depends on the other rows."""

    def __init__(self, params, lr=0.01, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                m, v = (state.setdefault(key, torch.zeros_like(p)) for key in ("m", "v"))
                m.lerp_(p.grad, 0.1)
                v.lerp_(p.grad.square(), 0.001)
                scale = (v / (1 - 0.999 ** state["step"])).sqrt().add_(1e-8)
                mask = (m * p.grad > 0).to(p.dtype)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(m * mask / (1 - 0.9 ** state["step"]), scale, value=-group["lr"])


def musgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Ultralytics' own, as its trainer makes it; groups without Muon, as a row of Muon depends on the other rows."""
    return MuSGD(groups, lr=0.01, momentum=0.9, nesterov=True)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "AdamW foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, foreach=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.9),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "AdamW cautious": CautiousAdamW,
    **({} if MuSGD is None else {"MuSGD": musgd}),
    "SophiaG": lambda groups: SophiaG(groups, lr=0.01, weight_decay=0.1, rho=0.5),
}


def gradients(steps: int = STEPS, shape: tuple[int, ...] = (5, 3, 1, 1)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def start(shape: tuple[int, ...] = (5, 3, 1, 1)) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) - 0.5


def by_rows(make: Callable, whole: bool = False) -> tuple[Tensor, torch.optim.Optimizer]:
    """A tensor that is trained in one piece, its rows at their rate."""
    p = nn.Parameter(start())
    optimizer = make([{"params": [p]}, {"params": []}])
    attach(optimizer, [RowRate(p, tuple(range(5)) if whole else ROWS, 0, 1)])
    for (rate, row_rate), grad in zip(SCHEDULE, gradients()):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, row_rate
        p.grad = grad.clone()
        if isinstance(optimizer, SophiaG):
            optimizer.update_hessian([grad.square()])
        optimizer.step()
    return p.detach(), optimizer


def by_parameters(make: Callable) -> Tensor:
    """The same with the rows as a parameter by themselves, in a group of their own."""
    whole = start()
    pieces = [nn.Parameter(whole[list(rows)].clone()) for rows in (OTHERS, ROWS)]
    optimizer = make([{"params": [piece]} for piece in pieces])
    for rates, grad in zip(SCHEDULE, gradients()):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        for piece, rows in zip(pieces, (OTHERS, ROWS)):
            piece.grad = grad[list(rows)].clone()
        if isinstance(optimizer, SophiaG):
            optimizer.update_hessian([piece.grad.square() for piece in pieces])
        optimizer.step()
    for piece, rows in zip(pieces, (OTHERS, ROWS)):
        whole[list(rows)] = piece.detach()
    return whole


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_move_as_parameters_by_themselves(name):
    found, _ = by_rows(OPTIMIZERS[name])
    expected = by_parameters(OPTIMIZERS[name])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert float((found - start())[list(ROWS)].abs().mean()) > 2 * float((found - start())[list(OTHERS)].abs().mean())


@pytest.mark.requires(MuSGD is not None, reason="this Ultralytics has no MuSGD")
def test_muon_moves_rows_in_proportion():
    """Its move of a row depends on the other rows: the reference is the move of the whole tensor at both rates."""
    moves = []
    for rates, rows in (((0.01, 0.01), ()), ((0.01, 0.03), ROWS)):
        p = nn.Parameter(start((8, 6)))
        kinds = {"use_muon": True, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
        optimizer = MuSGD([{"params": [p], **kinds}, {"params": [], **kinds}], lr=0.01, muon=0.2, sgd=1.0)
        attach(optimizer, [RowRate(p, rows, 0, 1)] if rows else [])
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rates
        p.grad = gradients(1, (8, 6))[0]
        optimizer.step()
        moves.append(p.detach() - start((8, 6)))
    plain, scaled = moves
    expected = plain.clone()
    expected[list(ROWS)] *= 3
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=1e-7)


def test_the_ema_reads_rescaled_weights_and_a_skipped_step_moves_nothing():
    """GradScaler does not call a step whose gradients are not finite; hooks of the step do not run then."""
    p = nn.Parameter(start())
    optimizer = torch.optim.SGD([{"params": [p]}, {"params": []}], lr=0.01)
    attach(optimizer, [RowRate(p, ROWS, 0, 1)])
    optimizer.param_groups[1]["lr"] = 0.05
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    for grad, moved in ((torch.full_like(p, torch.inf), False), (torch.ones_like(p), True)):
        scaler.scale(torch.zeros(()))  # as before a backward pass
        p.grad, before = grad.clone(), p.detach().clone()
        scaler.unscale_(optimizer)
        scale = float(scaler.get_scale()) if moved else 1.0
        p.grad = grad.clone()
        scaler.step(optimizer)
        read = p.detach().clone()  # where Ultralytics updates its EMA
        scaler.update()
        optimizer.zero_grad()
        assert scale and torch.equal(read, before) != moved
        if moved:
            torch.testing.assert_close((read - before)[list(ROWS)], torch.full((2, 3, 1, 1), -0.05))
            torch.testing.assert_close((read - before)[list(OTHERS)], torch.full((3, 3, 1, 1), -0.01))


@pytest.mark.parametrize("name", ["AdamW", "SophiaG"])
def test_a_parameter_without_gradient_stays(name):
    p = nn.Parameter(start())
    optimizer = OPTIMIZERS[name]([{"params": [p]}, {"params": []}])
    attach(optimizer, [RowRate(p, ROWS, 0, 1)])
    optimizer.param_groups[1]["lr"] = 0.5
    optimizer.step()
    assert torch.equal(p.detach(), start())


@pytest.mark.parametrize("name", ["SGD", "SophiaG"])
def test_state_is_that_of_an_optimizer_without_row_rates(name):
    """A checkpoint can be loaded in both directions; a loaded optimizer goes on with the rates of its groups."""
    _, optimizer = by_rows(OPTIMIZERS[name])
    p = nn.Parameter(start())
    plain = OPTIMIZERS[name]([{"params": [p]}, {"params": []}])
    plain.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in plain.param_groups] == list(SCHEDULE[-1])
    attach(plain, [RowRate(p, ROWS, 0, 1)])
    p.grad = gradients(1)[0]
    plain.step()
    moved = (p.detach() - start()).abs().mean(dim=(1, 2, 3))
    assert float(moved[list(ROWS)].mean()) > 2 * float(moved[list(OTHERS)].mean())


# What cannot be rescaled ----------------------------------------------------------------------------------------------


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (arXiv 2405.15682) with its state z beside the parameters."""

    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.clone())
                y.lerp_(z, 1 / group["k"])
                y.sub_(y.grad, alpha=group["lr"] * (0.9 * (1 - 1 / group["k"])))
                z.sub_(y.grad, alpha=group["lr"])


class Lookahead(torch.optim.SGD):
    """Moves half of the way back every five steps (arXiv 1907.08610)."""

    @torch.no_grad()
    def step(self, closure=None):
        p = self.param_groups[0]["params"][0]
        slow = self.state[p].setdefault("slow", p.clone())
        super().step()
        self.count = getattr(self, "count", 0) + 1
        if self.count % 5 == 0:
            slow.lerp_(p, 0.5)
            p.copy_(slow)


class RelativeStep(torch.optim.SGD):
    """Chooses its step size by itself, as Adafactor without lr."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad.sign() * p.norm() * 1e-3)


class Distance(torch.optim.SGD):
    """A distance estimate from the parameters at the start, as Prodigy's (arXiv 2306.06101)."""

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        (p,) = group["params"]
        state = self.state[p]
        first, total = state.setdefault("first", p.clone()), state.setdefault("total", torch.zeros_like(p))
        state["d"] = max(state.get("d", 1e-6), float((p.grad * (first - p)).sum() / (total.abs().sum() + 1e-12)))
        total.add_(p.grad, alpha=group["lr"])
        p.sub_(p.grad.sign(), alpha=state["d"] * group["lr"])


class Fixed(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        pass


def make_of(kind: type, **settings: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda groups: kind(groups, lr=1.0, **settings)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (ScheduleFree, "its move is not proportional to lr, or it keeps a copy of the parameters"),
        (Lookahead, "its move is not proportional to lr"),
        (RelativeStep, "its move is not proportional to lr"),
        (Distance, "its move is not proportional to lr"),
        (torch.optim.Rprop, "its move is not proportional to lr"),
        (Fixed, "a small tensor does not move"),
        (torch.optim.LBFGS, "a trial of it ended in"),
    ],
)
def test_what_cannot_be_rescaled_is_refused_in_one_line(kind, says):
    with pytest.raises(ValueError, match=says) as caught:
        lr = 1.0 if kind is Distance else 0.01
        check_rescalable(make_of(kind), [{"lr": lr, "weight_decay": 0.1}], kind.__name__)
    assert f"optimizer={kind.__name__}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta"],
)
def test_optimizers_of_torch_are_taken(kind):
    random = torch.get_rng_state()
    settings = {"momentum": 0.9, "nesterov": True} if kind == "SGD" else {}
    check_rescalable(make_of(getattr(torch.optim, kind), **settings), [{"lr": 0.01, "weight_decay": 0.1}], kind)
    assert torch.equal(torch.get_rng_state(), random)


def test_cautious_optimizers_are_taken():
    check_rescalable(CautiousAdamW, [{"lr": 0.01, "weight_decay": 0.1}], "AdamW")

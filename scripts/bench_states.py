"""What storing h or m in bfloat16 costs in accuracy: the update's direction and the loss of a small training.

Usage: python scripts/bench_states.py [STEPS] [SEEDS]
A network of 64-64-10 units learns labels drawn from a random teacher, with sampled labels for h every
fifth step. "Direction" is |u - u32| / |u32| at the end, u the clipped update of an optimizer with these states that was
given the same gradients as one in float32; "loss" is that of a training of its own, as a ratio to float32's.
"""

from __future__ import annotations

import statistics
import sys
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from yolo_sophia.optim import SophiaG, base

HALF = torch.bfloat16
ARMS = {
    "float32": {},
    "h bfloat16": {"hessian_dtype": HALF},
    "m bfloat16": {"momentum_dtype": HALF},
    "h and m bfloat16": {"hessian_dtype": HALF, "momentum_dtype": HALF},
}
SETTINGS = {"lr": 2e-3, "betas": (0.965, 0.99), "rho": 0.5, "weight_decay": 1e-3, "bias_correction": True}
INTERVAL = 5


def network(seed: int) -> nn.Module:
    """The same network for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs, and labels drawn from a teacher's probabilities."""
    torch.manual_seed(1000 + seed)
    x = torch.randn(2048, 64)
    return x, torch.distributions.Categorical(logits=4 * network(7)(x).detach()).sample()


def sampled_squares(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Estimates of the Gauss-Newton diagonal of the mean loss: B times the square of a mean gradient."""
    logits = model(x)
    labels = torch.distributions.Categorical(logits=logits.detach()).sample()
    return [len(x) * g.square() for g in torch.autograd.grad(cross_entropy(logits, labels), [*model.parameters()])]


def train(seed: int, steps: int, arm: dict, followers: dict[str, SophiaG] | None = None) -> tuple[nn.Module, SophiaG]:
    """Train with the states of an arm; followers are given the same gradients."""
    model, (x, y) = network(seed), data(seed)
    optimizer = SophiaG(model.parameters(), **SETTINGS, **arm)
    optimizers = [optimizer, *(followers or {}).values()]
    torch.manual_seed(seed)
    for step in range(steps):
        batch = torch.randint(len(x), (128,))
        estimates = sampled_squares(model, x[batch]) if step % INTERVAL == 0 else None
        gradients = torch.autograd.grad(cross_entropy(model(x[batch]), y[batch]), [*model.parameters()])
        for o in optimizers:
            if estimates:
                o.update_hessian(estimates)
            for p, g in zip(o.param_groups[0]["params"], gradients):
                p.grad = g
            o.step()
    return model, optimizer


def update(optimizer: SophiaG) -> Tensor:
    """The clipped update of the states, all parameters in a row."""
    states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    pairs = [(s["exp_avg"].float(), s["hessian"].float() * SETTINGS["rho"]) for s in states]
    return torch.cat([(m / (h + 1e-15)).clamp(-1, 1).flatten() for m, h in pairs])


def loss_of(model: nn.Module, seed: int) -> float:
    """Mean loss on all data."""
    x, y = data(seed)
    with torch.no_grad():
        return cross_entropy(model(x), y).item()


def main() -> None:
    """Print one line per arm; the last rounds h to nearest, for comparison."""
    steps, seeds = [int(w) for w in sys.argv[1:3]] + [600, 3][len(sys.argv) - 1 :]
    for name, arm in [*ARMS.items(), ("h bfloat16, to nearest", ARMS["h bfloat16"])]:
        nearest = patch.object(base, "round_at_random", lambda h, seed: h.to(HALF))
        errors, ratios, plain = [], [], []
        for seed in range(seeds):
            follower = SophiaG(network(seed).parameters(), **SETTINGS, **arm)
            with nearest if "nearest" in name else patch.object(base, "round_at_random", base.round_at_random):
                model, reference = train(seed, steps, {}, {name: follower})
                own, optimizer = train(seed, steps, arm)
            expected = update(reference)
            errors.append(((update(follower) - expected).norm() / expected.norm()).item())
            plain.append(loss_of(model, seed))
            ratios.append(loss_of(own, seed) / plain[-1])
        states = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "hessian")]
        size = sum(t.numel() * t.itemsize for t in states) / sum(p.numel() for p in own.parameters())
        spread = f"{min(ratios):.4f} to {max(ratios):.4f}"
        middle = f"direction {statistics.median(errors):.4f}   loss {statistics.median(ratios):.4f}"
        print(f"{name:<24}{size:.0f} bytes   {middle} ({spread})", flush=True)
    print(f"float32 loss: median {statistics.median(plain):.4f}; {steps} steps, {seeds} seeds")


if __name__ == "__main__":
    main()

"""Regression: a small network on Friedman's function, SophiaH and an estimator of your own.

    python scripts/examples/regression.py [--out FOLDER] [--quick]

What it shows: two optimizers that refresh h by themselves. `SophiaH` takes the Hessian's own diagonal from the loss
that the closure of `step` returns: any loss that can be differentiated twice. `DecoupledSophia` takes a function from
the parameters to an estimate; the one here is written out, to show that nothing of this package is needed for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import BETAS, WEIGHT_DECAY, Example, K, Problem, adamw, main
from sklearn.datasets import make_friedman1
from torch import Tensor, nn

from yolo_sophia import DecoupledSophia, SophiaH

BATCH = 64
NOISE = 1.0
RHO = 0.04
LOSS = nn.MSELoss()


def problem(seed: int) -> Problem:
    """1000 points to train on, 500 to validate, 2000 to test; the noise of the targets has variance 1."""
    x, y = (torch.tensor(a, dtype=torch.float32) for a in make_friedman1(3500, noise=NOISE, random_state=0))
    x, mean, std = 2 * x - 1, y[:1000].mean(), y[:1000].std()
    y = ((y - mean) / std)[:, None]
    splits = {"validation": slice(1000, 1500), "test": slice(1500, None)}
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    noise = torch.Generator().manual_seed(seed)

    def batch(number: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(1000, (BATCH,), generator=noise)
        return x[chosen], y[chosen]

    return Problem(model, batch, lambda split: (LOSS(model(x[splits[split]]), y[splits[split]]) * std**2).item())


def sophia_h(problem: Problem, lr: float, rho: float | str):
    """SophiaH; the closure needs no create_graph."""
    optimizer = SophiaH(
        problem.model.parameters(), lr=lr, betas=BETAS, rho=rho, weight_decay=WEIGHT_DECAY, k=K, bias_correction=True
    )

    def step(number: int, x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = LOSS(problem.model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)

    return optimizer, step


def decoupled(problem: Problem, lr: float):
    """DecoupledSophia with a Gauss-Newton estimate in five lines."""
    held: list[Tensor] = []

    def gauss_newton(params: Sequence[Tensor]) -> list[Tensor]:
        # The mean of squares has the second derivative 2 / n by each of n predictions. A random vector with this
        # covariance, pulled back to the parameters and squared, has the Gauss-Newton diagonal as its expectation.
        prediction = problem.model(held[0])
        cotangent = torch.randn_like(prediction) * (2 / prediction.numel()) ** 0.5
        return [g.square() for g in torch.autograd.grad(prediction, params, cotangent)]

    # rho is the bound of the clip here, so that a coordinate moves by at most lr * rho: (lr / rho, rho) is what
    # SophiaG and SophiaH call (lr, rho).
    optimizer = DecoupledSophia(
        problem.model.parameters(), gauss_newton, lr=lr / RHO, betas=BETAS, weight_decay=WEIGHT_DECAY * RHO, k=K,
        rho=RHO, bias_correction=True,
    )  # fmt: skip

    def step(number: int, x: Tensor, y: Tensor) -> None:
        held[:] = [x]
        optimizer.zero_grad()
        LOSS(problem.model(x), y).backward()
        optimizer.step()

    return optimizer, step


ARMS = {
    "AdamW": lambda problem, lr: adamw(problem, lr, lambda model, x, y: LOSS(model(x), y)),
    "SophiaH, rho 0.01": lambda problem, lr: sophia_h(problem, lr, 0.01),
    'SophiaH, rho "auto"': lambda problem, lr: sophia_h(problem, lr, "auto"),
    "DecoupledSophia": decoupled,
}
TITLE = "Friedman's function, network of two hidden layers"
EXAMPLE = Example("regression", TITLE, "mean squared error (noise: 1)", problem, ARMS, steps=600)

if __name__ == "__main__":
    main(EXAMPLE, __doc__)

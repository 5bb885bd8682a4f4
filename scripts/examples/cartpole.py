"""A policy gradient: REINFORCE with a baseline on gymnasium's CartPole, SophiaG with loss terms written by hand.

    python scripts/examples/cartpole.py [--out FOLDER] [--quick]

What it shows: a loss that no PyTorch module computes, as likelihoods with coefficients. The policy is a distribution
over actions, so a label sampled from the model is an action sampled from the policy. For an action a with advantage A
the loss is -A log p(a). Its second derivative by the logits is A (diag(p) - p p^T), which is no curvature to divide by
where A < 0; the term here has |A| in its place: the same scale, positive. The baseline's squared error is a Gaussian
term. Both go back through the network in one pass, which their coefficients' roots make right.
"""

from __future__ import annotations

import gymnasium
import torch
from common import BETAS, WEIGHT_DECAY, Example, Problem, adamw, main
from torch import Tensor, nn
from torch.nn import functional as F

from yolo_sophia import SophiaG
from yolo_sophia.curvature import Categorical, Gaussian, GaussNewtonBartlett

EPISODES, LONGEST, DISCOUNT = 16, 200, 0.99
BASELINE = 0.5
"""Weight of the baseline's error in the loss."""


class Policy(nn.Module):
    """From states (..., 4) to the logits of the two actions, and the baseline as a third output."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (..., 2) and the expected return (...), in units of 1 / (1 - DISCOUNT)."""
        output = self.layers(states)
        return output[..., :2], output[..., 2]


@torch.no_grad()
def play(model: nn.Module, episodes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Episodes side by side until the last one ends.

    Returns:
        States (time, episodes, 4), actions (time, episodes), and whether the episode still ran (time, episodes).
    """
    env = gymnasium.make_vec("CartPole-v1", episodes, vectorization_mode="vector_entry_point")
    noise, record = torch.Generator().manual_seed(seed), []
    state, running = torch.from_numpy(env.reset(seed=seed)[0]), torch.ones(episodes, dtype=torch.bool)
    while running.any() and len(record) < LONGEST:
        action = torch.multinomial(model(state)[0].softmax(-1), 1, generator=noise)[:, 0]
        record.append((state, action, running))
        state, _, ended, cut, _ = env.step(action.numpy())
        state, running = torch.from_numpy(state), running & ~torch.from_numpy(ended | cut)
    states, actions, ran = (torch.stack(part) for part in zip(*record))
    return states, actions, ran


def problem(seed: int) -> Problem:
    """A reward of 1 for each step that the pole stays up, LONGEST at most."""
    model = Policy()

    def batch(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        states, actions, ran = play(model, EPISODES, 10_000 * (seed + 1) + number)
        returns, ahead = torch.zeros(ran.shape), torch.zeros(EPISODES)
        for t in reversed(range(len(ran))):
            returns[t] = ahead = ran[t] * (1 - DISCOUNT + DISCOUNT * ahead)
        return states[ran], actions[ran], returns[ran], advantages(model, states[ran], returns[ran])

    splits = {"validation": 0, "test": 1}
    return Problem(model, batch, lambda split: play(model, 32, splits[split])[2].sum(0).float().mean().item())


@torch.no_grad()
def advantages(model: nn.Module, states: Tensor, returns: Tensor) -> Tensor:
    """Return above the baseline, scaled to unit variance over the batch."""
    above = returns - model(states)[1]
    return (above - above.mean()) / (above.std() + 1e-6)


def loss_of(model: nn.Module, states: Tensor, actions: Tensor, returns: Tensor, advantage: Tensor) -> Tensor:
    """Mean over all states of -A log p(a) + BASELINE (V - return)^2."""
    logits, values = model(states)
    policy = (advantage * F.cross_entropy(logits, actions, reduction="none")).mean()
    return policy + BASELINE * F.mse_loss(values, returns)


def sophia_g(problem: Problem, lr: float, rho: float | str):
    """SophiaG; the coefficients are those of the loss, for a Gaussian is the likelihood of half the square."""
    model, params = problem.model, list(problem.model.parameters())
    optimizer = SophiaG(params, lr=lr, betas=BETAS, rho=rho, weight_decay=WEIGHT_DECAY, bias_correction=True)
    estimator = GaussNewtonBartlett()

    def step(number: int, states: Tensor, actions: Tensor, returns: Tensor, advantage: Tensor) -> None:
        logits, values = model(states)
        of_policy = Categorical(logits, advantage.abs()[:, None] / len(states))
        of_baseline = Gaussian(values, torch.tensor(2 * BASELINE / len(states)))
        optimizer.update_hessian(estimator([of_policy, of_baseline], params))  # cheap beside the episodes: each step
        optimizer.zero_grad()
        loss_of(model, states, actions, returns, advantage).backward()
        optimizer.step()

    return optimizer, step


ARMS = {
    "AdamW": lambda problem, lr: adamw(problem, lr, loss_of),
    "SophiaG, rho 0.04": lambda problem, lr: sophia_g(problem, lr, 0.04),
    'SophiaG, rho "auto"': lambda problem, lr: sophia_g(problem, lr, "auto"),
}
EXAMPLE = Example(
    "cartpole", "CartPole, REINFORCE with a baseline", "mean return", problem, ARMS, steps=30, larger_is_better=True,
    scores=10,
)  # fmt: skip

if __name__ == "__main__":
    main(EXAMPLE, __doc__)

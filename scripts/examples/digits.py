"""Image classification: a small convolutional network on scikit-learn's digits, SophiaG by hand.

    python scripts/examples/digits.py [--out FOLDER] [--quick]

What it shows: `SophiaG` in a training loop of your own. Every k steps, before `backward()` frees the graph, a
Gauss-Newton-Bartlett estimate is made from that same graph: `likelihood_of` says which distribution the loss belongs
to, the estimator samples labels from it. No second forward pass is needed, and `step()` needs no batch size.
"""

from __future__ import annotations

import torch
from common import BETAS, WEIGHT_DECAY, Example, K, Problem, adamw, main
from sklearn.datasets import load_digits
from torch import Tensor, nn

from yolo_sophia import SophiaG
from yolo_sophia.curvature import GaussNewtonBartlett, likelihood_of

BATCH = 64
LOSS = nn.CrossEntropyLoss()


def problem(seed: int) -> Problem:
    """1000 images to train on, 397 to validate, 400 to test."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # the same for every seed
    train, *held = order.split([1000, 397, 400])
    splits = dict(zip(("validation", "test"), held))
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip
    noise = torch.Generator().manual_seed(seed)

    def batch(number: int) -> tuple[Tensor, Tensor]:
        chosen = train[torch.randint(len(train), (BATCH,), generator=noise)]
        return images[chosen], labels[chosen]

    return Problem(model, batch, lambda split: LOSS(model(images[splits[split]]), labels[splits[split]]).item())


def sophia_g(problem: Problem, lr: float, rho: float | str):
    """SophiaG; the estimate is made from the graph of the training step."""
    model, params = problem.model, list(problem.model.parameters())
    # h starts at 0: with the bias correction it has its scale from the first update on, which a short training needs.
    optimizer = SophiaG(params, lr=lr, betas=BETAS, rho=rho, weight_decay=WEIGHT_DECAY, bias_correction=True)
    terms, estimator = likelihood_of(LOSS), GaussNewtonBartlett()

    def step(number: int, images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        output = model(images)
        if number % K == 0:
            optimizer.update_hessian(estimator(terms(output, labels), params))
        LOSS(output, labels).backward()
        optimizer.step()

    return optimizer, step


ARMS = {
    "AdamW": lambda problem, lr: adamw(problem, lr, lambda model, images, labels: LOSS(model(images), labels)),
    "SophiaG, rho 0.04": lambda problem, lr: sophia_g(problem, lr, 0.04),
    'SophiaG, rho "auto"': lambda problem, lr: sophia_g(problem, lr, "auto"),
}
EXAMPLE = Example("digits", "Digits, small convolutional network", "cross-entropy, nats", problem, ARMS, steps=200)

if __name__ == "__main__":
    main(EXAMPLE, __doc__)

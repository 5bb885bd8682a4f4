"""A character language model: a small transformer on the help texts of Python, Sophia by the Agora constructor.

    python scripts/examples/characters.py [--out FOLDER] [--quick]

What it shows: `Sophia(model, input_data, ...)` estimates the curvature on batches of its own, on copies of the model's
buffers, and the training loop stays that of any optimizer. The same estimate for `SophiaG`, which is told when:
`OnBatches` makes a function of the parameters of model, data and loss. A smaller batch than the training's will do.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from common import BETAS, WEIGHT_DECAY, Example, K, Problem, adamw, main
from torch import Tensor, nn

from yolo_sophia import Sophia, SophiaG
from yolo_sophia.curvature import GaussNewtonBartlett, OnBatches, likelihood_of

LENGTH, BATCH, WIDTH = 32, 16, 64
RHO = 0.04
LOSS = nn.CrossEntropyLoss()
TEXT = "\n".join(topics[name] for name in sorted(topics))
LETTERS = sorted(set(TEXT))
CODES = torch.tensor([LETTERS.index(c) for c in TEXT])
TRAIN, VALIDATION, TEST = CODES.tensor_split([len(CODES) * 8 // 10, len(CODES) * 9 // 10])


class Transformer(nn.Module):
    """One causal layer; from letters of shape (batch, LENGTH) to logits of shape (batch, letters, LENGTH)."""

    def __init__(self):
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), WIDTH), nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(LETTERS)))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next letter; the classes are the second dimension, where the cross-entropy wants them."""
        x = self.layer(self.letters(x) + self.places, src_mask=self.mask, is_causal=True)
        return self.out(x).transpose(1, 2)


def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Pieces of the text, and the same moved on by a letter."""
    pieces = text[starts[:, None] + torch.arange(LENGTH + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def problem(seed: int) -> Problem:
    """The first 80 % of the text to train on, 10 % to validate, 10 % to test (64 windows of each)."""
    model, noise = Transformer(), torch.Generator().manual_seed(seed)
    splits = {
        name: windows(text, torch.linspace(0, len(text) - LENGTH - 1, 64).long())
        for name, text in (("validation", VALIDATION), ("test", TEST))
    }

    def batch(number: int) -> tuple[Tensor, Tensor]:
        return windows(TRAIN, torch.randint(len(TRAIN) - LENGTH, (BATCH,), generator=noise))

    return Problem(model, batch, lambda split: LOSS(model(splits[split][0]), splits[split][1]).item())


def curvature_batches() -> list[tuple[Tensor, Tensor]]:
    """Batches for the curvature, a quarter of the training's size."""
    noise = torch.Generator().manual_seed(1)
    return [windows(TRAIN, s) for s in torch.randint(len(TRAIN) - LENGTH, (40, BATCH // 4), generator=noise)]


def sophia(problem: Problem, lr: float):
    """The Agora constructor; its rho is the bound of the clip, see regression.py."""
    model = problem.model
    optimizer = Sophia(
        model, curvature_batches(), model.parameters(), lr=lr / RHO, betas=BETAS, weight_decay=WEIGHT_DECAY * RHO, k=K,
        estimator="Gauss-Newton-Bartlett", rho=RHO, loss_function=LOSS, bias_correction=True,
    )  # fmt: skip

    def step(number: int, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()

    return optimizer, step


def sophia_g(problem: Problem, lr: float):
    """SophiaG with the same estimates, and rho steered."""
    model, params = problem.model, list(problem.model.parameters())
    optimizer = SophiaG(params, lr=lr, betas=BETAS, rho="auto", weight_decay=WEIGHT_DECAY, bias_correction=True)
    estimate = OnBatches(GaussNewtonBartlett(), model, curvature_batches(), likelihood_of(LOSS))

    def step(number: int, x: Tensor, y: Tensor) -> None:
        if number % K == 0:
            optimizer.update_hessian(estimate(params))
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()

    return optimizer, step


ARMS = {
    "AdamW": lambda problem, lr: adamw(problem, lr, lambda model, x, y: LOSS(model(x), y)),
    "Sophia (GNB), rho 0.04": sophia,
    'SophiaG, rho "auto"': sophia_g,
}
TITLE = "Letters of Python's help texts, transformer of one layer"
EXAMPLE = Example("characters", TITLE, "cross-entropy, nats per letter", problem, ARMS, steps=250)

if __name__ == "__main__":
    main(EXAMPLE, __doc__)

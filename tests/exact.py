"""Exact diagonals in float64, by Jacobians and Hessians of torch.func: nothing here is shared with the package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

CLASSES = 3


class Tokens(nn.Module):
    """A transformer layer between an embedding and a linear map; logits per token, shape (N, CLASSES, T)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x))).movedim(-1, 1)


@dataclass
class Case:
    """A net in train mode, an input, and a label for each prediction."""

    net: nn.Module
    x: Tensor
    labels: Tensor

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.net.parameters())


def case(kind: str) -> Case:
    """The same nets and data at every call: mlp, conv (with BatchNorm) or transformer."""
    noise = Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mlp":
            net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, CLASSES))
            x, labels = torch.randn(6, 4, generator=noise), (6,)
        elif kind == "conv":
            features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten())
            net = nn.Sequential(features, nn.Linear(8, CLASSES))
            x, labels = torch.randn(4, 1, 4, 4, generator=noise), (4,)
        else:
            net = Tokens()
            x, labels = torch.randint(5, (3, 3), generator=noise), (3, 3)
    x = x.double() if x.is_floating_point() else x
    return Case(net.double().train(), x, torch.randint(CLASSES, labels, generator=noise))


def without_running_statistics(net: nn.Module) -> nn.Module:
    """A copy that gives the same in train mode: torch.func has no updates in place."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return net


def _functional(c: Case) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    net = without_running_statistics(c.net)
    params = {name: p.detach() for name, p in net.named_parameters()}
    return lambda p: functional_call(net, p, (c.x,)), params


def gauss_newton_diagonal(c: Case, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The diagonal of J^T H J per parameter; H is the Hessian of the loss by the net's output."""
    f, params = _functional(c)
    with sdpa_kernel(SDPBackend.MATH):
        output = f(params)
        h = hessian(loss)(output).reshape(output.numel(), -1)
        jacobians = jacrev(f)(params)
    flat = [jacobians[name].reshape(output.numel(), *p.shape) for name, p in params.items()]
    return [torch.einsum("ij,i...,j...->...", h, j, j) for j in flat]


def hessian_diagonal(c: Case, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The diagonal of the Hessian of the loss by each parameter."""
    f, params = _functional(c)
    with sdpa_kernel(SDPBackend.MATH):
        blocks = hessian(lambda p: loss(f(p)))(params)
    return [blocks[n][n].reshape(p.numel(), -1).diag().view_as(p) for n, p in params.items()]


def mean_and_error(estimate: Callable[[], list[Tensor]], samples: int) -> tuple[list[Tensor], list[Tensor]]:
    """Mean of estimates and its standard error, per parameter."""
    draws = [torch.stack(parts) for parts in zip(*(estimate() for _ in range(samples)))]
    return [d.mean(0) for d in draws], [d.std(0) / samples**0.5 for d in draws]


def assert_converged(found: list[Tensor], error: list[Tensor], exact: list[Tensor]) -> None:
    """Every entry is within five standard errors of the exact one, and all together not more than one away."""
    assert len(found) == len(exact) > 0
    m, s, e = (torch.cat([part.flatten() for part in parts]) for parts in (found, error, exact))
    z = (m - e) / (s + 1e-12 * e.abs().max())  # an exact 0 (a bias before BatchNorm) is found as rounding
    assert z.abs().max() <= 5, f"entry {int(z.abs().argmax())} of {len(z)} is not within five standard errors"
    assert z.square().mean() <= 1.5, f"standard errors are exceeded throughout: mean square {float(z.square().mean())}"

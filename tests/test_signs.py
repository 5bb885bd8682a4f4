"""Random signs leave the diagonal of each output element alone: against explicit Jacobians, for sums and means."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, nn

from yolo_sophia.curvature import GaussNewtonBartlett, RandomSigns, sign_randomised

ROWS, OUT = 5, 3


@pytest.fixture(params=["sum", "mean"])
def case(request):
    """A net, its outputs, a loss that is no likelihood, the coefficient of an element, and the exact expectation."""
    noise = Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, OUT)).double()
    for p in net.parameters():
        p.data.normal_(generator=noise)
    x, target = (torch.randn(ROWS, n, generator=noise, dtype=torch.float64) for n in (4, OUT))
    params, output = list(net.parameters()), net(x)
    loss = nn.functional.smooth_l1_loss(output, target, reduction=request.param)
    c = 1.0 if request.param == "sum" else 1 / output.numel()
    expected = [torch.zeros_like(p) for p in params]
    slopes = (output - target).clamp(-1, 1)
    for f, slope in zip(output.flatten(), slopes.flatten()):
        jacobian = torch.autograd.grad(f, params, retain_graph=True)
        for e, j in zip(expected, jacobian):
            e += c * slope.detach().square() * j.square()
    return params, output, loss, c, expected


def mean_estimate(estimator, terms, params, samples=4000):
    noise = Generator().manual_seed(1)
    total = [torch.zeros_like(p) for p in params]
    for _ in range(samples):
        for t, e in zip(total, estimator(terms, params, noise)):
            t += e / samples
    return total


@pytest.mark.parametrize("estimator", [GaussNewtonBartlett(), RandomSigns()], ids=["sampled", "signs"])
def test_mean_of_estimates_is_the_diagonal_without_cross_terms(case, estimator):
    params, output, loss, c, expected = case
    terms = sign_randomised(loss, [output], coefficient=c)
    for found, exact in zip(mean_estimate(estimator, terms, params), expected):
        torch.testing.assert_close(found, exact, rtol=0.12, atol=0.02 * float(exact.mean()))
    squared = torch.autograd.grad(loss, params, retain_graph=True)
    ratios = [float(g.square().sum() / c / e.sum()) for g, e in zip(squared, expected)]
    assert max(abs(r - 1) for r in ratios) > 0.2  # the comparison tells it from the squared gradient
    loss.backward()  # the graph is still there


def test_refusals(case):
    output, loss = case[1:3]
    with pytest.raises(ValueError, match=r"coefficient must be positive, found 0"):
        sign_randomised(loss, [output], coefficient=0)
    with pytest.raises(ValueError, match="depends on none of the 1 outputs"):
        sign_randomised(loss, [torch.ones(3, requires_grad=True)])

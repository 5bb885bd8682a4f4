"""PyTorch's losses as terms: gradient and Hessian by the output are those of the loss itself, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

from yolo_sophia.curvature import likelihood_of, losses

SAMPLES = 100_000
NOISE = Generator().manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=NOISE, dtype=torch.float64)


LABELS = torch.tensor([0, 2, -100, 1])
GRID = torch.tensor([[0, 1], [2, 2], [1, -100]])
WEIGHT, LOGITS = rand(3) + 0.5, 3 * rand(4, 3) - 1.5
CASES = {
    "ce": (nn.CrossEntropyLoss, {}, LOGITS, torch.tensor([0, 2, 1, 1])),
    "ce-ignored": (nn.CrossEntropyLoss, {}, LOGITS, LABELS),
    "ce-ignore_index": (nn.CrossEntropyLoss, {"ignore_index": 2}, LOGITS, LABELS.clamp(min=0)),
    "ce-weight": (nn.CrossEntropyLoss, {"weight": WEIGHT}, LOGITS, LABELS),
    "ce-smooth": (nn.CrossEntropyLoss, {"label_smoothing": 0.2}, LOGITS, LABELS),
    "ce-weight-smooth": (nn.CrossEntropyLoss, {"weight": WEIGHT, "label_smoothing": 0.3}, LOGITS, LABELS),
    "ce-soft": (nn.CrossEntropyLoss, {}, LOGITS, rand(4, 3).softmax(1)),
    "ce-soft-weight-smooth": (
        nn.CrossEntropyLoss,
        {"weight": WEIGHT, "label_smoothing": 0.3},
        LOGITS,
        rand(4, 3).softmax(1),
    ),
    "ce-grid": (nn.CrossEntropyLoss, {"weight": WEIGHT, "label_smoothing": 0.1}, rand(3, 3, 2), GRID),
    "ce-single": (nn.CrossEntropyLoss, {}, rand(3), torch.tensor(1)),
    "bce": (nn.BCEWithLogitsLoss, {}, LOGITS, rand(4, 3)),
    "bce-weight": (nn.BCEWithLogitsLoss, {"weight": WEIGHT}, LOGITS, rand(4, 3).round()),
    "bce-pos_weight": (nn.BCEWithLogitsLoss, {"pos_weight": 3 * WEIGHT}, LOGITS, rand(4, 3).round()),
    "bce-both-soft": (nn.BCEWithLogitsLoss, {"weight": WEIGHT, "pos_weight": 3 * WEIGHT}, LOGITS, rand(4, 3)),
    "mse": (nn.MSELoss, {}, LOGITS, rand(4, 3)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CASES)
def test_term_has_gradient_and_hessian_of_the_loss(name, reduction):
    kind, settings, output, target = CASES[name]
    loss = kind(**settings, reduction=reduction)
    leaf = output.clone().requires_grad_()
    (term,) = likelihood_of(loss)(leaf, target)
    gradient = (term.observed() * term.coefficient.sqrt()).broadcast_to(term.output.shape)
    (found,) = torch.autograd.grad(term.output, leaf, gradient, retain_graph=True)
    torch.testing.assert_close(found, torch.func.grad(loss)(output, target))

    many = replace(term, output=term.output.detach().expand(SAMPLES, *term.output.shape))
    rows = many.sampled(Generator().manual_seed(1))
    cotangents = (
        rows.movedim(-1, 2).flatten(1) if rows.dim() > 3 else rows.flatten(1)
    )  # classes come second in the loss
    exact = torch.func.hessian(loss)(output, target).reshape(output.numel(), -1)
    torch.testing.assert_close(cotangents.T @ cotangents / SAMPLES, exact, rtol=0.05, atol=0.015 * float(exact.max()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gaussian_with_a_given_variance(reduction):
    output, target, variance = LOGITS, rand(4, 3), rand(4, 3) + 0.2
    (term,) = losses.gaussian_nll_loss(output, target, variance, reduction=reduction)

    def loss(f):
        return F.gaussian_nll_loss(f, target, variance, reduction=reduction)

    torch.testing.assert_close(term.observed() * term.coefficient.sqrt(), torch.func.grad(loss)(output))
    exact = torch.func.hessian(loss)(output).reshape(12, 12)
    torch.testing.assert_close(term.coefficient.flatten(), exact.diag())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_absolute_error_has_the_information_of_a_laplace_distribution(reduction):
    target, loss = rand(4, 3), nn.L1Loss(reduction=reduction)
    (term,) = likelihood_of(loss)(LOGITS, target)
    assert likelihood_of(F.l1_loss)(LOGITS, None)[0].coefficient == 1 / 12
    gradient = torch.func.grad(loss)(LOGITS, target)
    torch.testing.assert_close(term.observed() * term.coefficient.sqrt(), gradient)
    expected = torch.full((4, 3), 1 / 12 if reduction == "mean" else 1.0, dtype=torch.float64)  # c E[sign^2]
    torch.testing.assert_close(term.sampled(None).square(), expected)


def test_distribution_focal_loss():
    logits, distance, c = rand(2, 4, 6), 4.9 * rand(2, 4), rand(2, 1, 1)

    def loss(f):
        low, nll = distance.long(), -f.log_softmax(-1)
        left, right = (nll.gather(-1, i[..., None])[..., 0] for i in (low, low + 1))
        return (c[..., 0] * ((low + 1 - distance) * left + (distance - low) * right)).sum()

    (term,) = losses.distribution_focal_loss(logits, distance, c)
    torch.testing.assert_close(term.observed() * term.coefficient.sqrt(), torch.func.grad(loss)(logits))
    p = logits.softmax(-1)
    exact = torch.func.hessian(loss)(logits).reshape(48, 48).diag().view_as(p)
    torch.testing.assert_close(term.coefficient * p * (1 - p), exact)


@pytest.mark.parametrize("name", ["ce", "bce", "mse"])
def test_functions_are_known_too_and_targets_may_be_missing(name):
    kind, _, output, target = CASES[name]
    function = {"ce": F.cross_entropy, "bce": F.binary_cross_entropy_with_logits, "mse": F.mse_loss}[name]
    (module,), (term,), (blind,) = (
        likelihood_of(kind())(output, target),
        likelihood_of(function)(output, target),
        likelihood_of(function)(output, None),
    )
    for other in (term, blind):
        assert torch.equal(module.sampled(Generator().manual_seed(2)), other.sampled(Generator().manual_seed(2)))


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (nn.HuberLoss(), TypeError, "No likelihood is known for HuberLoss: expected one of .*'CrossEntropyLoss'"),
        (3, TypeError, "No likelihood is known for int"),
        (F.huber_loss, TypeError, r"returned Tensor, no loss terms: .*sign_randomised"),
        (nn.MSELoss(reduction="none"), ValueError, "Invalid reduction: found 'none', expected 'mean' or 'sum'"),
    ],
)
def test_unknown_losses_are_refused(loss, error, message):
    with pytest.raises(error, match=message):
        likelihood_of(loss)(LOGITS, LOGITS)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(weight=WEIGHT), nn.BCEWithLogitsLoss(pos_weight=WEIGHT)])
def test_weights_that_depend_on_labels_need_them(loss):
    with pytest.raises(ValueError, match="needs the targets"):
        likelihood_of(loss)(LOGITS, None)

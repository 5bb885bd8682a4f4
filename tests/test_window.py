"""A window of accumulation without a trainer: counting, staging, scale, and the sum over ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

from yolo_sophia.integration.window import Window


def window(*batches: int, images: int = 4, estimate: float = 1.0) -> Window:
    """A window of micro-batches with an estimate for one of two parameters."""
    made = Window()
    for batch in batches:
        made.add(batch)
    made.stage([torch.full((3,), estimate), None], images)
    return made


@pytest.mark.parametrize(
    ("exponent", "factor"), [(1, (6 + 6 + 2) / 4), (0, 3), (-1, (1 / 6 + 1 / 6 + 1 / 2) / (1 / 4))]
)
def test_the_estimate_is_scaled_to_all_micro_batches(exponent, factor):
    """By how a loss grows with its images: a sum over them, a mean, and the squares of a mean's gradients."""
    made = window(6, 6, 2)
    assert made.scale(exponent) is True
    torch.testing.assert_close(made.staged[0], torch.full((3,), float(factor)))
    assert made.staged[1] is None


def test_the_next_window_begins_with_nothing():
    made = window(6, 6)
    made.restart()
    assert (made.batches, made.staged, made.staged_images) == ([], None, 0)
    assert made.largest_batch == 6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_value_that_is_not_finite_is_found(value):
    made = window(4)
    assert made.is_finite()
    made.staged[0][1] = value
    assert not made.is_finite()


def test_a_trainable_parameter_without_an_update_or_an_estimate_is_lacking():
    params = [Parameter(torch.zeros(3)), Parameter(torch.zeros(3), requires_grad=False)]
    made, both, second = Window(), [*enumerate(params)], [(1, params[1])]
    assert made.lacks(both)
    assert not made.lacks(second)  # it is frozen
    made.stage([torch.ones(3), None], 4)
    assert not made.lacks(both)
    params[1].requires_grad_(True)
    assert made.lacks(second)
    assert not made.lacks([])


@pytest.mark.parametrize(("other_known", "known"), [(True, True), (False, None)])
def test_ranks_are_summed_and_agree_on_the_factor(other_known, known, monkeypatch):
    """Of a second rank with 2 images of 8; tests/test_ddp.py has real processes."""
    other = window(8, images=2, estimate=5.0)
    sent = []

    def all_reduce(tensor):
        sent.append(tensor.numel())
        theirs = torch.full((3,), 5.0)
        if len(sent) == 2:  # counts: sums of powers of the images, the exponent, and whether the loss is known
            theirs = torch.tensor([1 / 8, 1, 8, 1 / 2, 1, 2, 1, other_known])
        tensor += theirs

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    made = window(4, 4, images=2, estimate=3.0)
    assert made.scale(1, True) is known
    total = (3.0 + 5.0) * sum(made.batches + other.batches) / (made.staged_images + other.staged_images)
    torch.testing.assert_close(made.staged[0], torch.full((3,), total))

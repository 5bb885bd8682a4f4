"""The schedule of Hessian updates: when one is due, and that its counters survive a state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import Parameter

from yolo_sophia.optim._schedule import COUNTERS, HessianSchedule


def make(**settings) -> HessianSchedule:
    groups = [{"params": [Parameter(torch.ones(1))], **COUNTERS, **settings} for _ in range(2)]
    return HessianSchedule(torch.optim.SGD(groups, lr=0.1))


def updates(schedule: HessianSchedule, steps: range, dropped: tuple[int, ...] = ()) -> list[int]:
    """The steps at which an update was due."""
    due = []
    for step in steps:
        if schedule.due:
            due.append(step)
            assert schedule.estimated() == schedule["refresh_index"] - 1
            schedule.dropped() if step in dropped else schedule.updated()
        schedule.stepped()
    return due


@pytest.mark.parametrize(
    ("settings", "dropped", "expected"),
    [
        ({"hessian_interval": 4}, (), [0, 4, 8]),
        ({"hessian_interval": 4, "hessian_warmup": 3}, (), [0, 1, 2, 6, 10]),
        ({"hessian_interval": 1}, (), list(range(12))),
        ({"hessian_interval": None}, (), []),
        ({"hessian_interval": 4}, (0, 5), [0, 1, 5, 6, 10]),
    ],
)
def test_steps_with_an_update(settings, dropped, expected):
    schedule = make(**settings)
    assert updates(schedule, range(12), dropped) == expected
    assert schedule["hessian_updates"] == len(expected) - len(dropped) and schedule["hessian_dropped"] == len(dropped)


def test_a_resumed_schedule_continues():
    first, second = make(hessian_interval=5), make(hessian_interval=3)
    assert updates(first, range(7)) == [0, 5]
    second._optimizer.load_state_dict(copy.deepcopy(first._optimizer.state_dict()))
    assert updates(second, range(7, 17)) == updates(first, range(7, 17)) == [10, 15]

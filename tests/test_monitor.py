"""The figures of a step: those of the move that the parameters made."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from yolo_sophia.integration.monitor import Monitor
from yolo_sophia.optim import SophiaG


@pytest.mark.parametrize("power", [1, 0.5])
@pytest.mark.parametrize("cautious", [False, True])
def test_the_norm_of_the_update_is_that_of_the_move(cautious, power):
    noise = torch.Generator().manual_seed(0)
    p = Parameter(torch.zeros(1000))
    optimizer = SophiaG([p], lr=0.01, rho=1.0, weight_decay=0.0, cautious=cautious, hessian_power=power)
    monitor = Monitor(optimizer)
    optimizer.register_step_pre_hook(lambda *_: monitor.before_step())
    optimizer.register_step_post_hook(lambda *_: monitor.after_step())
    optimizer.param_groups[0].update(hessian_updates=1, hessian_dropped=0)
    for scale in (1.0, 0.3):  # after the second step, m and g disagree in part of the coordinates
        p.grad = scale * torch.randn(1000, generator=noise)
        optimizer.update_hessian([torch.rand(1000, generator=noise)])
        with torch.no_grad():
            p.zero_()
        monitor.reset()
        optimizer.step()
    row = monitor.epoch()
    assert row["sophia/update_norm"] == pytest.approx(p.detach().norm().item(), rel=1e-5)
    assert 0 < row["sophia/clip_fraction"] < 1


def test_rho_is_that_of_a_group_that_is_trained():
    frozen, fixed, p = (
        Parameter(torch.ones(5), requires_grad=False),
        Parameter(torch.ones(5)),
        Parameter(torch.ones(50)),
    )
    optimizer = SophiaG([{"params": [frozen]}, {"params": [fixed], "rho": 0.7}, {"params": [p]}], rho="auto")
    optimizer.param_groups[0].update(hessian_updates=1, hessian_dropped=0)
    optimizer.update_hessian([None, torch.ones(5), torch.rand(50)])
    fixed.grad, p.grad = torch.ones(5), torch.randn(50)
    monitor = Monitor(optimizer)
    optimizer.step()
    assert monitor.epoch()["sophia/rho"] == optimizer.param_groups[2]["rho"] not in (1.0, 0.7)

"""The optimizer of the study on the curvature's worth, `scripts/study_dial.py`."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from study_dial import Dial, Settings, block_of, rates_of

SHAPES = ((6, 5, 3, 3), (40, 30), (7,))


def parameters(seed=0):
    noise = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=noise, dtype=torch.float64)) for shape in SHAPES]


def train(params, optimizer, steps=12, curvature=True):
    """Steps with gradients and estimates that depend on the step alone; h is updated at every third step."""
    noise = torch.Generator().manual_seed(1)
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=noise, dtype=p.dtype)
        estimates = [torch.rand(p.shape, generator=noise, dtype=p.dtype) ** 3 for p in params]
        if curvature and step % 3 == 0:
            optimizer.update_hessian(estimates)
        optimizer.step()


def dial(monkeypatch, params, cautious=False, **settings):
    monkeypatch.setattr(Dial, "settings", settings)
    return Dial(params, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, bias_correction=True, cautious=cautious)


def test_share_0_is_adamw(monkeypatch):
    ours, theirs = parameters(), parameters()
    train(ours, dial(monkeypatch, ours, share=0.0))
    adamw = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.999), weight_decay=0.1)
    train(theirs, adamw, steps=0)
    monkeypatch.setattr(adamw, "update_hessian", lambda _: None, raising=False)
    train(theirs, adamw)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_share_0_with_the_mask_is_timms(monkeypatch):
    timm = pytest.importorskip("timm.optim")
    ours, theirs = parameters(), parameters()
    train(ours, dial(monkeypatch, ours, cautious=True, share=0.0))
    adamw = timm.AdamWLegacy(theirs, lr=0.01, betas=(0.9, 0.999), weight_decay=0.1, caution=True)
    monkeypatch.setattr(adamw, "update_hessian", lambda _: None, raising=False)
    train(theirs, adamw)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("curvature", ["own", "permuted", "mean"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_share_that_is_curbed(monkeypatch, share, curvature):
    params = parameters()
    optimizer = dial(monkeypatch, params, share=share, curvature=curvature)
    train(params, optimizer, steps=61)
    curbed = optimizer.record.curbed[3:]
    # A mean over a tensor curbs its coordinates nearly together.
    assert sum(curbed) / len(curbed) == pytest.approx(share, abs=0.1)
    assert 0 < optimizer.figures["moved"] < 2


def test_permuted_curvature_has_the_same_entries(monkeypatch):
    params = parameters()
    optimizer = dial(monkeypatch, params, share=0.5, curvature="permuted")
    train(params, optimizer)
    group, p = optimizer.param_groups[0], params[0]
    permuted, again = (optimizer._curvature(p, group) for _ in range(2))
    optimizer.chosen = Settings()
    own = optimizer._curvature(p, group)
    assert torch.equal(permuted, again) and not torch.equal(permuted, own)
    assert torch.equal(permuted.flatten().sort().values, own.flatten().sort().values)


@pytest.mark.parametrize("rule", ["dial", "sophia"])
def test_rates_by_block_multiply_the_move(monkeypatch, rule):
    plain, divided = parameters(), parameters()
    train(plain, dial(monkeypatch, plain, rule=rule, share=0.0), steps=1)
    optimizer = dial(monkeypatch, divided, rule=rule, share=0.0)
    optimizer.blocks = dict(zip(divided, "abc"))
    optimizer.record.rates = {"a": 0.25, "b": 2.0, "c": 1.0}
    train(divided, optimizer, steps=1)
    for p, q, start, rate in zip(plain, divided, parameters(), (0.25, 2.0, 1.0)):
        torch.testing.assert_close(q - start, rate * (p - start))
    assert optimizer.figures["moved"] == pytest.approx(1.0, abs=0.1)


def test_rates_by_block():
    rates = rates_of({"a": 1.0, "b": 100.0, "c": 4.0}, Settings(exponent=0.5))
    assert rates == {"a": 2.0, "b": 0.25, "c": 1.0}
    shuffled = rates_of({"a": 1.0, "b": 100.0, "c": 4.0}, Settings(exponent=0.5, shuffled=True))
    assert sorted(shuffled.values()) == [0.25, 1.0, 2.0]


def test_blocks_of_yolov8():
    names = {
        "model.0.conv.weight": "stem",
        "model.2.m.0.cv1.conv.weight": "C2f 1",
        "model.9.cv2.conv.weight": "C2f 4",
        "model.12.cv1.conv.weight": "neck",
        "model.12.cv1.bn.weight": "BatchNorm",
        "model.22.cv2.0.2.weight": "box",
        "model.22.cv2.0.2.bias": "biases",
        "model.22.cv3.1.0.conv.weight": "class hidden",
        "model.22.cv3.1.2.weight": "class rows",
    }
    assert {name: block_of(name, 22) for name in names} == names

"""A pass over a part of a batch: which images, at which scale, and that nothing of it stays behind."""

from __future__ import annotations

import copy

import curvature_oracle as oracle
import pytest
import torch
from tiny_models import batch_of, build, with_criterion
from torch import nn
from ultralytics.nn import tasks
from ultralytics.utils import loss as losses

from yolo_sophia.curvature import GaussNewtonBartlett, Hutchinson
from yolo_sophia.integration.estimate import EstimatePass
from yolo_sophia.integration.subsample import images_in_part, loss_of_part, take_part
from yolo_sophia.integration.window import Window

pytestmark = pytest.mark.compat


@pytest.mark.parametrize(
    ("images", "fraction", "expected"),
    [
        (16, 0.25, 4),
        (64, 0.25, 16),
        (17, 0.25, 5),
        (16, 1.0, 16),
        (16, 0.01, 4),
        (6, 0.25, 4),
        (4, 0.25, 4),
        (3, 0.5, 3),
    ],
)
def test_images_in_part(images, fraction, expected):
    assert images_in_part(images, fraction) == expected


@pytest.fixture
def model():
    model = oracle.tiny_detector()
    model.criterion = model.init_criterion()
    return model


def test_part_is_the_batch_of_its_first_images(model):
    whole = oracle.random_batch(images=5)
    alone = {**whole, "img": whole["img"][:2], **{key: whole[key][:6] for key in ("batch_idx", "cls", "bboxes")}}
    part = take_part(whole, 2)
    assert part["img"].shape[0] == 2 and len(part["cls"]) == len(part["bboxes"]) == len(part["batch_idx"]) == 6
    torch.testing.assert_close(loss_of_part(model, whole, 2), copy.deepcopy(model)(alone)[0].sum())
    middle = take_part(whole, 2, start=1)
    assert torch.equal(middle["img"], whole["img"][1:3]) and torch.equal(middle["bboxes"], whole["bboxes"][3:9])
    assert middle["batch_idx"].tolist() == [0, 0, 0, 1, 1, 1]


def test_nothing_of_the_pass_stays(model):
    # A module that draws random numbers, as a dropout layer in a user's model.
    model.model[2] = torch.nn.Sequential(model.model[2], torch.nn.Dropout())
    for name in ("i", "f", "type"):
        setattr(model.model[2], name, getattr(model.model[2][0], name))
    batch = oracle.random_batch(images=4)
    model(batch)  # statistics that are neither 0 nor 1
    tensors = [*model.named_parameters(), *model.named_buffers()]
    before = [tensor.clone() for _, tensor in tensors]
    random = torch.get_rng_state()
    loss = loss_of_part(model, batch, 2)
    assert torch.equal(torch.get_rng_state(), random)
    loss.backward()  # the graph is whole; gradients reach the model's own parameters
    assert all(p.grad is not None for name, p in tensors if isinstance(p, torch.nn.Parameter) and p.requires_grad)
    for (name, tensor), old in zip(tensors, before):
        owner, _, attribute = name.rpartition(".")
        assert getattr(model.get_submodule(owner), attribute) is tensor, name
        assert torch.equal(tensor, old), name
    assert any("num_batches_tracked" in name for name, _ in tensors)


# Scale ----------------------------------------------------------------------------------------------------------------


def scaled(model: nn.Module) -> nn.Module:
    """The model with a criterion that is not known: its value is another one than the terms say."""
    kind = type(model.criterion)

    def call(self, preds, batch):
        loss, items = kind.__call__(self, preds, batch)
        return 1.5 * loss, items

    model.criterion.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return model


def rtdetr() -> nn.Module:
    decoder = [[2, 3], 1, "RTDETRDecoder", [3, 16, 8, 2, 2, 2]]
    layout = {"nc": 3, "backbone": [[-1, 1, "Conv", [8, 3, 2]]] * 4, "head": [decoder]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tasks.RTDETRDetectionModel(layout, verbose=False).train()
    model.nc = 3
    return with_criterion(model)


MODELS = {
    "detect": lambda: with_criterion(oracle.tiny_detector()),
    **{task: lambda task=task: build(task) for task in ("segment", "pose", "obb", "classify")},
    **{f"{task}26": lambda task=task: build(task, True) for task in ("detect", "segment", "pose", "obb")},
    "rtdetr": rtdetr,
    "unknown detect": lambda: scaled(with_criterion(oracle.tiny_detector())),
    "unknown classify": lambda: scaled(build("classify")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if "26" not in name or hasattr(losses, "E2ELoss")])
def test_expectation_of_an_estimate_does_not_depend_on_the_fraction(name):
    """The trace for a window of a micro-batch of 16 images and one of 8, from 16, 8 and 4 images of the first.

    The objective of the window is the sum of the losses of its micro-batches, so h is the sum of their estimates. The
    tolerance is for the noise of 8 batches and for the normalisers and BatchNorm's statistics of small batches; a
    growth with the images that is off by one power gives a factor of 4 at a quarter of the images.
    """
    torch.manual_seed(0)
    model, task = MODELS[name](), next((t for t in ("segment", "pose", "obb", "classify") if t in name), "detect")
    parameters = list(model.parameters())
    estimate, traces = EstimatePass(model), {16: [], 8: [], 4: [], "window": []}

    def trace(batch: dict, images: int, seed: int, window: tuple[int, ...]) -> float:
        found = Window()
        for size in window:
            found.add(size)
        found.stage(estimate(GaussNewtonBartlett(), batch, images, parameters, seed), images)
        found.scale(estimate.exponent, estimate.recorder.known)
        return sum(float(e.sum()) for e in found.staged if e is not None)

    for seed in range(8):
        first, second = batch_of(task, images=16, seed=seed), batch_of(task, images=8, seed=100 + seed)
        traces["window"].append(trace(first, 16, seed, (16,)) + trace(second, 8, 100 + seed, (8,)))
        for images in (16, 8, 4):
            traces[images].append(trace(first, images, 200 + 10 * seed + images, (16, 8)))
    expected = sum(traces.pop("window"))
    for images, found in traces.items():
        assert 1 / 1.7 < sum(found) / expected < 1.7, images


@pytest.mark.parametrize("name", ["detect", "classify"])
def test_hutchinsons_estimate_is_scaled_by_the_growth_of_the_loss(name):
    model, batch = MODELS[name](), batch_of(name, images=8)
    estimate = EstimatePass(model)
    estimate(Hutchinson(), batch, 4, list(model.parameters()), 0)
    assert estimate.exponent == (1 if name == "detect" else 0)

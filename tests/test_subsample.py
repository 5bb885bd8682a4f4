"""A pass over a part of a batch: which images, at which scale, and that nothing of it stays behind."""

from __future__ import annotations

import copy

import curvature_oracle as oracle
import pytest
import torch

from yolo_sophia.integration.subsample import images_in_part, loss_of_part, take_part

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

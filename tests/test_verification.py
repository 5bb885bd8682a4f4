"""A loss is known by its behaviour: what is edited takes the fallback with one line, what behaves alike is known."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import batch_of, build
from torch import nn
from ultralytics.utils import LOGGER
from ultralytics.utils import loss as losses

from yolo_sophia.curvature import Bernoulli, GaussNewtonBartlett, SignRandomised
from yolo_sophia.integration.criteria import CriterionRecorder, measured_images_exponent
from yolo_sophia.integration.criteria.verification import TOLERANCES

pytestmark = pytest.mark.compat

TWO_HEADS = hasattr(losses, "E2ELoss")
FAMILIES = [pytest.param(t, False, id=t) for t in ("detect", "segment", "pose", "obb", "classify")] + [
    pytest.param(t, True, id=f"{t}26", marks=pytest.mark.requires(TWO_HEADS, reason="no YOLO26"))
    for t in ("detect", "segment", "pose", "obb")
]


@pytest.fixture
def lines():
    """Lines that are logged about the loss."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    LOGGER.addHandler(handler)
    yield SimpleNamespace(get=lambda: [line for line in found if "is not known here" in line])
    LOGGER.removeHandler(handler)


def record(recorder: CriterionRecorder, batch: dict) -> list:
    """Terms of one pass."""
    images = len(batch["img"])
    recorder.start(batch, images)
    return recorder.terms(recorder.model(batch)[0].sum())


def gradient_of(model: nn.Module, batch: dict) -> list[torch.Tensor | None]:
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(model(batch)[0].sum(), params, allow_unused=True)


def subclassed(criterion, **methods) -> None:
    """Make the criterion an instance of a class from elsewhere, in the form of its own."""
    kind = type(criterion)
    criterion.__class__ = type(kind.__name__, (kind,), methods)


# What is edited -------------------------------------------------------------------------------------------------------


def focal(logits, targets):
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return loss * (targets - logits.sigmoid()).abs().detach() ** 1.5


def functional_class_loss(model):
    """The criterion does not call its `bce`."""
    kind = type(model.criterion)

    def call(self, preds, batch):
        recorded, self.bce = self.bce, focal
        try:
            return kind.__call__(self, preds, batch)
        finally:
            self.bce = recorded

    subclassed(model.criterion, __call__=call)


def weighted_class_loss(model):
    model.criterion.bce = nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.tensor(1.5))


def replaced_class_loss(model):
    model.criterion.bce = focal


def edited_box_loss(model, iou_factor: float, distance_factor: float) -> None:
    class Edited(type(model.criterion.bbox_loss)):
        def forward(
            self, pred_dist, pred_bboxes, anchor_points, target_bboxes, target_scores, target_scores_sum, fg_mask, *rest
        ):
            arguments = pred_dist, pred_bboxes, anchor_points, target_bboxes, target_scores, target_scores_sum, fg_mask
            iou, distance = super().forward(*arguments, *rest)
            return iou_factor * iou, distance_factor * distance

    model.criterion.bbox_loss.__class__ = Edited


def half_of_the_box_loss(model):
    """The distances count twice, which is no part of what is differentiated."""
    edited_box_loss(model, 1.0, 2.0)


def other_arguments(model):
    """The signature of the box loss cannot be read."""
    bbox_loss = model.criterion.bbox_loss
    bbox_loss.forward = lambda *args, original=bbox_loss.forward: original(*args)


def term_beside(model):
    """The model's loss has another term of the same outputs."""

    def loss(batch, preds=None):
        value, items = type(model).loss(model, batch, preds)
        return value + 0.1 * sum(x.float().square().mean() for x in outputs), items

    outputs: list = []

    def collect(_, __, output):
        found = output.values() if isinstance(output, dict) else output
        outputs[:] = [x for x in found if isinstance(x, torch.Tensor)]

    model.model[-1].register_forward_hook(collect)
    model.loss = loss


def called_twice(model):
    criterion = model.criterion

    def loss(batch, preds=None):
        preds = model.predict(batch["img"]) if preds is None else preds
        (one, items), (two, _) = criterion(preds, batch), criterion(preds, batch)
        return one + two, items

    model.loss = loss


EDITS = [
    functional_class_loss,
    weighted_class_loss,
    replaced_class_loss,
    half_of_the_box_loss,
    other_arguments,
    term_beside,
    called_twice,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edited_loss_takes_the_fallback_with_one_line(edit, lines):
    model, batch = build("detect"), batch_of("detect", images=4)
    edit(model)
    recorder = CriterionRecorder(model)
    for _ in range(2):
        terms = record(recorder, batch)
        assert not recorder.known and recorder.complete
        assert terms and all(type(term) is SignRandomised for term in terms)
    (line,) = lines.get()
    assert "Loss" in line and "docs/TASKS.md" in line
    # The gradients of the terms make up the gradient of the edited loss.
    params = [p for p in model.parameters() if p.requires_grad]
    outputs, gradients = [t.output for t in terms], [t.gradient for t in terms]
    pulled = torch.autograd.grad(outputs, params, gradients, allow_unused=True)
    for a, b in zip(pulled, gradient_of(model, batch)):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    assert "loss" not in vars(model) or edit in (term_beside, called_twice)


def test_a_focal_classification_loss_takes_the_fallback(lines):
    model, batch = build("classify"), batch_of("classify", images=4)

    class Focal:
        def __call__(self, preds, batch):
            nll = F.cross_entropy(preds, batch["cls"], reduction="none")
            loss = ((1 - torch.exp(-nll)) ** 2 * nll).mean()
            return loss, loss.detach()

    model.criterion = Focal()
    recorder = CriterionRecorder(model)
    assert all(type(term) is SignRandomised for term in record(recorder, batch))
    assert not recorder.known and recorder.estimate_exponent == -1
    assert len(lines.get()) == 1 and "Focal" in lines.get()[0]


@pytest.mark.requires(TWO_HEADS, reason="no YOLO26")
def test_one_edited_head_of_two_takes_the_fallback(lines):
    model, batch = build("detect", True), batch_of("detect", images=4)
    model.criterion.one2one.bce = nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.tensor(3.0))
    recorder = CriterionRecorder(model)
    record(recorder, batch)
    assert not recorder.known and len(lines.get()) == 1


def test_a_callable_that_is_replaced_in_mid_run_is_verified_again(lines):
    model, batch = build("detect"), batch_of("detect", images=4)
    recorder = CriterionRecorder(model)
    record(recorder, batch)
    assert recorder.known
    weighted_class_loss(model)
    record(recorder, batch)
    assert not recorder.known and len(lines.get()) == 1
    model.criterion = model.init_criterion()  # another object, in the known form
    record(recorder, batch)
    assert recorder.known and len(lines.get()) == 1


# What behaves alike ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "two_heads"), FAMILIES)
def test_a_class_from_elsewhere_that_behaves_alike_is_known(task, two_heads, lines):
    model, batch = build(task, two_heads), batch_of(task, images=4)
    subclassed(model.criterion, __module__="elsewhere")
    recorder = CriterionRecorder(model)
    record(recorder, batch)
    assert recorder.known and recorder.difference < 1e-5 and not lines.get()


def test_a_box_loss_that_counts_twice_is_followed():
    """The curvature of the IoU is that of the criterion's own callable."""
    model, batch = build("detect"), batch_of("detect", images=4)
    plain = record(CriterionRecorder(model), batch)[-1].root
    edited_box_loss(model, 2.0, 1.0)
    recorder = CriterionRecorder(model)
    twice = record(recorder, batch)[-1].root
    assert recorder.known
    torch.testing.assert_close(twice, plain * 2**0.5)


def test_gains_that_change_in_mid_run_are_followed():
    model, batch = build("detect"), batch_of("detect", images=4)
    recorder = CriterionRecorder(model)
    before = record(recorder, batch)[0].coefficient
    model.criterion.hyp.cls *= 3
    after = record(recorder, batch)[0].coefficient
    assert recorder.known
    torch.testing.assert_close(after, 3 * before)
    again = CriterionRecorder(model)
    record(again, batch)
    assert again.known


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"weight": torch.tensor([0.5, 1.0, 2.0])}])
def test_arguments_of_the_cross_entropy_are_followed(options):
    model, batch = build("classify"), batch_of("classify", images=4)
    loss = nn.CrossEntropyLoss(**options)
    model.criterion = lambda preds, batch: (loss(preds, batch["cls"]), None)
    recorder = CriterionRecorder(model)
    record(recorder, batch)
    assert recorder.known and recorder.difference < 1e-5 and recorder.estimate_exponent == 0


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("task", "two_heads"), FAMILIES)
def test_autocast_changes_nothing_in_the_verification(task, two_heads, dtype):
    model, batch = build(task, two_heads), batch_of(task, images=4)
    half = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
    recorder = CriterionRecorder(model)
    recorder.start(batch, 4)
    with half:
        loss = model(batch)[0].sum()
    terms = recorder.terms(loss)
    assert recorder.known and recorder.difference < TOLERANCES[torch.float32] / 10
    assert any(term.output.dtype == dtype for term in terms)
    whole = type(model).loss
    model.loss = lambda *args: [1.1 * whole(model, *args)[0], None]
    recorder = CriterionRecorder(model)
    recorder.start(batch, 4)
    with half:
        loss = model(batch)[0].sum()
    recorder.terms(loss)
    assert not recorder.known


# Terms without a gradient ---------------------------------------------------------------------------------------------


def frozen(model: nn.Module, *prefixes: str) -> nn.Module:
    for name, p in model.named_parameters():
        if name.startswith(prefixes):
            p.requires_grad = False
    return model


@pytest.mark.parametrize(("task", "two_heads"), [f for f in FAMILIES if "classify" not in f.id])
def test_terms_behind_frozen_parameters_are_left_out(task, two_heads):
    model, batch = build(task, two_heads), batch_of(task, images=4)
    head = f"model.{len(model.model) - 1}"
    frozen(model, *(f"model.{i}." for i in range(len(model.model) - 1)), f"{head}.cv3", f"{head}.one2one_cv3")
    recorder = CriterionRecorder(model)
    terms = record(recorder, batch)
    assert recorder.known and terms
    found = [p for p in model.parameters() if p.requires_grad]
    estimates = GaussNewtonBartlett()(terms, found)
    assert any(e is not None and e.any() for e in estimates)


def test_a_term_that_lost_its_gradient_is_an_error():
    model, batch = build("detect"), batch_of("detect", images=4)
    bce = model.criterion.bce
    model.criterion.bce = lambda logits, targets: bce(logits, targets)
    kind = type(model.criterion)

    def call(self, preds, batch):
        recorded = self.bce
        self.bce = lambda logits, targets: recorded(logits.detach(), targets)
        try:
            return kind.__call__(self, preds, batch)
        finally:
            self.bce = recorded

    subclassed(model.criterion, __call__=call)
    recorder = CriterionRecorder(model)
    with pytest.raises(RuntimeError, match=r"found Bernoulli terms .* no gradient.*expected a gradient.*Remove"):
        record(recorder, batch)


def test_everything_frozen_leaves_the_error_to_ultralytics():
    model, batch = frozen(build("detect"), "model."), batch_of("detect", images=4)
    assert record(CriterionRecorder(model), batch) == []
    assert GaussNewtonBartlett()([], list(model.parameters())) == [None for _ in model.parameters()]


def test_a_pass_without_foreground_is_not_complete():
    model, batch = build("detect"), batch_of("detect", images=4)
    empty = {key: value[:0] if len(value) == len(batch["cls"]) else value for key, value in batch.items()}
    recorder = CriterionRecorder(model)
    assert [type(term) for term in record(recorder, empty)] == [Bernoulli]
    assert recorder.known and not recorder.complete
    record(recorder, batch)
    assert recorder.complete
    # A pass that is not complete verifies nothing of the boxes: the next one is verified again.
    half_of_the_box_loss(model)
    recorder = CriterionRecorder(model)
    record(recorder, empty)
    assert recorder.known
    record(recorder, batch)
    assert not recorder.known


# Scale ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "two_heads"), FAMILIES)
def test_growth_with_the_images_is_measured_as_declared(task, two_heads):
    model, batch = build(task, two_heads), batch_of(task, images=8)
    recorder = CriterionRecorder(model)
    record(recorder, batch)
    assert recorder.known
    for images in (4, 8):
        assert measured_images_exponent(model, batch, images) == recorder.estimate_exponent

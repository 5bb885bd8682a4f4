"""Every criterion's terms: the exact diagonal where there is a likelihood, the stated stand-in where there is none.

The oracle takes nothing from the product. It replaces the arguments of PyTorch's loss functions inside the real
criterion by leaves and differentiates the criterion's value by them: that gives each output's curvature with all gains,
crops, weights and normalisers. Exact Jacobians of those outputs give the diagonal.
"""

from __future__ import annotations

import copy
import math
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import curvature_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from tiny_models import GAINS, batch_of, build, with_criterion
from torch import Generator, nn
from ultralytics.nn import tasks
from ultralytics.utils import loss as losses
from ultralytics.utils.metrics import probiou

from yolo_sophia.curvature import Categorical, EmpiricalFisher, GaussNewtonBartlett, Quadratic, SignRandomised
from yolo_sophia.integration.criteria import CriterionRecorder, recorder_for
from yolo_sophia.integration.subsample import loss_of_part, take_part

pytestmark = pytest.mark.compat

TWO_HEADS = hasattr(losses, "E2ELoss")
FAMILIES = [pytest.param(t, False, id=t) for t in ("detect", "segment", "pose", "obb", "classify")] + [
    pytest.param(t, True, id=f"{t}26", marks=pytest.mark.requires(TWO_HEADS, reason="no YOLO26"))
    for t in ("detect", "segment", "pose", "obb")
]


@pytest.fixture
def double():
    with oracle.float64(), mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def recorded_pass(model: nn.Module, batch: dict) -> SimpleNamespace:
    """A pass through the model and its loss, recorded by the product."""
    recorder = CriterionRecorder(model)
    recorder.start(batch, len(batch["img"]))
    loss = model(batch)[0].sum()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names, params = map(list, zip(*named))
    return SimpleNamespace(recorder=recorder, loss=loss, terms=recorder.terms(loss), names=names, params=params)


def diagonal(outputs: list, curvatures: list, params: list) -> torch.Tensor:
    """Sum of curvature times squared Jacobian over outputs that are drawn one by one, flat over the parameters."""
    total = 0.0
    for output, curvature in zip(outputs, curvatures):
        rows = curvature.expand_as(output).reshape(-1)
        active = rows.nonzero().flatten()
        for part in active.split(512):
            cotangents = F.one_hot(part, output.numel()).to(output.dtype).reshape(-1, *output.shape)
            grads = torch.autograd.grad(
                output, params, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
            flat = [p.new_zeros(len(part), p.numel()) if g is None else g.flatten(1) for g, p in zip(grads, params)]
            total = total + (torch.cat(flat, 1).square() * rows[part, None]).sum(0)
    return total


def exact_diagonal(model: nn.Module, batch: dict, params: list, functions: tuple[str, ...]) -> torch.Tensor:
    """Diagonal of the Gauss-Newton matrix of all losses that the model computes with these functions of PyTorch."""
    recorded = []

    def spy(original, name):
        def call(output, *args, **kwargs):
            leaf = output.detach().requires_grad_()
            recorded.append((name, output, leaf))
            return original(leaf, *args, **kwargs)

        return call

    with mock.patch.multiple(F, **{name: spy(getattr(F, name), name) for name in functions}):
        loss = model(batch)[0].sum()
    outputs, curvatures = [], []
    for name, output, leaf in recorded:
        if output.requires_grad:
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            # The convention for an absolute error: a Laplace distribution of scale 1, whose Fisher information is the
            # slope of the loss.
            flat = name == "l1_loss"
            outputs.append(output)
            curvatures.append(gradient.abs() if flat else torch.autograd.grad(gradient.sum(), leaf)[0])
    return diagonal(outputs, curvatures, params)


@pytest.mark.parametrize(("task", "two_heads"), [f for f in FAMILIES if "classify" not in f.id])
def test_expected_estimate_of_the_likelihoods_is_the_exact_diagonal(double, task, two_heads):
    model, batch = build(task, two_heads), batch_of(task)
    run = recorded_pass(model, batch)
    small = [p for p in run.params if p.numel() < 600]  # of every branch some; whole Jacobians are large
    terms = [t for t in run.terms if not isinstance(t, (Quadratic, Categorical))]
    found = diagonal([t.output for t in terms], [oracle.second_moment(t) for t in terms], small)
    exact = exact_diagonal(model, batch, small, ("binary_cross_entropy_with_logits", "l1_loss"))
    assert (exact > 0).float().mean() > 0.5
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-12)


def test_classification_is_the_exact_diagonal(double):
    model, batch = build("classify"), batch_of("classify", images=3)
    run = recorded_pass(model, batch)
    found = oracle.expected_estimate(run.terms, run.params)
    logits = model(batch["img"])
    hessian = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, batch["cls"]), logits.detach())
    rows = oracle.jacobian(logits, run.params)
    exact = torch.einsum("kp,kl,lp->p", rows, hessian.reshape(logits.numel(), -1), rows)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("task", "two_heads"), FAMILIES)
def test_no_parameter_with_a_gradient_is_without_curvature(task, two_heads):
    model, batch = build(task, two_heads), batch_of(task)
    run = recorded_pass(model, batch)
    assert run.recorder.known
    gradients = torch.autograd.grad(run.loss, run.params, retain_graph=True, allow_unused=True)
    for estimate in (GaussNewtonBartlett(), EmpiricalFisher()):
        found = estimate(run.terms, run.params, Generator().manual_seed(0))
        for name, gradient, h in zip(run.names, gradients, found):
            if gradient is not None and gradient.any():
                assert h is not None and h.any() and h.isfinite().all(), name
    # Nothing of the recording stays on the model.
    copy.deepcopy(model)
    assert "loss" not in vars(model)
    plain = model(batch)[0].sum()
    torch.testing.assert_close(plain, run.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("task", "two_heads"), [family for family in FAMILIES if family.values[0] != "classify"])
def test_without_objects_there_is_an_estimate(task, two_heads):
    batch = batch_of(task)
    empty = {key: value[:0] if len(value) == len(batch["cls"]) else value for key, value in batch.items()}
    empty["masks"] = torch.zeros_like(batch["masks"])
    run = recorded_pass(build(task, two_heads), empty)
    found = GaussNewtonBartlett()(run.terms, run.params, Generator().manual_seed(0))
    assert all(h is None or h.isfinite().all() for h in found) and any(h is not None and h.any() for h in found)


# Stand-ins ------------------------------------------------------------------------------------------------------------


def assert_projection(root: torch.Tensor, hessian: torch.Tensor) -> None:
    """P = A A^T is the projection of H iff P >= 0, P - H >= 0 and P (P - H) = 0."""
    projection = root @ root.mT
    rest = projection - (hessian + hessian.mT) / 2
    scale = float(hessian.abs().max())
    assert torch.linalg.eigvalsh(rest).min() > -1e-8 * scale
    assert (projection @ rest).abs().max() < 1e-8 * scale**2


def test_keypoints_have_the_projected_hessian_of_their_similarity(double):
    model, batch = build("pose"), batch_of("pose")
    original, recorded = model.criterion.keypoint_loss, []
    model.criterion.keypoint_loss = lambda *args: recorded.append(args) or original(*args)
    (term,) = [t for t in recorded_pass(model, batch).terms if isinstance(t, Quadratic) and t.output.shape[-1] == 2]
    ((points, targets, visible, area), *_) = recorded
    anchors, count = visible.shape
    gain = GAINS["pose"] * len(batch["img"]) / (anchors * count)
    spread = (2 * original.sigmas).square() * (area + 1e-9) * 2  # 2 s (2 sigma)^2 of the COCO measure
    negative = 0
    for i in range(0, anchors, 3):
        for k in range(count):

            def loss(x, i=i, k=k):
                similarity = torch.exp(-(x - targets[i, k, :2]).square().sum() / spread[i, k])
                return gain * count / (visible[i].sum() + 1e-9) * visible[i, k] * (1 - similarity)

            hessian = torch.func.hessian(loss)(points[i, k, :2].detach())
            if visible[i, k]:
                assert_projection(term.root[i * count + k], hessian)
                negative += bool(torch.linalg.eigvalsh(hessian).min() < 0)
            else:
                assert not term.root[i * count + k].any()
    assert negative


def test_rotated_boxes_have_the_projected_hessian_of_overlap_and_angle(double):
    model, batch = build("obb"), batch_of("obb")
    original, recorded = model.criterion.bbox_loss, []
    original.register_forward_pre_hook(lambda _, args: recorded.append(args))
    (term,) = [t for t in recorded_pass(model, batch).terms if isinstance(t, Quadratic)]
    _, boxes, _, targets, scores, total, mask = recorded[0][:7]
    floor = {"floor": original.floor} if hasattr(original, "floor") else {}
    angles = hasattr(model.criterion, "calculate_angle_loss")
    weights = len(batch["img"]) * scores.sum(-1)[mask] / total
    assert len(term.root) == len(weights) > 10
    for box, target, weight, root in zip(boxes.detach()[mask], targets[mask], weights, term.root):

        def loss(x, target=target, weight=weight):
            value = GAINS["box"] * (1 - probiou(x[None], target[None], **floor).squeeze())
            if angles:
                shape = torch.exp(-(torch.log(target[2] / target[3]) ** 2) / 9)
                value = value + GAINS["angle"] * shape * torch.sin(2 * (x[4] - target[4])) ** 2
            return weight * value

        assert_projection(root, torch.func.hessian(loss)(box))


@pytest.mark.requires(TWO_HEADS, reason="no YOLO26")
def test_residual_log_likelihood_is_the_outer_product_of_each_keypoint(double):
    model, batch = build("pose", two_heads=True), batch_of("pose")
    many = model.criterion.one2many
    original, recorded = many.rle_loss, []
    many.rle_loss = lambda *args: recorded.append(args) or original(*args)
    term = next(t for t in recorded_pass(model, batch).terms if isinstance(t, Quadratic) and t.output.shape[-1] == 5)
    ((sigma, log_phi, error, weight), *_) = recorded
    c = GAINS["rle"] * len(batch["img"]) * model.criterion.o2m / len(sigma)
    s, w = sigma.detach(), weight[:, None]
    # Per keypoint w sum_d (log s_d - log phi + log 2 s_d + |e_d|).
    gradient = torch.cat([2 * w / s, -2 * w, w * error.detach().sign()], 1) * math.sqrt(c)
    torch.testing.assert_close(term.output, torch.cat([sigma, log_phi[:, None], error], 1))
    torch.testing.assert_close(term.root @ term.root.mT, gradient[:, :, None] * gradient[:, None, :])


# Two heads, and distillation ------------------------------------------------------------------------------------------


@pytest.mark.requires(TWO_HEADS, reason="no YOLO26")
def test_the_weights_of_the_heads_are_those_of_the_epoch():
    model, batch = build("detect", two_heads=True), batch_of("detect")
    model.args.epochs = 10
    before = recorded_pass(model, batch).terms
    model.criterion.update()
    o2m, o2o = model.criterion.o2m, model.criterion.o2o
    assert (o2m, o2o) != (0.8, pytest.approx(0.2))
    after = recorded_pass(model, batch).terms
    for old, new, factor in zip(before, after, [o2m / 0.8] * 3 + [o2o / (1 - 0.8)] * 3):
        if isinstance(new, Quadratic):
            torch.testing.assert_close(new.root, old.root * factor**0.5)
        else:
            torch.testing.assert_close(new.coefficient, old.coefficient * factor)


@pytest.mark.requires(find_spec("ultralytics.nn.distill_model"), reason="no distillation")
def test_distillation_is_the_exact_diagonal(double):
    from ultralytics.nn import distill_model as distill

    teacher, student = build("detect", True, seed=1), build("detect", True)
    student.args.imgsz, student.args.dis = 48, 6.0
    torch.manual_seed(1)
    model = distill.DistillationModel(teacher, student).double().train()
    batch = batch_of("detect")
    run = recorded_pass(model, batch)
    projector = [p for n, p in zip(run.names, run.params) if "projector" in n and p.numel() < 600]
    terms = run.terms[6:]  # after those of the two heads
    found = diagonal([t.output for t in terms], [oracle.second_moment(t) for t in terms], projector)
    exact = exact_diagonal(model, batch, projector, ("mse_loss",))
    assert (exact > 0).float().mean() > 0.5  # some units of the projector may be dead
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-12)
    assert not any(name.startswith("teacher") for name in run.names)


# Losses that are not known --------------------------------------------------------------------------------------------


def rtdetr() -> tuple[nn.Module, dict]:
    """A tiny RT-DETR: the real decoder with few queries and the matched set loss."""
    conv = [-1, 1, "Conv", [8, 3, 2]]
    decoder = [[2, 3], 1, "RTDETRDecoder", [3, 16, 8, 2, 2, 2]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layout = {"nc": 3, "backbone": [conv] * 4, "head": [decoder]}
        model = tasks.RTDETRDetectionModel(layout, verbose=False).train()
    model.nc = 3
    return with_criterion(model), batch_of("detect")


def unknown(task: str, two_heads: bool = False) -> tuple[nn.Module, dict]:
    """A model whose criterion has the name and the callables of Ultralytics' own, and another value."""
    model = build(task, two_heads)
    kind = type(model.criterion)

    def scaled(self, preds, batch):
        loss, items = kind.__call__(self, preds, batch)
        return 1.5 * loss, items

    model.criterion.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__call__": scaled})
    return model, batch_of(task)


def semantic() -> tuple[nn.Module, dict]:
    """Semantic segmentation, since Ultralytics 8.4."""
    layout = {"nc": 3, "backbone": [[-1, 1, "Conv", [8, 3, 2]]] * 4, "head": [[[2, 3], 1, "SemanticSegment", ["nc"]]]}
    model = tasks.SemanticSegmentationModel(layout, verbose=False).train()
    model.args = SimpleNamespace(data="")
    return with_criterion(model), {"img": torch.rand(2, 3, 48, 48), "semantic_mask": torch.randint(3, (2, 48, 48))}


STRANGERS = {
    "rtdetr": rtdetr,
    "detect": lambda: unknown("detect"),
    "classify": lambda: unknown("classify"),
}
if TWO_HEADS:
    STRANGERS["segment26"] = lambda: unknown("segment", True)
if hasattr(tasks, "SemanticSegmentationModel"):
    STRANGERS["semantic"] = semantic


@pytest.mark.parametrize("name", STRANGERS)
def test_unknown_losses_are_cut_at_the_outputs_of_the_model(name):
    """The gradients at the outputs make up the whole gradient: no output is missing, and none counts twice."""
    torch.manual_seed(0)
    model, batch = STRANGERS[name]()
    run = recorded_pass(model, batch)
    assert not run.recorder.known
    assert all(type(t) is SignRandomised for t in run.terms)
    outputs, gradients = [t.output for t in run.terms], [t.gradient for t in run.terms]
    pulled = torch.autograd.grad(outputs, run.params, gradients, retain_graph=True, allow_unused=True)
    whole = torch.autograd.grad(run.loss, run.params, retain_graph=True, allow_unused=True)
    found = GaussNewtonBartlett()(run.terms, run.params, Generator().manual_seed(0))
    for parameter, a, b, h in zip(run.names, pulled, whole, found):
        if b is not None and b.any():
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()), msg=parameter)
            assert h is not None and h.any(), parameter


def test_a_model_that_is_trained_without_its_loss_is_refused():
    model, batch = build("detect"), batch_of("detect")
    model.criterion = nn.MSELoss()
    recorder = CriterionRecorder(model)
    recorder.start(batch, 2)
    model.predict(batch["img"])
    with pytest.raises(RuntimeError, match=r"trained without its `loss`.*another optimizer"):
        recorder.terms()


def test_world_models_share_the_detection_loss():
    layout = {"nc": 3, "backbone": [[-1, 1, "Conv", [8, 3, 2]]] * 4}
    layout["head"] = [[[2, 3], 1, "WorldDetect", ["nc", 512, False]]]
    model = tasks.WorldModel(layout, nc=3, verbose=False).train()
    model.args = SimpleNamespace(**GAINS)
    run = recorded_pass(with_criterion(model), {**batch_of("detect"), "txt_feats": torch.randn(2, 3, 512)})
    assert run.recorder.known
    found = GaussNewtonBartlett()(run.terms, run.params, Generator().manual_seed(0))
    assert all(h.any() for h, name in zip(found, run.names) if ".dfl." not in name)


# A part of the batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "two_heads", "overlap"),
    [pytest.param(*family.values, True, id=family.id, marks=family.marks) for family in FAMILIES]
    + [pytest.param("segment", False, False, id="segment-one mask for each object")],
)
def test_a_part_of_the_batch_gives_an_estimate(task, two_heads, overlap):
    model, batch = build(task, two_heads), batch_of(task, images=3)
    if not overlap:
        model.args.overlap_mask = model.criterion.overlap = False
        batch["masks"] = torch.randint(2, (len(batch["cls"]), 12, 12)).float()
    alone = copy.deepcopy(model)(take_part(batch, 2, overlap))[0].sum()
    recorder = recorder_for(model, model.criterion)
    recorder.start()
    torch.testing.assert_close(loss_of_part(model, batch, 2), alone)
    assert len(recorder.terms()) >= 1

"""h is the Gauss-Newton diagonal of the loss: exact oracles in float64, convergence of the estimates, no side effects.

The oracle of the detection loss is that of `tests/curvature_oracle.py`, which takes nothing from the product; that of
plain cross-entropies is curvlinops.
"""

from __future__ import annotations

import inspect
import random
from types import SimpleNamespace

import curvature_oracle as oracle
import numpy as np
import pytest
import torch
from torch import Generator, nn
from ultralytics.utils.loss import v8DetectionLoss

from yolo_sophia.curvature import (
    ESTIMATORS,
    Bernoulli,
    Categorical,
    EmpiricalFisher,
    Gaussian,
    GaussNewtonBartlett,
    Hutchinson,
    Quadratic,
)
from yolo_sophia.curvature.losses import cross_entropy
from yolo_sophia.integration.criteria import recorder_for
from yolo_sophia.integration.criteria.detect import DetectionRecorder
from yolo_sophia.integration.criteria.model import FunctionalLossRecorder
from yolo_sophia.integration.criteria.psd_hessian import quadratic

SAMPLES = 12_000
pytestmark = pytest.mark.compat


@pytest.fixture
def double():
    with oracle.float64():
        yield


HAS_CLASS_WEIGHTS = pytest.mark.requires(
    "class_weights" in inspect.getsource(v8DetectionLoss), reason="this Ultralytics has no class weights"
)


@pytest.fixture(
    scope="module", params=[pytest.param(None, id="plain"), pytest.param(True, id="weighted", marks=HAS_CLASS_WEIGHTS)]
)
def proof(request) -> SimpleNamespace:
    """A pass through the tiny detector, and its exact diagonals; computing them checks the formula of the loss."""
    with oracle.float64():
        batch = oracle.random_batch()
        weights = oracle.CLASS_WEIGHTS if request.param else None
        run = oracle.forward(oracle.tiny_detector(class_weights=weights), batch)
        assert weights is None or run.criterion.class_weights is not None
        exact = oracle.exact_diagonals(run, batch)
        return SimpleNamespace(run=run, exact=exact, formula=oracle.formula(run, batch))


def off_tensors(found: torch.Tensor, exact: torch.Tensor, run) -> dict[str, float]:
    """Parameter tensors whose sum is not within the tolerance, with the ratio."""
    ratios = oracle.tensor_ratios(found, exact, run)
    return {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > oracle.TENSOR_TOLERANCE}


# The detection loss ---------------------------------------------------------------------------------------------------


def test_enumerated_labels_have_the_second_moment_of_the_formula(proof, double):
    moments = oracle.exact_moments(proof.formula)
    assert list(proof.run.terms) == ["cls", "dfl", "ciou"]
    for name, term in proof.run.terms.items():
        torch.testing.assert_close(oracle.second_moment(term), moments[name], rtol=1e-9, atol=1e-12, msg=name)


def test_expected_estimate_is_the_exact_diagonal_in_every_entry(proof, double):
    run = proof.run
    expected = oracle.expected_estimate(list(run.terms.values()), run.params)
    torch.testing.assert_close(expected, sum(proof.exact[t] for t in run.terms), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("proof", "case"),
    [pytest.param(None, case, id=f"plain-{case}") for case in oracle.CASES]
    + [pytest.param(True, "all", id="weighted-all", marks=HAS_CLASS_WEIGHTS)],
    indirect=["proof"],
)
def test_mean_of_estimates_is_the_exact_diagonal(proof, double, case):
    run, terms = proof.run, oracle.CASES[case]
    exact = sum(proof.exact[t] for t in terms)
    found = oracle.mean_estimate([run.terms[t] for t in terms], run.params, SAMPLES)
    assert off_tensors(found, exact, run) == {}
    assert abs(found.sum() / exact.sum() - 1) <= oracle.OVERALL_TOLERANCE
    # The comparison left no tensor out but those that the terms do not reach.
    compared = set(oracle.tensor_ratios(found, exact, run))
    blind = {"cls": "cv2", "dfl": "cv3", "ciou": "cv3"}.get(case, "nothing")
    assert compared == {name for name in run.names if blind not in name}
    assert any("cv2" in name for name in compared) == (case != "cls")


def test_estimator_squares_the_pull_back_of_what_the_terms_sample(proof, double):
    terms = list(proof.run.terms.values())
    assert oracle.estimator_difference(terms, proof.run.params) < 1e-12


def test_squared_true_label_gradients_are_refused(proof, double):
    """The comparison above tells Gauss-Newton-Bartlett from what is often taken for it."""
    run = proof.run
    exact = sum(proof.exact[t] for t in run.terms)
    grads = torch.autograd.grad(run.loss, run.params, retain_graph=True)
    fisher = EmpiricalFisher()(list(run.terms.values()), run.params, None)
    for impostor in ([g.square() for g in grads], fisher):
        off = off_tensors(oracle.flatten(impostor, run.params), exact, run)
        assert len(off) > 0.8 * len(run.names)


def test_empirical_fisher_is_the_squared_pull_back_of_root_weighted_residuals(proof, double):
    """Against the formula: only the labels differ from the sampled estimate, the weights are the same."""
    f, run = proof.formula, proof.run
    p = f.scores.detach().sigmoid()
    total = ((p - f.target_scores) * f.c_cls.sqrt()).mul(f.scores).sum()
    f_value = 0.0
    for b, a in f.c_box.nonzero().tolist():
        box = oracle.decode(f.logits[b, a], f.centres[a])
        f_value = f_value + f.c_box[b, a].sqrt() * (1 - oracle.ciou(box, f.targets[b, a]))
        sides = torch.cat([f.centres[a] - f.targets[b, a, :2], f.targets[b, a, 2:] - f.centres[a]])
        logp = f.logits[b, a].log_softmax(-1)
        for side, t in enumerate(sides.clamp(0, oracle.BINS - 1.01).tolist()):
            nll = -(int(t) + 1 - t) * logp[side, int(t)] - (t - int(t)) * logp[side, int(t) + 1]
            f_value = f_value + f.c_dfl[b, a].sqrt() * nll
    grads = torch.autograd.grad(total + f_value, run.params, retain_graph=True)
    found = EmpiricalFisher()(list(run.terms.values()), run.params, None)
    for g, e in zip(grads, found):
        torch.testing.assert_close(e, g.square(), rtol=1e-7, atol=1e-10 * float(g.square().max()))


def test_ciou_root_is_the_projected_hessian(proof, double):
    """P is the projection of H onto the semi-definite matrices iff P >= 0, P - H >= 0 and P (P - H) = 0."""
    f, boxes = proof.formula, proof.formula.boxes().detach()
    root = proof.run.terms["ciou"].root
    foreground = (f.c_box > 0).nonzero().tolist()
    assert len(foreground) > 20
    indefinite = 0
    assert len(root) == len(foreground)
    for (b, a), own in zip(foreground, root):
        projection = own @ own.mT / f.c_box[b, a]
        target = f.targets[b, a]
        hessian = torch.func.hessian(lambda x, target=target: 1 - oracle.ciou(x, target))(boxes[b, a])
        rest = projection - hessian
        scale = float(hessian.abs().max())
        assert torch.linalg.eigvalsh(projection).min() > -1e-9 * scale
        assert torch.linalg.eigvalsh(rest).min() > -1e-9 * scale
        assert (projection @ rest).abs().max() < 1e-9 * scale**2
        indefinite += bool(torch.linalg.eigvalsh(hessian).min() < -1e-6 * scale)
    assert indefinite  # else nothing was projected


# Plain cross-entropies, against curvlinops ----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical"])
def test_plain_networks_agree_with_curvlinops(double, likelihood, reduction):
    curvlinops = pytest.importorskip("curvlinops")
    rows, classes = 12, 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes))
        x, soft = torch.randn(rows, 4), torch.rand(rows, classes)
    params = list(net.parameters())
    if likelihood == "bernoulli":
        loss, target, predictions = nn.BCEWithLogitsLoss(reduction=reduction), soft, rows * classes
    else:
        loss, target, predictions = nn.CrossEntropyLoss(reduction=reduction), soft.argmax(1), rows
    operator = curvlinops.GGNLinearOperator(net, loss, params, [(x, target)], progressbar=False)
    exact = (operator @ torch.eye(operator.shape[1])).diag()
    coefficient = torch.tensor(1.0 / predictions if reduction == "mean" else 1.0)
    term = {"bernoulli": Bernoulli, "categorical": Categorical}[likelihood](net(x), coefficient)
    found = oracle.mean_estimate([term], params, 40_000)
    for a, b in zip(found.split([p.numel() for p in params]), exact.split([p.numel() for p in params])):
        assert float(a.sum() / b.sum()) == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02 * float(exact.mean()))


# No side effects ------------------------------------------------------------------------------------------------------


def single(boxes: int = 3, model=None):
    """A float32 pass: the run and its terms."""
    run = oracle.forward(model or oracle.tiny_detector(), oracle.random_batch(boxes=boxes))
    return run, list(run.terms.values())


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimate_leaves_gradients_buffers_and_random_states_alone(name):
    run, terms = single()
    for p in run.params[::2]:  # as in the middle of an accumulation
        p.grad = torch.ones_like(p)
    before = [None if p.grad is None else p.grad.clone() for p in run.params]
    weights = [p.detach().clone() for p in run.params]
    buffers = [b.clone() for b in run.model.buffers()]
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    ESTIMATORS[name]()(terms, run.params, seeded())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (str(np.random.get_state()), random.getstate())
    assert all(torch.equal(a, b) for a, b in zip(buffers, run.model.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(weights, run.params))
    for p, g in zip(run.params, before):
        assert p.grad is None if g is None else torch.equal(p.grad, g)


def test_recording_draws_no_global_noise_and_changes_no_loss():
    model, batch = oracle.tiny_detector(), oracle.random_batch()
    criterion = model.init_criterion()
    preds = model(batch["img"])
    plain = criterion(preds, batch)[0]
    recorder = DetectionRecorder(criterion)
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    recorder.start()
    recorded = criterion(preds, batch)[0]
    recorder.terms()
    assert torch.equal(plain, recorded)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (str(np.random.get_state()), random.getstate())


def test_parameters_with_the_same_gradient_or_one_number_for_all():
    a, b, c = (torch.zeros(3, requires_grad=True) for _ in range(3))
    target = torch.tensor([1.0, 2.0, 3.0])
    terms = [Gaussian(a + b, torch.ones(()), target), Gaussian(c.sum(), torch.ones(()), torch.tensor(2.0))]
    for scale in (1.0, 64.0):
        found = EmpiricalFisher()(terms, [a, b, c], scale=scale)
        for value, expected in zip(found, (target.square(), target.square(), torch.full((3,), 4.0))):
            assert torch.equal(value, expected)


class Cubed(torch.autograd.Function):
    """x^3, in a form that cannot be batched."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * Squared.apply(x) * grad


class Squared(torch.autograd.Function):
    """x^2, likewise."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        assert x.ravel().tolist(), "reads values, as no batched pass can"
        return 2 * x * grad * float(grad.sum() / grad.sum())


@pytest.mark.parametrize("cube", [lambda x: x**3, Cubed.apply], ids=["batched", "cannot be batched"])
def test_a_loss_of_rows_has_the_hessian_of_each(cube):
    rows = torch.tensor([[1.0, 2.0, 3.0], [0.5, 1.0, 2.0]])
    term = quadratic(rows.clone().requires_grad_(), torch.ones(2), lambda x: cube(x).sum() + (x[:, 0] * x[:, 1]).sum())
    expected = torch.diag_embed(6 * rows)
    expected[:, 0, 1] = expected[:, 1, 0] = 1.0
    torch.testing.assert_close(term.root @ term.root.mT, expected)


def test_backward_after_an_estimate_is_bit_identical():
    plain, _ = single()
    plain.loss.backward()
    run, terms = single()
    assert any(e.any() for e in GaussNewtonBartlett()(terms, run.params, seeded()))
    run.loss.backward()
    for name, p, q in zip(run.names, plain.params, run.params):
        assert torch.equal(p.grad, q.grad), name
    for a, b in zip(plain.model.buffers(), run.model.buffers()):
        assert torch.equal(a, b)


def test_noise_comes_from_the_generator_alone():
    run, terms = single()
    first, same, other = (GaussNewtonBartlett()(terms, run.params, seeded(s)) for s in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, same))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))
    assert all(e.shape == p.shape and not e.requires_grad for e, p in zip(first, run.params))


@pytest.mark.parametrize("estimator", [*ESTIMATORS.values(), Hutchinson])
def test_without_a_generator_the_global_one_is_used(estimator):
    """As in a loop of one's own: estimator(terms, params)."""
    w = torch.ones(4, 3, requires_grad=True)
    f = torch.randn(8, 4, generator=seeded()) @ w
    given = (f.square().sum() if estimator is Hutchinson else cross_entropy(f, torch.arange(8) % 3)), [w]
    torch.manual_seed(3)
    (short,) = estimator()(*given)
    torch.manual_seed(3)
    (expected,) = estimator()(*given, torch.default_generator)
    assert torch.equal(short, expected) and short.any()


# Inputs of every kind -------------------------------------------------------------------------------------------------


def test_without_foreground_the_box_branch_has_no_estimate():
    run, terms = single(boxes=0)
    assert [type(t) for t in terms] == [Bernoulli]
    estimates = dict(zip(run.names, GaussNewtonBartlett()(terms, run.params, seeded())))
    # Before 8.4 the loss adds 0 times the box outputs there: no path, or a path of zeros.
    assert all(estimates[n] is None or not estimates[n].any() for n in run.names if "cv2" in n)
    assert all(estimates[n].any() for n in run.names if "cv2" not in n)
    run.loss.backward()
    # TSS is clamped to 1: the coefficient of every score is the gain times the batch size.
    assert float(terms[0].coefficient) == oracle.GAINS["cls"] * oracle.IMAGES


def test_a_batch_with_foreground_has_all_terms():
    _, terms = single()
    assert [type(t) for t in terms] == [Bernoulli, Categorical, Quadratic]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_scale_cancels(name):
    run, terms = single()
    plain = ESTIMATORS[name]()(terms, run.params, seeded())
    scaled = ESTIMATORS[name]()(terms, run.params, seeded(), scale=2.0**16)
    for a, b in zip(plain, scaled):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_scale_keeps_small_cotangents_alive_in_half_precision():
    weight = torch.ones(3, requires_grad=True)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    wide = Bernoulli(x * weight, torch.tensor(1e-18))
    half = Bernoulli((x * weight).half(), torch.tensor(1e-18))
    (exact,) = GaussNewtonBartlett()([wide], [weight], seeded())
    (lost,) = GaussNewtonBartlett()([half], [weight], seeded())
    (kept,) = GaussNewtonBartlett()([half], [weight], seeded(), scale=2.0**24)
    assert exact.all() and not lost.any()
    torch.testing.assert_close(kept, exact, rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_sampled_in_single(dtype):
    f = torch.randn(5, 4, generator=seeded())
    for likelihood in (Bernoulli, Categorical):
        wide = likelihood(f.to(dtype).float(), torch.tensor(2.0), torch.full((5, 4), 0.25))
        term = likelihood(f.to(dtype), torch.tensor(2.0), torch.full((5, 4), 0.25))
        for cotangent, expected in (
            (term.sampled(seeded(1)), wide.sampled(seeded(1))),
            (term.observed(), wide.observed()),
        ):
            assert cotangent.dtype == torch.float32
            assert torch.equal(cotangent, expected)


def test_half_precision_forward_gives_the_estimate_of_the_single_one():
    """Mixed precision as in training: forward under autocast, estimate after it, also if autocast is on by mistake."""
    run, terms = single()
    count = 40
    single_precision = sum(
        oracle.flatten(GaussNewtonBartlett()(terms, run.params, seeded(s)), run.params) for s in range(count)
    )
    with torch.autocast("cpu", torch.bfloat16):
        run, terms = single()
        assert terms[0].output.dtype == torch.bfloat16
        inside = GaussNewtonBartlett()(terms, run.params, seeded())
    outside = GaussNewtonBartlett()(terms, run.params, seeded())
    assert all(torch.equal(a, b) for a, b in zip(inside, outside))
    half = sum(oracle.flatten(GaussNewtonBartlett()(terms, run.params, seeded(s)), run.params) for s in range(count))
    assert half.isfinite().all()
    assert float(half.sum() / single_precision.sum()) == pytest.approx(1, abs=0.2)


def test_categorical_sampling_stays_in_range_at_the_edges(monkeypatch):
    """A class of probability 0 is not drawn at u = 0; the largest u can reach the rounded sum of all."""

    def drawn(f: torch.Tensor, u: float) -> list[int]:
        monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.full((len(f), 1), u))
        return (f.softmax(-1) - Categorical(f, torch.tensor(1.0)).sampled(None)).argmax(-1).tolist()

    never = -float("inf")
    f = torch.tensor([[0.0, 0.0, never], [never, 0.0, 0.0]])
    assert drawn(f, 0.0) == [0, 1] and drawn(f, 0.75) == [1, 2]
    largest = 1 - 2**-24
    assert torch.zeros(41).softmax(-1).cumsum(-1)[-1] <= largest
    assert drawn(torch.zeros(1, 41), largest) == [40]


# The recorder -------------------------------------------------------------------------------------------------------


def test_recorder_restores_the_callables_of_the_criterion():
    model, batch = oracle.tiny_detector(), oracle.random_batch()
    criterion = model.init_criterion()
    bce, bbox_loss = criterion.bce, criterion.bbox_loss
    recorder = DetectionRecorder(criterion)

    def own() -> bool:
        return criterion.bce is bce and criterion.bbox_loss is bbox_loss

    recorder.start()
    assert not own()
    criterion(model(batch["img"]), batch)
    terms = recorder.terms()
    assert own() and len(terms) == 3

    recorder.start()
    with pytest.raises(KeyError):
        criterion(model(batch["img"]), {})  # fails before either callable
    recorder.start()  # as at the next micro-batch
    recorder.start()
    criterion(model(batch["img"]), batch)
    assert len(recorder.terms()) == 3 and own()

    def fails(*_):
        raise ValueError("out of memory")

    recorder.stop()
    bbox_loss.forward = fails
    recorder.start()
    with pytest.raises(ValueError, match="out of memory"):
        criterion(model(batch["img"]), batch)  # fails between the two
    del bbox_loss.forward
    recorder.start()
    criterion(model(batch["img"]), batch)
    assert len(recorder.terms()) == 3 and own()
    recorder.start()
    recorder.stop()
    assert own()


def test_recorder_discards_an_earlier_call():
    model, batch = oracle.tiny_detector(), oracle.random_batch()
    criterion = model.init_criterion()
    recorder = DetectionRecorder(criterion)
    recorder.start()
    criterion(model(batch["img"]), batch)
    recorder.start()
    with pytest.raises(RuntimeError, match="called its `bce` 0 times"):
        recorder.terms()


def test_recorders_are_selected_by_the_callables_of_a_criterion():
    from ultralytics.utils.loss import v8DetectionLoss

    model = oracle.tiny_detector()
    subclass = type("MyLoss", (v8DetectionLoss,), {"__module__": "elsewhere"})
    for criterion in (subclass(model), model.init_criterion()):
        assert type(recorder_for(model, criterion)) is DetectionRecorder
    for criterion in (nn.MSELoss(), None):
        assert type(recorder_for(model, criterion)) is FunctionalLossRecorder


def test_a_moved_bbox_loss_is_refused():
    criterion = oracle.tiny_detector().init_criterion()

    class Moved(nn.Module):
        def forward(self, pred_dist, pred_bboxes, anchors, target_bboxes, target_scores, target_scores_sum, fg_mask):
            """Renamed anchor_points."""

    criterion.bbox_loss = Moved()
    with pytest.raises(RuntimeError, match=r"bbox_loss\.forward takes .*'anchors'.*expected .*'anchor_points'"):
        DetectionRecorder(criterion)
    criterion = oracle.tiny_detector().init_criterion()
    del criterion.bce
    with pytest.raises(RuntimeError, match="and a callable `bce`"):
        DetectionRecorder(criterion)

"""Check, in numbers, that h is the Gauss-Newton diagonal of the YOLOv8 detection loss.

A tiny detector with Ultralytics' real head, loss and assigner runs in float64 with BatchNorm in train mode. The exact
diagonal of  G = sum_i c_i J_i^T S_i J_i  is computed here from the loss formula (utils/loss.py, v8DetectionLoss) and
full Jacobians of the head's raw outputs, and compared with the mean of many estimates of the product.

The exact side takes nothing from `yolo_sophia`; the estimated side takes its terms and its samples from
nowhere else. The formula itself is checked: the loss it gives must equal the criterion's.

    python tests/curvature_oracle.py [--samples 20000] [--seed 0]

Exits with 1 if the estimate's sum over a parameter tensor is not within 5 % of the exact one, or overall within 3 %.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel

from yolo_sophia.curvature import (
    Bernoulli,
    Categorical,
    EmpiricalFisher,
    Gaussian,
    GaussNewtonBartlett,
    Laplace,
    LossTerm,
    Quadratic,
)
from yolo_sophia.integration.criteria.detect import DetectionRecorder
from yolo_sophia.integration.criteria.model import HeadRecorder, signed_terms

SIZE, IMAGES, CLASSES, BINS = 48, 3, 3, 4
GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5}
CLASS_WEIGHTS = (0.4, 1.0, 2.5)
CASES = {
    "cls": ("cls",),
    "dfl": ("dfl",),
    "ciou": ("ciou",),
    "all": ("cls", "dfl", "ciou"),
}
TENSOR_TOLERANCE, OVERALL_TOLERANCE = 0.05, 0.03


@contextmanager
def float64() -> Iterator[None]:
    """Let Ultralytics' own `torch.zeros` and the like be float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# The model ----------------------------------------------------------------------------------------------------------


def tiny_detector(seed: int = 0, class_weights: Sequence[float] | None = None) -> DetectionModel:
    """Four Conv + BatchNorm + SiLU and a Detect head on two levels, of the default dtype, in train mode.

    The head's box branch is built again with few channels and bins: Detect's own has at least 64 channels.
    """
    conv = [-1, 1, "Conv", [8, 3, 2]]
    layout = {"nc": CLASSES, "backbone": [conv] * 4, "head": [[[2, 3], 1, "Detect", ["nc"]]]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DetectionModel(copy.deepcopy(layout), verbose=False)
        head = model.model[-1]
        head.reg_max, head.no = BINS, CLASSES + 4 * BINS
        head.cv2 = nn.ModuleList(nn.Sequential(Conv(8, 8, 3), nn.Conv2d(8, 4 * BINS, 1)) for _ in range(head.nl))
        # As if trained for a while: probabilities far from 0 and 1 also keep the sampling noise of this check small.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        for box, cls in zip(head.cv2, head.cv3):
            nn.init.normal_(box[-1].bias, std=0.5)
            nn.init.uniform_(cls[-1].bias, -1.5, 0.0)
    model.args = SimpleNamespace(**GAINS)
    if class_weights is not None:
        model.class_weights = torch.tensor(class_weights)
    return model.to(torch.get_default_dtype()).train()


def random_batch(seed: int = 0, images: int = IMAGES, boxes: int = 3, size: int = SIZE) -> dict[str, Tensor]:
    """A batch as the data loader gives it, after preprocessing; `boxes` boxes on every image."""
    g = Generator().manual_seed(seed)
    centre = 0.3 + 0.4 * torch.rand(images * boxes, 2, generator=g)
    batch = {
        "img": torch.rand(images, 3, size, size, generator=g),
        "batch_idx": torch.arange(images).repeat_interleave(boxes).to(centre.dtype),
        "cls": torch.randint(CLASSES, (images * boxes, 1), generator=g).to(centre.dtype),
        "bboxes": torch.cat([centre, 0.2 + 0.35 * torch.rand(images * boxes, 2, generator=g)], 1),
    }
    # On a grid that float32 holds in pixels too: some versions (8.3.150) keep the targets in it.
    batch["bboxes"] = (batch["bboxes"] * 2**16).round() / 2**16
    return batch


@dataclass
class Pass:
    """One forward pass and one call of the criterion, recorded by the product."""

    model: DetectionModel
    criterion: Any
    preds: Any
    loss: Tensor
    terms: dict[str, LossTerm]
    names: list[str]
    params: list[Tensor]


def forward(model: DetectionModel, batch: dict[str, Tensor]) -> Pass:
    """Run the model and its criterion once, recorded with `DetectionRecorder`."""
    criterion = model.init_criterion()
    recorder = DetectionRecorder(criterion)
    preds = model(batch["img"])
    recorder.start()
    loss = criterion(preds, batch)[0].sum()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and ".dfl." not in name]
    terms = dict(zip(("cls", "dfl", "ciou"), recorder.terms()))
    return Pass(model, criterion, preds, loss, terms, *map(list, zip(*named)))


# The exact side: formula and Jacobians, nothing of the product --------------------------------------------------------


@dataclass
class Formula:
    """The loss, term by term, from its formula.

    Attributes:
        scores: Class logits, shape (B, A, classes), in the graph.
        logits: DFL logits, shape (B, A, 4, bins), in the graph.
        centres: Anchor points in units of their stride, shape (A, 2).
        targets: Assigned boxes in the same units, shape (B, A, 4).
        target_scores: Soft class targets, shape (B, A, classes).
        c_cls: Coefficient of each class score, shape (classes,).
        c_dfl: Coefficient of each side's cross-entropy, shape (B, A); 0 in the background.
        c_box: Coefficient of 1 - CIoU, shape (B, A); 0 in the background.
    """

    scores: Tensor
    logits: Tensor
    centres: Tensor
    targets: Tensor
    target_scores: Tensor
    c_cls: Tensor
    c_dfl: Tensor
    c_box: Tensor

    def boxes(self) -> Tensor:
        """Predicted boxes, xyxy in units of the stride, shape (B, A, 4)."""
        return decode(self.logits, self.centres)

    def value(self) -> Tensor:
        """The loss; must equal the criterion's."""
        bce = F.softplus(self.scores) - self.target_scores * self.scores
        loss = (self.c_cls * bce).sum()
        for b, a in self.c_box.nonzero().tolist():
            sides = torch.cat([self.centres[a] - self.targets[b, a, :2], self.targets[b, a, 2:] - self.centres[a]])
            logp = self.logits[b, a].log_softmax(-1)
            for side, t in enumerate(sides.clamp(0, BINS - 1 - 0.01).tolist()):
                low = int(t)
                nll = -(low + 1 - t) * logp[side, low] - (t - low) * logp[side, low + 1]
                loss = loss + self.c_dfl[b, a] * nll
            box = decode(self.logits[b, a], self.centres[a])
            loss = loss + self.c_box[b, a] * (1 - ciou(box, self.targets[b, a]))
        return loss


def decode(logits: Tensor, centres: Tensor) -> Tensor:
    """Expected distances to the four sides, then the box: (..., 4, bins) -> (..., 4)."""
    distance = (logits.softmax(-1) * torch.arange(logits.shape[-1], dtype=logits.dtype)).sum(-1)
    return torch.cat([centres - distance[..., :2], centres + distance[..., 2:]], -1)


def ciou(box: Tensor, target: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU of two boxes, shape (4,); its factor alpha is a constant, as in the gradient of the loss."""
    width, height = box[2] - box[0], box[3] - box[1] + eps
    target_width, target_height = target[2] - target[0], target[3] - target[1] + eps
    inner = torch.minimum(box[2:], target[2:]) - torch.maximum(box[:2], target[:2])
    inter = inner.clamp(min=0).prod()
    iou = inter / (width * height + target_width * target_height - inter + eps)
    outer = torch.maximum(box[2:], target[2:]) - torch.minimum(box[:2], target[:2])
    distance = ((target[:2] + target[2:] - box[:2] - box[2:]) / 2).square().sum()
    v = 4 / math.pi**2 * (torch.atan(target_width / target_height) - torch.atan(width / height)) ** 2
    alpha = (v / (1 - iou + v + eps)).detach()
    return iou - distance / (outer.square().sum() + eps) - alpha * v


def formula(run: Pass, batch: dict[str, Tensor]) -> Formula:
    """Read the raw outputs and assign targets; only the assigner itself is the criterion's."""
    model, (images, _, size, _) = run.model, batch["img"].shape
    if isinstance(run.preds, dict):  # Ultralytics 8.4: boxes and scores apart; before: a list of feature maps
        raw = torch.cat([run.preds["boxes"], run.preds["scores"]], 1)
    else:
        raw = torch.cat([x.flatten(2) for x in run.preds], 2)
    raw = raw.transpose(1, 2)
    logits, scores = raw[..., : 4 * BINS].unflatten(-1, (4, BINS)), raw[..., 4 * BINS :]
    centres, strides = [], []
    for stride in model.stride.tolist():
        side = torch.arange(size / stride) + 0.5
        y, x = torch.meshgrid(side, side, indexing="ij")
        centres.append(torch.stack([x, y], -1).reshape(-1, 2))
        strides.append(torch.full((len(side) ** 2, 1), float(stride)))
    centres, strides = torch.cat(centres), torch.cat(strides)
    per_image = [(batch["batch_idx"] == i).nonzero().flatten() for i in range(images)]
    labels = scores.new_zeros(images, max(map(len, per_image)), 5)
    for i, rows in enumerate(per_image):
        xywh = batch["bboxes"][rows] * size
        corners = torch.cat([xywh[:, :2] - xywh[:, 2:] / 2, xywh[:, :2] + xywh[:, 2:] / 2], 1)
        labels[i, : len(rows)] = torch.cat([batch["cls"][rows], corners], 1)
    with torch.no_grad():
        _, targets, target_scores, foreground, _ = run.criterion.assigner(
            scores.sigmoid(),
            decode(logits, centres) * strides,
            centres * strides,
            labels[..., :1],
            labels[..., 1:],
            (labels[..., 1:].sum(-1, keepdim=True) > 0).to(labels.dtype),
        )
        per_score = images / target_scores.sum().clamp(min=1)  # B / TSS
        weight = target_scores.sum(-1) * foreground  # w_i
        class_weights = torch.ones(CLASSES)
        if getattr(run.criterion, "class_weights", None) is not None:  # Ultralytics 8.3 has none
            class_weights = torch.tensor(CLASS_WEIGHTS)
    return Formula(
        scores,
        logits,
        centres,
        targets / strides,
        target_scores,
        GAINS["cls"] * per_score * class_weights,
        GAINS["dfl"] * per_score * weight / 4,
        GAINS["box"] * per_score * weight,
    )


def jacobian(output: Tensor, params: Sequence[Tensor], chunk: int = 512) -> Tensor:
    """Full Jacobian of an output, shape (output.numel(), parameters), row by row."""
    rows = []
    for indices in torch.arange(output.numel()).split(chunk):
        cotangents = F.one_hot(indices, output.numel()).to(output.dtype).reshape(-1, *output.shape)
        grads = torch.autograd.grad(
            output, params, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        flat = [p.new_zeros(len(indices), p.numel()) if g is None else g.flatten(1) for g, p in zip(grads, params)]
        rows.append(torch.cat(flat, 1))
    return torch.cat(rows)


def box_curvature(box: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient and Hessian of 1 - CIoU, and the Hessian's projection onto the positive semi-definite matrices."""
    gradient = torch.func.grad(lambda x: 1 - ciou(x, target))(box.detach())
    hessian = torch.func.hessian(lambda x: 1 - ciou(x, target))(box.detach())
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    return gradient, hessian, sum(max(value, 0.0) * torch.outer(v, v) for value, v in zip(values.tolist(), vectors.mT))


def exact_diagonals(run: Pass, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Diagonal of the Gauss-Newton matrix per term of the loss, flat over `run.params`.

    "sign" is no term: it is what stands for "ciou" if an anchor's curvature is the outer product of its gradient.
    """
    f = formula(run, batch)
    assert torch.allclose(f.value(), run.loss, rtol=1e-9), (f.value(), run.loss)
    p = f.scores.detach().sigmoid()
    cls = (jacobian(f.scores, run.params).square() * (f.c_cls * p * (1 - p)).reshape(-1, 1)).sum(0)
    dfl, box, sign = torch.zeros_like(cls), torch.zeros_like(cls), torch.zeros_like(cls)
    foreground = f.logits[f.c_box > 0]
    j_foreground = jacobian(foreground, run.params).unflatten(0, foreground.shape)
    for (b, a), j in zip(f.c_box.nonzero().tolist(), j_foreground):  # j: (4, bins, parameters)
        logits = f.logits[b, a].detach()
        q = logits.softmax(-1)
        for side in range(4):
            s = q[side].diag() - torch.outer(q[side], q[side])
            dfl += f.c_dfl[b, a] * torch.einsum("kp,kl,lp->p", j[side], s, j[side])
        j_box = torch.func.jacrev(decode)(logits, f.centres[a]).flatten(1) @ j.flatten(0, 1)  # (4, parameters)
        gradient, _, psd = box_curvature(decode(logits, f.centres[a]), f.targets[b, a])
        box += f.c_box[b, a] * torch.einsum("kp,kl,lp->p", j_box, psd, j_box)
        sign += f.c_box[b, a] * (gradient @ j_box).square()
    return {"cls": cls, "dfl": dfl, "ciou": box, "sign": sign}


# The estimated side: the product's terms, samples and estimators ------------------------------------------------------


def draw(term: LossTerm, count: int, generator: Generator) -> Tensor:
    """`count` cotangents of the term's own `sampled`, shape (count, *output.shape)."""
    expanded = {"output": term.output.detach().expand(count, *term.output.shape)}
    if isinstance(term, Quadratic):
        expanded["root"] = term.root.expand(count, *term.root.shape)
    return replace(term, **expanded).sampled(generator)


def mean_estimate(terms: Sequence[LossTerm], params: Sequence[Tensor], samples: int, seed: int = 0) -> Tensor:
    """Mean of `samples` squared pull-backs through the one graph, flat over the parameters.

    A pull-back is linear, so the mean of the squares depends on the cotangents through mean(cot cot^T) alone. That
    matrix is taken over all samples; then as many vectors are pulled back as it has columns, not as there are samples.
    """
    generator = Generator().manual_seed(seed)
    moment, chunk = 0.0, 1000
    active = torch.cat([draw(term, 20, generator).flatten(1).any(0) for term in terms])  # not the background's sides
    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        cot = torch.cat([draw(term, count, generator).flatten(1) for term in terms], 1)
        assert not cot[:, ~active].any(), "an output was 0 in 20 samples by chance"
        moment = moment + cot[:, active].T @ cot[:, active] / samples
    values, vectors = torch.linalg.eigh(moment)
    roots = values.new_zeros(len(values), len(active))
    roots[:, active] = (vectors * values.clamp(min=0).sqrt()).T
    return sum_of_squared_pullbacks(terms, params, roots)


def expected_estimate(terms: Sequence[LossTerm], params: Sequence[Tensor]) -> Tensor:
    """Expectation of the estimate, all labels enumerated (`second_moment`), flat over the parameters."""
    widths, rows = [term.output.numel() for term in terms], []
    for i, term in enumerate(terms):
        moment = second_moment(term)
        if isinstance(term, Bernoulli):
            moment = moment[..., None, None]
        values, vectors = torch.linalg.eigh(moment.flatten(0, -3))  # blocks of outputs that are drawn together
        roots = (vectors * values.clamp(min=0).sqrt()[:, None, :]).mT
        blocks, size = roots.shape[:2]
        full = roots.new_zeros(blocks, size, blocks, size)
        full[torch.arange(blocks), :, torch.arange(blocks)] = roots
        full = F.pad(full.reshape(blocks * size, -1), (sum(widths[:i]), sum(widths[i + 1 :])))
        rows.append(full[full.any(1)])
    return sum_of_squared_pullbacks(terms, params, torch.cat(rows))


def sum_of_squared_pullbacks(
    terms: Sequence[LossTerm], params: Sequence[Tensor], cotangents: Tensor, chunk: int = 250
) -> Tensor:
    """Square and add up the pull-backs of cotangents, shape (n, outputs of all terms), flat over the parameters."""
    outputs, total = [term.output for term in terms], 0.0
    for rows in cotangents.split(chunk):
        parts = rows.split([o.numel() for o in outputs], 1)
        grads = torch.autograd.grad(
            outputs,
            params,
            [part.reshape(-1, *o.shape) for part, o in zip(parts, outputs)],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        squares = [p.new_zeros(p.numel()) if g is None else g.square().sum(0).flatten() for g, p in zip(grads, params)]
        total = total + torch.cat(squares)
    return total


def flatten(estimates: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """One flat vector from an estimator's answer."""
    return torch.cat([p.new_zeros(p.numel()) if e is None else e.flatten() for e, p in zip(estimates, params)])


def estimator_difference(terms: Sequence[LossTerm], params: Sequence[Tensor], samples: int = 20) -> float:
    """Largest relative difference of `GaussNewtonBartlett` to the squared pull-backs of the same samples, summed."""
    found, cotangents = 0.0, []
    for seed in range(samples):
        found = found + flatten(GaussNewtonBartlett()(terms, params, Generator().manual_seed(seed)), params)
        generator = Generator().manual_seed(seed)
        cotangents.append(torch.cat([term.sampled(generator).flatten() for term in terms]))
    expected = sum_of_squared_pullbacks(terms, params, torch.stack(cotangents))
    return float((found - expected).abs().max() / expected.max())


def second_moment(term: LossTerm) -> Tensor:
    """E over the labels of cot cot^T, without noise: all outcomes of the term's `sampled`, each with its probability.

    Returns:
        For likelihoods of single outputs the variances, of the output's shape; otherwise matrices, shape (..., d, d).
    """
    f = term.output.detach()
    if isinstance(term, Bernoulli):
        p = f.sigmoid()
        moment = 0.0
        for y, probability in ((0.0, 1 - p), (1.0, p)):
            with mock.patch("torch.bernoulli", lambda x, generator=None, y=y: torch.full_like(x, y)):
                moment = moment + probability * term.sampled(None).square()
        return moment
    if isinstance(term, (Gaussian, Laplace)):  # noise of variance 1, whose square one outcome shows
        ones = {name: lambda *args, **_: torch.ones(args[-1]) for name in ("randn", "randint")}
        with mock.patch.multiple("torch", **ones):
            return term.sampled(None).square()
    if isinstance(term, Categorical):
        p = f.softmax(-1)
        edges = p.cumsum(-1)
        moment = 0.0
        for k in range(p.shape[-1]):
            u = edges[..., k : k + 1] - p[..., k : k + 1] / 2  # the middle of the k-th interval
            with mock.patch("torch.rand", lambda *_, u=u, **__: u):
                cot = term.sampled(None)
            moment = moment + p[..., k, None, None] * cot[..., :, None] * cot[..., None, :]
        return moment
    moment = 0.0
    for k in range(term.root.shape[-1]):  # a unit normal: its second moment is the sum over unit vectors
        unit = torch.zeros(*term.root.shape[:-2], term.root.shape[-1], 1)
        unit[..., k, 0] = 1.0
        with mock.patch("torch.randn", lambda *_, unit=unit, **__: unit):
            cot = term.sampled(None)
        moment = moment + cot[..., :, None] * cot[..., None, :]
    return moment


def exact_moments(f: Formula) -> dict[str, Tensor]:
    """C S per term, from the formula, in the form of `second_moment`: of boxes, the foreground's in order."""
    foreground = f.c_box > 0
    p, q = f.scores.detach().sigmoid(), f.logits.detach()[foreground].softmax(-1)
    dfl = f.c_dfl[foreground][:, None, None, None] * (torch.diag_embed(q) - q[..., :, None] * q[..., None, :])
    boxes = f.boxes().detach()
    box = [f.c_box[b, a] * box_curvature(boxes[b, a], f.targets[b, a])[2] for b, a in foreground.nonzero().tolist()]
    return {"cls": f.c_cls * p * (1 - p), "dfl": dfl, "ciou": torch.stack(box)}


# Figures --------------------------------------------------------------------------------------------------------------


def tensor_ratios(found: Tensor, exact: Tensor, run: Pass) -> dict[str, float]:
    """Ratio of sums per parameter tensor, by name; tensors that are 0 on both sides are left out."""
    sizes = [p.numel() for p in run.params]
    sums = {n: (float(a.sum()), float(b.sum())) for n, a, b in zip(run.names, found.split(sizes), exact.split(sizes))}
    return {name: a / b if b else math.inf for name, (a, b) in sums.items() if a or b}


def correlations(found: Tensor, exact: Tensor, run: Pass) -> list[float]:
    """Correlation with the exact diagonal within each parameter tensor."""
    sizes = [p.numel() for p in run.params]
    return [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(found.split(sizes), exact.split(sizes))]


def random_boxes(count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Overlapping pairs of a predicted and a target box, some units of the stride wide."""
    g = Generator().manual_seed(seed)
    for _ in range(count):
        target = torch.cat([-0.5 - 2 * torch.rand(2, generator=g), 0.5 + 2 * torch.rand(2, generator=g)])
        yield target + 0.5 * torch.randn(4, generator=g).clamp(-0.9, 0.9), target


def check_case(name: str, run: Pass, exact: dict[str, Tensor], samples: int, seed: int) -> bool:
    """Compare one choice of terms, print a line, and say whether it is within the tolerances."""
    expected = sum(exact[t] for t in CASES[name])
    found = mean_estimate([run.terms[t] for t in CASES[name]], run.params, samples, seed)
    ratios = tensor_ratios(found, expected, run)
    overall = float(found.sum() / expected.sum())
    low, high = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
    passed = abs(overall - 1) <= OVERALL_TOLERANCE and all(abs(r - 1) <= TENSOR_TOLERANCE for r in ratios.values())
    print(
        f"  {name:<10} overall {overall:.4f}   {len(ratios):>2} tensors: least {ratios[low]:.4f} ({low}), "
        f"greatest {ratios[high]:.4f} ({high})   {'ok' if passed else 'FAILED'}"
    )
    return passed


def mean_of_the_unknown(run: Pass, batch: dict[str, Tensor], samples: int = 500) -> Tensor:
    """Mean of estimates as if the criterion were not known, flat over the parameters."""
    run.model.criterion = run.criterion
    recorder = HeadRecorder(run.model)
    recorder.start()
    run.model(batch)
    terms, generator = signed_terms(*recorder.outputs()), Generator().manual_seed(0)
    estimates = (GaussNewtonBartlett()(terms, run.params, generator) for _ in range(samples))
    return sum(flatten(estimate, run.params) for estimate in estimates) / samples


def report_others(run: Pass, batch: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Print how far squared true-label gradients are from the diagonal."""
    total = sum(exact[t] for t in run.terms)
    grads = torch.autograd.grad(run.loss, run.params, retain_graph=True)
    terms = list(run.terms.values())
    print("True labels are no Gauss-Newton diagonal (all terms, against the exact one):")
    for name, found in (
        ("grad ** 2 of the loss", flatten(grads, run.params).square()),
        ("EmpiricalFisher", flatten(EmpiricalFisher()(terms, run.params, None), run.params)),
        ("unknown loss (signed)", mean_of_the_unknown(run, batch)),
    ):
        ratios, c = tensor_ratios(found, total, run), sorted(correlations(found, total, run))
        print(
            f"  {name:<22} overall {float(found.sum() / total.sum()):.3g}, per tensor {min(ratios.values()):.2g} to "
            f"{max(ratios.values()):.2g}; correlation within tensors {c[0]:.2f} to {c[-1]:.2f}, "
            f"median {c[len(c) // 2]:.2f}"
        )


def report_ciou(run: Pass, exact: dict[str, Tensor], seed: int) -> None:
    """Print CIoU's share of the trace, and how far a gradient outer product per anchor is from its curvature."""
    boxes = torch.cat([torch.full((p.numel(),), "cv2" in n) for n, p in zip(run.names, run.params)])
    for place, where in (("all parameters", slice(None)), ("box branch of the head", boxes)):
        sums = {t: float(exact[t][where].sum()) for t in run.terms}
        shares = ", ".join(f"{t} {x / sum(sums.values()):.1%}" for t, x in sums.items())
        sign = float(exact["sign"][where].sum()) / sums["ciou"]
        print(f"Trace, {place}: {shares}; gradient outer products in place of CIoU's curvature: {sign:.2f} of it")
    ratios, kept, dropped = [], 0.0, 0.0
    for box, target in random_boxes(200, seed):
        gradient, hessian, psd = box_curvature(box, target)
        ratios.append(float(gradient.square().sum() / psd.trace()))
        kept, dropped = kept + float(psd.trace()), dropped + float((psd - hessian).trace())
    ratios.sort()
    print(
        f"CIoU on 200 random pairs: |gradient|^2 over the trace of the projected Hessian: median {ratios[100]:.2f}, "
        f"10-90 % {ratios[20]:.2f} to {ratios[180]:.2f}; negative over positive part of the Hessians: "
        f"{dropped / kept:.2f}"
    )


def main() -> int:
    """Print all comparisons; 0 if every one is within its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000, help="estimates averaged per case (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, passed = time.perf_counter(), True
    with float64():
        for weights in (None, CLASS_WEIGHTS):
            batch = random_batch(options.seed)
            run = forward(tiny_detector(options.seed, weights), batch)
            exact = exact_diagonals(run, batch)
            f = formula(run, batch)
            parameters = sum(p.numel() for p in run.params)
            print(
                f"class weights {weights}: {parameters} parameters in {len(run.params)} tensors, "
                f"{f.scores.shape[1]} anchors x {IMAGES} images, {int((f.c_box > 0).sum())} foreground; "
                f"loss {float(run.loss.detach()):.6f}, by the formula {float(f.value().detach()):.6f}"
            )
            moments = exact_moments(f)
            for name, term in run.terms.items():
                error = float((second_moment(term) - moments[name]).abs().max() / moments[name].abs().max())
                passed &= error < 1e-9
                print(f"  {name:<10} E[cot cot^T] against c S, all labels enumerated: largest difference {error:.1e}")
            expected = expected_estimate(list(run.terms.values()), run.params)
            total = sum(exact[t] for t in run.terms)
            error = float(((expected - total).abs() / total).nan_to_num(0).max())
            passed &= error < 1e-6
            print(f"  E[estimate] against the exact diagonal: largest relative difference of an entry {error:.1e}")
            difference = estimator_difference(list(run.terms.values()), run.params)
            passed &= difference < 1e-9
            print(f"  GaussNewtonBartlett against its samples, pulled back and squared: difference {difference:.1e}")
            for name in CASES:
                passed &= check_case(name, run, exact, options.samples, options.seed)
        report_others(run, batch, exact)
        report_ciou(run, exact, options.seed)
    print(
        f"{'passed' if passed else 'FAILED'}, {options.samples} samples per case, {time.perf_counter() - start:.0f} s"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

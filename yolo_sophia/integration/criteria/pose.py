"""v8PoseLoss: the detection loss and the keypoints, with B images, N foreground anchors and K keypoints.

    visibility  sum  (kobj B / (N K)) BCE                                             -> Bernoulli
    position    sum  (pose B / (N K)) (K / visible_i) visible_ik (1 - exp(-e_ik))     -> Quadratic, 2 x 2 per keypoint
    RLE         (rle B / visible) times the criterion's own row losses (YOLO26)       -> Quadratic
Residual log-likelihood (arXiv 2107.11291) is a density without its normaliser, which nothing can be sampled from: the
outer product of each visible keypoint's gradient stands for it. It is taken at the flow's log-density, so that the
parameters of the flow have a curvature too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yolo_sophia.curvature import Bernoulli, LossTerm, Quadratic
from yolo_sophia.integration.criteria.detect import DetectionRecorder
from yolo_sophia.integration.criteria.psd_hessian import quadratic, wide
from yolo_sophia.integration.criteria.recorder import Call


class PoseRecorder(DetectionRecorder):
    """Records a `v8PoseLoss`."""

    recorded_callables = (*DetectionRecorder.recorded_callables, "keypoint_loss", "bce_pose", "rle_loss")

    @torch.no_grad()
    def _read(self, calls: dict[str, list[Call]], weight: float) -> list[LossTerm]:
        terms = super()._read(calls, weight)
        images = weight * terms[0].output.shape[0]
        terms += [self._positions(call, images) for call in calls.get("keypoint_loss", [])]
        for call in calls.get("bce_pose", []):
            logits, visible = call.args
            coefficient = images * self.criterion.hyp.kobj / logits.numel()
            terms.append(Bernoulli(logits, logits.new_tensor(coefficient, dtype=wide(logits)), visible))
        terms += [self._residuals(call, images) for call in calls.get("rle_loss", [])]
        # Without a visible keypoint there is no residual, and the flow has no curvature.
        self.complete &= getattr(self.criterion, "rle_loss", None) is None or bool(calls.get("rle_loss"))
        return terms

    def _positions(self, call: Call, images: float) -> Quadratic:
        points, targets, visible, area = call.args
        with torch.enable_grad():
            output = points[..., :2].reshape(-1, 2)

        def loss(rows: Tensor) -> Tensor:  # the criterion takes the mean over anchors and keypoints
            return self.criterion.keypoint_loss(rows.view(*points.shape[:2], 2), targets, visible, area) * len(rows)

        coefficient = images * self.criterion.hyp.pose / len(output)
        return quadratic(output, output.new_full((len(output),), coefficient, dtype=wide(output)), loss)

    def _residuals(self, call: Call, images: float) -> Quadratic:
        sigma, log_phi, error, target_weight = call.args
        with torch.enable_grad():
            output = torch.cat([sigma, log_phi[:, None], error], 1)
            rows = output.detach().requires_grad_()
            s, phi, e = rows.split([sigma.shape[1], 1, error.shape[1]], 1)
            # The mean over the keypoints, so n times it is the sum of their losses.
            loss = self.criterion.rle_loss(s, phi.squeeze(1), e, target_weight) * len(rows)
        (gradient,) = torch.autograd.grad(loss, rows)
        coefficient = gradient.new_tensor(images * self.criterion.hyp.rle / len(rows))
        gradient = gradient * coefficient.sqrt()
        # The criterion clamps the loss at 0: there it has no gradient, but still a curvature.
        return Quadratic(output, gradient[..., None], gradient, coefficient * (call.result > 0))

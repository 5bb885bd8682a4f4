"""Sophia by the Agora release's constructor: model, data and estimator in one call.

Its README is the interface; the behaviour is the paper's (arXiv 2305.14342, algorithm 3): both estimators work for any
shape of parameter, labels are sampled, momentum and decay are applied once, the denominator is max(h, eps), and neither
estimator needs `create_graph` from the user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from yolo_sophia.curvature import GaussNewtonBartlett, Hutchinson, OnBatches, likelihood_of
from yolo_sophia.optim.decoupled import DecoupledSophia

ESTIMATORS = ("Hutchinson", "Gauss-Newton-Bartlett")


class Sophia(DecoupledSophia):
    """Sophia that estimates the curvature of a model on data of its own.

        optimizer = Sophia(model, batches, model.parameters(), lr=1e-3, loss_function=nn.CrossEntropyLoss())

    Args:
        model: The model. It is run in the mode (train or eval) that it is in; its buffers stay as they are.
        input_data: Batches for the estimates, one per refresh and again from the first after the last: an iterable of
            inputs, or of pairs (inputs, targets). None where each loss comes from `step(closure)`.
        params: Parameters of the model, or parameter groups of them.
        lr: Learning rate, >= 0.
        betas: Decay of the momentum m per step and of the curvature h per refresh, each in [0, 1).
        eps: Smallest value of the denominator, > 0.
        weight_decay: Decoupled weight decay, >= 0; a step multiplies the parameters by 1 - lr * weight_decay.
        k: Steps per refresh, >= 1; the first step makes one.
        estimator: "Hutchinson": the Hessian's diagonal, of `loss_function` on `input_data` with targets, or of the loss
            that the closure of `step` returns. "Gauss-Newton-Bartlett": labels sampled from the model; needs
            `loss_function` and `input_data`, and targets only where the loss weights or ignores by them.
        rho: Bound of the clip, > 0; a coordinate moves by at most lr * rho in a step (before weight decay).
        loss_function: From the model's output and the targets to a scalar loss. For Gauss-Newton-Bartlett one of
            which the likelihood is known: see `curvature.likelihood_of`.
        probes: Hessian-vector products per Hutchinson estimate, >= 1.
        settings: `seed`, `bias_correction`, `hessian_average`, `cautious`, `foreach`, `fused`, `hessian_dtype`,
            `momentum_dtype` of `DecoupledSophia`.

    Raises:
        TypeError: No likelihood is known for the loss function, or the data is not iterable.
        ValueError: The estimator is unknown or lacks what it needs, or a hyperparameter is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        input_data: Iterable[Any] | None,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        k: int = 10,
        estimator: str = "Hutchinson",
        rho: float = 1.0,
        *,
        loss_function: Callable[[Any, Any], Any] | None = None,
        probes: int = 1,
        **settings: Any,
    ):
        if estimator not in ESTIMATORS:
            raise ValueError(f"Invalid estimator: found {estimator!r}, expected one of {list(ESTIMATORS)}.")
        source: Any = Hutchinson(probes) if estimator == "Hutchinson" else GaussNewtonBartlett()
        if input_data is not None and loss_function is not None:
            score = loss_function if estimator == "Hutchinson" else likelihood_of(loss_function)
            source = OnBatches(source, model, input_data, score)
        elif estimator != "Hutchinson":
            missing = "loss_function" if loss_function is None else "input_data"
            raise ValueError(
                f"estimator={estimator!r} needs {missing}: labels are sampled from the likelihood of the loss, at the "
                "model's outputs for the data. Pass loss_function=nn.CrossEntropyLoss(), for instance."
            )
        super().__init__(params, source, lr, betas, eps, weight_decay, k, rho, **settings)

    @property
    def needs_loss(self) -> bool:
        """Whether the estimate may be made of the closure's loss: Hutchinson's, where there are no targets."""
        return isinstance(getattr(self.hessian_estimator, "estimator", self.hessian_estimator), Hutchinson)

    def _estimates(self, params: Sequence[Tensor], loss: Tensor | None) -> Iterable[Tensor | None]:
        source = self.hessian_estimator
        if isinstance(source, OnBatches):
            inputs, targets = source.batches.take(self.param_groups[0]["refreshes"])
            if targets is not None or not self.needs_loss:
                return source.on((inputs, targets), params)
            source = source.estimator
        if not isinstance(loss, Tensor):
            raise RuntimeError(
                "Sophia with estimator='Hutchinson' needs a loss to refresh h, and found none: pass loss_function and "
                "input_data as pairs (inputs, targets), or call step(closure) with a closure that returns the loss."
            )
        return source(loss, params, None)

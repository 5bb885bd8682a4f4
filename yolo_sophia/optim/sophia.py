"""The interface of the Agora release: Sophia, with model, data and estimator in one call, and DecoupledSophia.

    theta <- theta - lr clip(m / max(h, eps), rho)

Here rho is the bound of the clip, as in that release; everywhere else in this package rho multiplies h. But for the
weight decay, (lr, rho, eps) here moves as (lr rho, rho, eps rho) does there. The names are those of its README, the
behaviour is the paper's (arXiv 2305.14342, algorithm 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from yolo_sophia.curvature import GaussNewtonBartlett, Hutchinson, OnBatches, likelihood_of
from yolo_sophia.optim._base import shares_docs
from yolo_sophia.optim._compat import renamed
from yolo_sophia.optim._self_estimating import SelfEstimatingSophia

ESTIMATORS = ("Hutchinson", "Gauss-Newton-Bartlett")

HessianEstimator = Callable[[Sequence[Tensor]], Iterable[Tensor | None]]
"""Called with the trainable parameters, gradients enabled; gives one tensor of its shape, or None, for each. Global
random states are seeded for the call and given back after it."""


@shares_docs
class DecoupledSophia(SelfEstimatingSophia):
    """Sophia with a curvature estimator of your own.

    Args:
        {params}
        hessian_estimator: Called every k-th step with the list of trainable parameters; returns one tensor of the
            parameter's shape at the scale of the objective, or None (h stays), for each. `curvature.OnBatches` makes
            such functions of this package's estimators.
        lr: Learning rate, >= 0.
        {betas}
        eps: Smallest value of the denominator, > 0: where h is smaller, zero or negative, the step is of full size.
        {weight_decay}
        k: Steps per Hessian update, >= 1; the first step makes one.
        rho: Bound of the clip, > 0; a coordinate moves by at most lr * rho in a step (before weight decay).
        {seed}
        {options}
        {cautious}
        deprecated: Names of version 0.1.

    {state}

    Under DistributedDataParallel the estimator is called on every rank, for the rank's own loss (a mean, as in the
    training), and h_hat is the mean over the ranks: (1 / W) sum_r h_hat_r.

    Raises:
        TypeError: The estimator is not callable.
        ValueError: A hyperparameter is out of range, or a parameter is complex.
    """

    scales_hessian = False
    interval_name = "k"
    how_to_update = "The estimator gave no estimate, or k is None: call refresh() or update_hessian()."

    def __init__(
        self,
        params,
        hessian_estimator: HessianEstimator,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        k: int = 10,
        rho: float = 1.0,
        *,
        seed: int = 0,
        bias_correction: bool = False,
        hessian_average: str | None = None,
        cautious: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **deprecated: Any,
    ):
        if not callable(hessian_estimator):
            raise TypeError(
                f"Invalid hessian_estimator: found {type(hessian_estimator).__name__}, expected a function from the "
                "list of parameters to one estimate for each."
            )
        self.hessian_estimator = hessian_estimator
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rho": rho,
            "foreach": foreach,
            "fused": fused,
            "bias_correction": bias_correction,
            "hessian_average": hessian_average,
            "cautious": cautious,
        }
        super().__init__(params, defaults, hessian_interval=k, seed=seed, deprecated=deprecated)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep the estimator; a state dict does not hold it."""
        return {**super().__getstate__(), "hessian_estimator": self.hessian_estimator}

    def _estimates(self, params: Sequence[Tensor], loss: Tensor | None) -> Iterable[Tensor | None]:
        return self.hessian_estimator(params)

    def _scale_and_bound(self, group: dict[str, Any]) -> tuple[float, float]:
        return 1.0, group["rho"]


@shares_docs
class Sophia(DecoupledSophia):
    """Sophia that estimates the curvature of a model on data of its own.

        optimizer = Sophia(model, batches, model.parameters(), lr=1e-3, loss_function=nn.CrossEntropyLoss())

    Args:
        model: The model. It is run in the mode (train or eval) that it is in; its buffers stay as they are.
        input_data: Batches for the estimates, one per Hessian update, from the first again after the last: an iterable
            of inputs, or of pairs (inputs, targets). None where each loss comes from `step(closure)`.
        params: Parameters of the model, or parameter groups of them.
        lr: Learning rate, >= 0.
        {betas}
        eps: Smallest value of the denominator, > 0.
        {weight_decay}
        k: Steps per Hessian update, >= 1; the first step makes one.
        estimator: "Hutchinson": the Hessian's diagonal, of `loss_function` on `input_data` with targets, or of the loss
            that the closure of `step` returns. "Gauss-Newton-Bartlett": labels sampled from the model; needs
            `loss_function` and `input_data`, and targets only where the loss weights or ignores by them.
        rho: Bound of the clip, > 0; a coordinate moves by at most lr * rho in a step (before weight decay).
        loss_function: From the model's output and the targets to a scalar loss. For Gauss-Newton-Bartlett one of
            which the likelihood is known: see `curvature.likelihood_of`.
        n_samples: Hessian-vector products per Hutchinson estimate, >= 1.
        settings: `seed`, `bias_correction`, `hessian_average`, `cautious`, `foreach`, `fused` of `DecoupledSophia`.

    Several processes estimate as with `DecoupledSophia`: each rank on its own `input_data`.

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
        n_samples: int = 1,
        **settings: Any,
    ):
        if "probes" in settings:
            n_samples = renamed({"n_samples": n_samples}, {"probes": settings.pop("probes")}, "Sophia")["n_samples"]
        if estimator not in ESTIMATORS:
            raise ValueError(f"Invalid estimator: found {estimator!r}, expected one of {list(ESTIMATORS)}.")
        source: Any = Hutchinson(n_samples) if estimator == "Hutchinson" else GaussNewtonBartlett()
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
            inputs, targets = source.batches.take(self.schedule["refresh_index"])
            if targets is not None or not self.needs_loss:
                return source.on((inputs, targets), params)
            source = source.estimator
        if not isinstance(loss, Tensor):
            raise RuntimeError(
                "Sophia with estimator='Hutchinson' needs a loss to update h, and found none: pass loss_function and "
                "input_data as pairs (inputs, targets), or call step(closure) with a closure that returns the loss."
            )
        return source(loss, params, None)

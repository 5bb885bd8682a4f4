"""Diagonal curvature estimators and the likelihoods they sample from; PyTorch only."""

from yolo_sophia.curvature.batches import OnBatches
from yolo_sophia.curvature.estimators import (
    ESTIMATORS,
    EmpiricalFisher,
    Estimator,
    GaussNewtonBartlett,
    RandomSigns,
)
from yolo_sophia.curvature.hutchinson import Hutchinson
from yolo_sophia.curvature.likelihoods import Bernoulli, Categorical, Gaussian, Laplace, LossTerm, Quadratic
from yolo_sophia.curvature.losses import likelihood_of
from yolo_sophia.curvature.signs import SignRandomised, sign_randomised

__all__ = [
    "ESTIMATORS",
    "Bernoulli",
    "Categorical",
    "EmpiricalFisher",
    "Estimator",
    "GaussNewtonBartlett",
    "Gaussian",
    "Hutchinson",
    "Laplace",
    "LossTerm",
    "OnBatches",
    "Quadratic",
    "RandomSigns",
    "SignRandomised",
    "likelihood_of",
    "sign_randomised",
]

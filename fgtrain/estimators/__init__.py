"""Gradient estimators, one method per file. They do not depend on Lightning, Hydra or process groups."""

from fgtrain.estimators.activity import ActivityPerturbation
from fgtrain.estimators.backprop import Backprop
from fgtrain.estimators.base import Estimate, GradientEstimator
from fgtrain.estimators.checkpointed import CheckpointedBackprop
from fgtrain.estimators.fdfa import FDFA
from fgtrain.estimators.forward_exact import ForwardExact
from fgtrain.estimators.forward_gradient import ForwardGradient
from fgtrain.estimators.forward_in_time import ForwardInTime
from fgtrain.estimators.gauss_newton import GaussNewton
from fgtrain.estimators.gradients import write_grads
from fgtrain.estimators.highway import Highway
from fgtrain.estimators.local import LocalLosses
from fgtrain.estimators.local_guess import LocalGuess
from fgtrain.estimators.mezo import MeZO
from fgtrain.estimators.second_order import SecondOrder
from fgtrain.estimators.spsa import SPSA

__all__ = [
    "FDFA",
    "SPSA",
    "ActivityPerturbation",
    "Backprop",
    "CheckpointedBackprop",
    "Estimate",
    "ForwardExact",
    "ForwardGradient",
    "ForwardInTime",
    "GaussNewton",
    "GradientEstimator",
    "Highway",
    "LocalGuess",
    "LocalLosses",
    "MeZO",
    "SecondOrder",
    "write_grads",
]

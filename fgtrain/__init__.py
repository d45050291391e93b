"""fgtrain: train neural networks with backpropagation or forward gradients, swapped by one word."""

from fgtrain import tasks
from fgtrain.estimators import (
    FDFA,
    SPSA,
    ActivityPerturbation,
    Backprop,
    CheckpointedBackprop,
    Estimate,
    ForwardGradient,
    GradientEstimator,
    LocalGuess,
    LocalLosses,
    MeZO,
    SecondOrder,
    write_grads,
)
from fgtrain.forward_ad import directional_derivatives
from fgtrain.tangents import Coordinate, LowRank, Normal, Rademacher, Sphere

__all__ = [
    "FDFA",
    "SPSA",
    "ActivityPerturbation",
    "Backprop",
    "CheckpointedBackprop",
    "Coordinate",
    "Estimate",
    "ForwardGradient",
    "GradientEstimator",
    "LocalGuess",
    "LocalLosses",
    "LowRank",
    "MeZO",
    "Normal",
    "Rademacher",
    "SecondOrder",
    "Sphere",
    "directional_derivatives",
    "tasks",
    "write_grads",
]

"""fgtrain: train neural networks with backpropagation or forward gradients, swapped by one word."""

from importlib import import_module
from typing import Any

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
from fgtrain.random import draw_seeds
from fgtrain.tangents import Coordinate, LowRank, Normal, Rademacher, Sphere, Tangents

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
    "Tangents",
    "directional_derivatives",
    "draw_seeds",
    "tasks",
    "write_grads",
]


def __getattr__(name: str) -> Any:
    """`fgtrain.tasks` is loaded at its first use: it brings a catalogue of test functions."""
    if name == "tasks":
        return import_module("fgtrain.tasks")
    raise AttributeError(f"module 'fgtrain' has no attribute {name!r}")

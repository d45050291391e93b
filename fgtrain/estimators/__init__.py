"""Gradient estimators, one method a file. They know nothing of Lightning, Hydra or process groups."""

from fgtrain.estimators.backprop import Backprop
from fgtrain.estimators.base import Estimate, GradientEstimator, write_grads
from fgtrain.estimators.checkpointed import CheckpointedBackprop
from fgtrain.estimators.forward_gradient import ForwardGradient

__all__ = ["Backprop", "CheckpointedBackprop", "Estimate", "ForwardGradient", "GradientEstimator", "write_grads"]

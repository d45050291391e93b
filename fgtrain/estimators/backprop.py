"""Reverse mode: the exact gradient, the reference for every estimator."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fgtrain.errors import NoTangent, UnsupportedOperation
from fgtrain.estimators.base import Claim, Estimate, GradientEstimator, Reduce
from fgtrain.estimators.gradients import average_grads
from fgtrain.forward_ad.passes import LossFn, check_losses
from fgtrain.network.parameters import trainable_params


class Backprop(GradientEstimator):
    """The exact gradient by backpropagation.

    Formula: g = grad f, from one reverse sweep over the stored activations.

    Bias: unbiased, with variance 0 given the batch.

    Cost: one forward and one backward pass (about three forward passes) and memory for every activation. Ranks exchange
    the whole gradient.

    Source: Rumelhart, Hinton, Williams 1986.

    >>> model = nn.ParameterDict({"x": torch.tensor(3.0)})
    >>> estimate = Backprop()(model, lambda m: m["x"] ** 2)
    >>> estimate.loss.item(), estimate.grads["x"].item()
    (9.0, 6.0)
    """

    scalar_reducible = False
    backpropagates = True
    gives_derivatives = False
    backward_pass = "whole"
    claims: frozenset[Claim] = frozenset({"exact"})

    def relative_squared_error(self, grads: Mapping[str, Tensor]) -> float:
        return 0.0

    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        trainable_params(model)  # before the loss, whose errors are less clear
        with torch.enable_grad():
            loss = check_losses(loss_fn(model)).mean()
            params = trainable_params(model)  # the loss may freeze some
            if not loss.requires_grad:
                raise NoTangent(
                    "the loss depends on no trainable parameter; check that loss_fn uses the model it is given"
                )
            stored = stored_grads(params)
            found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        refuse_backward_inside(params, stored)
        grads = {name: g for name, g in zip(params, found, strict=True) if g is not None}
        return Estimate(loss.detach(), average_grads(grads, params, reduce))


def stored_grads(params: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Which `.grad` every parameter has, and how often it was changed in place."""
    return [(id(p.grad), 0 if p.grad is None else p.grad._version) for p in params.values()]


def refuse_backward_inside(params: Mapping[str, Tensor], stored: list[tuple[int, int]]) -> None:
    """Refuse a model that has changed `.grad` of its parameters since it was `stored`."""
    if stored_grads(params) != stored:
        raise UnsupportedOperation(
            "a custom autograd.Function calls backward inside, so that parameters in it are hidden from the loss; "
            "use torch.utils.checkpoint instead, or give the parameters to the Function as arguments"
        )

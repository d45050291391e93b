"""One call of an estimator in a training step, with precision, gradient accumulation and ranks."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn

from fgtrain.distributed import Ranks, TangentsOver
from fgtrain.estimators import Estimate, GradientEstimator
from fgtrain.forward_ad.passes import LossFn
from fgtrain.lightning.exchange import Exchange


class StepEstimates(NamedTuple):
    """The current step of a module that trains with an estimator, as its `fgtrain_estimates()` returns it.

    Args:
        estimator: the run's estimator.
        model: the module whose parameters are trained.
        ranks: the processes.
        tangents: whether they share their tangents.
        micro_batches: batches per optimizer step.
        estimate: called with an estimator, a batch and its index, returns the estimate that all ranks would add to
            `.grad`, or None if training_step skips the batch. It writes and logs nothing.
    """

    estimator: GradientEstimator
    model: nn.Module
    ranks: Ranks
    tangents: TangentsOver
    micro_batches: int
    estimate: Callable[[GradientEstimator, Any, int], Estimate | None]


def estimate_for_step(
    plugin: Precision,
    ranks: Ranks,
    estimator: GradientEstimator,
    model: nn.Module,
    loss_fn: LossFn,
    *,
    key: tuple[int, ...],
    tangents: TangentsOver = "shared",
    micro_batches: int = 1,
    exchange: Exchange | None = None,
) -> Estimate:
    """An estimate whose gradients can be added to `.grad` unchanged.

    They are divided by the number of accumulated batches and averaged over ranks. Under `16-mixed` they are multiplied
    by the loss scale, which the optimizer step removes. Autocast applies to the loss only: gradients are computed from
    derivatives in the precision of the parameters.
    """
    scaler = scaler_of(plugin)
    is_scaled = micro_batches > 1 or scaler is not None

    def scaled(tensors: Any) -> Any:
        return tensors if scaler is None else scaler.scale(tensors)

    def losses(model: nn.Module) -> Tensor:
        with plugin.forward_context():
            found = loss_fn(model)
        # A backward pass in half precision needs a loss that is already scaled.
        return scaled(found / micro_batches) if is_scaled and estimator.backpropagates else found

    with _full_precision(plugin):
        estimate = ranks.estimate(estimator, model, losses, key, tangents, exchange)
        if not is_scaled:
            return estimate
        if estimator.backpropagates:
            return estimate._replace(loss=estimate.loss * micro_batches / scaled(torch.ones_like(estimate.loss)))
        grads: Mapping[str, Tensor] = {name: g / micro_batches for name, g in estimate.grads.items()}
        if scaler is not None:
            grads = dict(zip(grads, scaled(list(grads.values())), strict=True))
        return estimate._replace(grads=grads)


def scaler_of(plugin: Any) -> Any:
    """The loss scaler of `16-mixed`, which skips steps that are not finite itself; None for other precisions."""
    return getattr(plugin, "scaler", None)


def _full_precision(plugin: Any) -> Any:
    return torch.autocast(plugin.device, enabled=False) if isinstance(plugin, MixedPrecision) else nullcontext()

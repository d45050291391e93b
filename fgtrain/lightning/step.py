"""One call of an estimator in a training step: precision, accumulation and ranks are settled here."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn

from fgtrain.distributed import Ranks, TangentsOver
from fgtrain.estimators import Estimate, GradientEstimator


class StepEstimates(NamedTuple):
    """What a module that trains with an estimator tells of its current step, by `estimates_at_step()`.

    Args:
        estimator: of the run.
        model: whose parameters it trains.
        ranks: the processes.
        tangents: what they share.
        micro_batches: batches of an optimizer step.
        estimate: called with an estimator, a batch and its index, returns what all ranks would add to `.grad`, or None
            where training_step skips the batch; nothing is written, stepped or logged.
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
    loss_fn: Callable[[Any], Tensor],
    *,
    key: tuple[int, ...],
    tangents: TangentsOver = "shared",
    micro_batches: int = 1,
) -> Estimate:
    """An estimate whose gradients are what `.grad` has to receive from this batch.

    They are divided by the number of accumulated batches, averaged over ranks and, under `16-mixed`, multiplied by the
    loss scale, which the optimizer step takes out again. Autocast holds for the loss alone: the arithmetic that makes a
    gradient out of derivatives is done in the precision of the parameters.
    """
    scaler = getattr(plugin, "scaler", None)
    is_scaled = micro_batches > 1 or scaler is not None

    def scaled(tensors: Any) -> Any:
        return tensors if scaler is None else scaler.scale(tensors)

    def losses(model: nn.Module) -> Tensor:
        with plugin.forward_context():
            found = loss_fn(model)
        # What travels backwards in half precision must be scaled before it sets out.
        return scaled(found / micro_batches) if is_scaled and estimator.backpropagates else found

    with _full_precision(plugin):
        estimate = ranks.estimate(estimator, model, losses, key, tangents)
        if not is_scaled:
            return estimate
        if estimator.backpropagates:
            return estimate._replace(loss=estimate.loss * micro_batches / scaled(torch.ones_like(estimate.loss)))
        grads: Mapping[str, Tensor] = {name: g / micro_batches for name, g in estimate.grads.items()}
        if scaler is not None:
            grads = dict(zip(grads, scaled(list(grads.values())), strict=True))
        return estimate._replace(grads=grads)


def _full_precision(plugin: Any) -> Any:
    return torch.autocast(plugin.device, enabled=False) if isinstance(plugin, MixedPrecision) else nullcontext()

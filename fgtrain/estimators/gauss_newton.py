"""Gauss-Newton steps in the span of random directions, with the curvature of the loss in the outputs."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fgtrain.errors import LossError
from fgtrain.estimators.base import Claim, Estimate, GradientEstimator, Reduce, require_positive_int
from fgtrain.estimators.outputs import linearized
from fgtrain.forward_ad.passes import LossFn
from fgtrain.network.parameters import trainable_params
from fgtrain.random import draw_seeds
from fgtrain.tangents import LowRank, Tangents, law_or
from fgtrain.tangents.directions import Directions, unit_directions


class GaussNewton(GradientEstimator):
    """The Gauss-Newton step in the span of K directions, with Levenberg-Marquardt damping (SOFO).

    Formula: g = sum_k w_k v_k with w = (|G| + damping m I)^-1 d. Here d_k = grad f . v_k and G_jk = T_j . H T_k, where
    T_k = J v_k are the derivatives of the model's outputs and H is the Hessian of the mean loss in the outputs; m is
    the mean of |G|'s eigenvalues, so that the lengths of directions, outputs and losses do not matter. The step
    p - lr g with lr = 1 goes to the minimum of the damped quadratic model in the span. With K = n orthogonal directions
    of equal length that is the whole Levenberg-Marquardt step.

    `max_change` is a trust region: g is shortened to w . G w <= max_change. For cross-entropy w . G w is about twice
    the Kullback-Leibler divergence between the predictions before and after the step, in nats for each example.

    Outputs: if the loss is the mean of one `F.cross_entropy` or `F.mse_loss`, with any options, the outputs are its
    input, and H has a closed form. For any other loss they are the values that the model, or the outermost modules that
    are called, return to the loss function, or the parameters if no module is called or it is called inside
    `torch.vmap`. Forward mode over forward mode
    through the loss alone then gives G. If the loss is not convex, |G| has the absolute eigenvalues of G. Parameters
    that the loss uses directly, besides outputs, count in d and not in G.

    Bias: g is not an estimate of the gradient but a step. It always descends, since |G| + damping m I is positive.

    Cost: one pass that carries K derivatives, in K times the memory of inference, and K^2 inner products of outputs
    (without a closed form K^2 passes of the loss alone). Ranks exchange K + K (K + 1) / 2 floats. `replay` takes the K
    numbers w, the estimate's `weights`.

    Args:
        tangents: law of the directions.
        num_tangents: K >= 1; None for the n unit directions instead of random ones. The step is then that of
            Levenberg and Marquardt, for few parameters.
        damping: above 0, relative to the mean curvature of the span.
        max_change: cap on w . G w; None for none.

    Raises:
        ValueError: an argument is out of its range.
        LossError: the loss is linear in the outputs, so that nothing bounds a step.
        UnsupportedOperation: the loss has no second derivative in forward mode.

    Source: Yu, Xia, Ma, Lengyel, Hennequin 2024, "Second-order forward-mode optimization of recurrent neural networks",
    NeurIPS 2024; damping relative to the mean and the trust region are fgtrain's.

    A quadratic of two variables is minimised in one step:

    >>> model = nn.ParameterDict({"x": torch.tensor([1.0, 2.0])})
    >>> estimator = GaussNewton(num_tangents=8, damping=1e-4, max_change=None)
    >>> generator = torch.Generator().manual_seed(0)
    >>> estimate = estimator(model, lambda m: nn.functional.mse_loss(m["x"], torch.zeros(2)), generator=generator)
    >>> torch.allclose(estimate.grads["x"], model["x"], atol=1e-3)
    True
    """

    scalar_reducible = True
    claims: frozenset[Claim] = frozenset({"descent"})

    def __init__(
        self,
        tangents: Tangents | None = None,
        num_tangents: int | None = 16,
        *,
        damping: float = 0.1,
        max_change: float | None = 0.1,
    ) -> None:
        super().__init__()
        if num_tangents is not None:
            require_positive_int("num_tangents", num_tangents)
        if not damping > 0:
            raise ValueError(f"damping must be positive, got {damping!r}")
        if max_change is not None and not max_change > 0:
            raise ValueError(f"max_change must be positive or None, got {max_change!r}")
        self.tangents = law_or(tangents, LowRank())
        self.num_tangents = num_tangents
        self.damping = damping
        self.max_change = max_change
        self.shardable = num_tangents is not None and self.tangents.shardable
        self.directions_at_a_time = num_tangents or 0

    def direction_bytes(self, params: Mapping[str, Tensor]) -> int:
        return self.tangents.bytes_of(params)

    @torch.no_grad()
    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        directions = self._directions(model, generator)
        loss, slopes, curvature = linearized(model, loss_fn, directions)
        if reduce is not None:
            slopes, curvature = _reduced(slopes, curvature, reduce)
        weights = self._weights(slopes, curvature)
        return Estimate(loss, directions.weighted_sum(weights), slopes, weights)

    def replay(self, model: nn.Module, derivatives: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return self._directions(model, generator).weighted_sum(derivatives)

    def _directions(self, model: nn.Module, generator: torch.Generator) -> Directions:
        params = trainable_params(model)
        if self.num_tangents is None:
            return unit_directions(params)
        return self.tangents.sample(params, draw_seeds(generator, self.num_tangents))

    def _weights(self, slopes: Tensor, curvature: Tensor) -> Tensor:
        """w (K,) from d (K,) and G (K, K)."""
        if not (slopes.isfinite().all() and curvature.isfinite().all()):
            return torch.full_like(slopes, torch.nan)  # `write_grads` refuses these gradients
        sizes, axes = torch.linalg.eigh(curvature.double())
        sizes, along = sizes.abs(), axes.mT @ slopes.double()
        if not sizes.any():
            if slopes.any():
                raise LossError(
                    "the loss is linear in the outputs of the model, so nothing bounds a Gauss-Newton step; use "
                    "ForwardGradient, or let the loss be curved in the outputs of the model"
                )
            return slopes
        rounding = torch.finfo(slopes.dtype).eps * sizes.max()
        weights = along / (sizes + self.damping * sizes.mean() + rounding)
        if self.max_change is not None:
            change = (weights.square() * sizes).sum()
            weights *= (self.max_change / change.clamp_min(self.max_change)).sqrt()
        return (axes @ weights).to(slopes.dtype)

    def extra_repr(self) -> str:
        return (
            f"tangents={self.tangents}, num_tangents={self.num_tangents}, damping={self.damping}, "
            f"max_change={self.max_change}"
        )


def _reduced(slopes: Tensor, curvature: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """The means of both over ranks, sent as one tensor that holds only one triangle of the symmetric curvature."""
    rows, columns = torch.triu_indices(*curvature.shape, device=curvature.device)
    both = reduce(torch.cat([slopes, curvature[rows, columns]]))
    curvature = torch.empty_like(curvature)
    curvature[rows, columns] = curvature[columns, rows] = both[len(slopes) :]
    return both[: len(slopes)], curvature

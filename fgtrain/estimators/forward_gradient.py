"""Forward gradients by weight perturbation: directions in the space of the weights."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fgtrain.combine import Combine, coefficients
from fgtrain.directions import Directions
from fgtrain.estimators.base import Claim, Estimate, GradientEstimator, Reduce
from fgtrain.forward_ad import jvp
from fgtrain.parameters import trainable_params
from fgtrain.random import draw_seeds
from fgtrain.tangents import Normal, Sphere, Tangents


class ForwardGradient(GradientEstimator):
    """The forward gradient of Baydin et al., for any law of directions and any number of them.

    Formula: g = (1/K) sum_k (grad f . v_k) v_k with v_k from `tangents` (combine="mean"); or the orthogonal projection
    of grad f on span(v_1 .. v_K) (combine="projection").

    Unbiased for combine="mean": E[(grad f . v) v] = E[v v^T] grad f = grad f. The projection is K/n of the gradient in
    the mean. `clip_derivative` biases both.

    Relative variance: s = (n - 1 + excess) / K for the mean, with n trainable numbers and the law's excess
    (`fgtrain.tangents`); 1 - K/n is the projection's relative squared error.

    `shrinkage` multiplies the mean by 1 / (1 + s), the factor of least squared error: s / (1 + s) instead of s. It
    changes no direction, only the length, so that one learning rate serves every K. E[g] = grad f / (1 + s).

    Cost: one forward pass that carries K derivatives, the memory of inference, K floats sent between ranks.

    Args:
        tangents: law of the directions.
        num_tangents: K >= 1.
        combine: "mean" or "projection" (least squares in the span of the directions).
        shrinkage: multiply the mean by 1 / (1 + s). Where s depends on how the gradient is spread over the layers
            (low-rank tangents), it is taken to be spread evenly.
        clip_derivative: cap on |grad f . v_k|, against rare large values; None for none.
        rowwise: example i of the loss depends on row i of every parameter alone (many starting points of one
            function): each row gets the derivative of its own loss.

    Raises:
        ValueError: an argument out of its range.

    Source: Baydin, Pearlmutter, Syme, Wood, Torr 2022, arXiv:2202.08587, equation 4; K directions: Fluegel et al.
    2024, arXiv:2410.17764; shrinkage: Shukla and Shin 2023, arXiv:2310.14168.

    The mean over many directions approaches the gradient, (2, 4) here:

    >>> model = nn.ParameterDict({"w": torch.tensor([1.0, 2.0])})
    >>> estimator = ForwardGradient(num_tangents=20_000)
    >>> estimate = estimator(model, lambda m: m["w"].square().sum(), generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(estimate.grads["w"], torch.tensor([2.0, 4.0]), atol=0.2)
    True
    """

    scalar_reducible = True

    def __init__(
        self,
        tangents: Tangents | None = None,
        num_tangents: int = 1,
        combine: Combine = "mean",
        *,
        shrinkage: bool = False,
        clip_derivative: float | None = None,
        rowwise: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(num_tangents, int) or isinstance(num_tangents, bool) or num_tangents < 1:
            raise ValueError(f"num_tangents must be an integer of at least 1, got {num_tangents!r}")
        if combine not in get_args(Combine):
            raise ValueError(f"combine must be one of {', '.join(get_args(Combine))}, got {combine!r}")
        if shrinkage and combine != "mean":
            raise ValueError(
                f"shrinkage is of combine='mean', got combine={combine!r}; a projection is as short as it can be"
            )
        if clip_derivative is not None and not clip_derivative > 0:
            raise ValueError(f"clip_derivative must be positive or None, got {clip_derivative!r}")
        self.tangents = tangents if tangents is not None else Normal()
        self.num_tangents = num_tangents
        self.combine: Combine = combine
        self.shrinkage = shrinkage
        self.clip_derivative = clip_derivative
        self.rowwise = rowwise
        self.claims = frozenset(self._claims())
        self._factors: dict[tuple[tuple[int, ...], ...], float] = {}

    def _claims(self) -> Iterator[Claim]:
        yield "descent"
        if self.combine == "mean" and not self.shrinkage and self.clip_derivative is None:
            yield "unbiased"

    def relative_squared_error(self, grads: Mapping[str, Tensor]) -> float | None:
        if self.clip_derivative is not None or self.rowwise:
            return None
        if self.combine == "projection":
            if not isinstance(self.tangents, (Normal, Sphere)):  # others are not isotropic
                return None
            return max(0.0, 1 - self.num_tangents / sum(g.numel() for g in grads.values()))
        variance = self.tangents.relative_variance(grads) / self.num_tangents
        factor = self._shrinkage_factor(grads) if self.shrinkage else 1.0
        return factor**2 * variance + (1 - factor) ** 2

    def _shrinkage_factor(self, params: Mapping[str, Tensor]) -> float:
        """1 / (1 + s), for a gradient of equal entries."""
        shapes = tuple(p.shape[1:] if self.rowwise else p.shape for p in params.values())
        if shapes not in self._factors:
            flat = {str(i): torch.ones(shape) for i, shape in enumerate(shapes)}
            self._factors[shapes] = 1 / (1 + self.tangents.relative_variance(flat) / self.num_tangents)
        return self._factors[shapes]

    def forward(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any], Tensor],
        *,
        generator: torch.Generator | None = None,
        reduce: Reduce | None = None,
    ) -> Estimate:
        params = trainable_params(model)
        seeds = draw_seeds(generator or self.own_generator(), self.num_tangents)
        with torch.inference_mode(False), torch.no_grad():
            directions = self.tangents.sample(params, seeds, rowwise=self.rowwise)
            losses, derivatives = jvp(model, loss_fn, directions)
            if self.rowwise:
                derivatives = derivatives / losses.numel()  # of the mean loss, like every gradient here
            elif losses.dim():
                derivatives = derivatives.mean(1)
            if reduce is not None:
                derivatives = reduce(derivatives)
            if self.clip_derivative is not None:
                derivatives = derivatives.clamp(-self.clip_derivative, self.clip_derivative)
            grads = self._combined(derivatives, directions, params)
        return Estimate(losses.mean(), grads, derivatives.flatten())

    def replay(self, model: nn.Module, derivatives: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        seeds = draw_seeds(generator, self.num_tangents)
        params = trainable_params(model)
        directions = self.tangents.sample(params, seeds, rowwise=self.rowwise)
        if self.rowwise:
            derivatives = derivatives.view(self.num_tangents, -1)
        return self._combined(derivatives, directions, params)

    def _combined(self, derivatives: Tensor, directions: Directions, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = coefficients(self.combine, derivatives, directions)
        return directions.weighted_sum(weights * self._shrinkage_factor(params) if self.shrinkage else weights)

    def extra_repr(self) -> str:
        shrinkage = ", shrinkage=True" if self.shrinkage else ""
        return f"tangents={self.tangents}, num_tangents={self.num_tangents}, combine={self.combine!r}{shrinkage}"

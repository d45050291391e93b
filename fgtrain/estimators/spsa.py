"""SPSA: central differences along random directions."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain.estimators.base import Estimate, Reduce
from fgtrain.estimators.central_differences import CentralDifferences
from fgtrain.network.parameters import trainable_params
from fgtrain.random import draw_seeds
from fgtrain.tangents import Rademacher, Tangents, law_or
from fgtrain.tangents.directions import dense


class SPSA(CentralDifferences):
    """Simultaneous perturbation: the directional derivative by a central difference of two losses.

    Formula: g = (1/K) sum_k d_k v_k, d_k = (f(p + epsilon v_k) - f(p - epsilon v_k)) / (2 epsilon).

    Bias: d_k = grad f . v_k + (epsilon^2 / 6) D^3 f[v_k, v_k, v_k] + O(epsilon^4): none for a quadratic, a quarter for
    half the epsilon. Rounding adds about |f| / epsilon times the unit roundoff to d_k.

    Relative variance: that of `ForwardGradient`, s = (n - 1 + excess) / K, for small epsilon. `shrinkage` multiplies
    the mean by 1 / (1 + s), so that one learning rate serves every K and n.

    Cost: 2 K forward passes, and an unperturbed one if the model has buffers, which come from it; memory of inference,
    K directions and a second copy of the parameters; K floats sent between ranks. Needs no derivative of any operation.
    The loss reported is the mean of the 2 K losses, f + O(epsilon^2).

    Args:
        tangents: law of the directions; signs by default, as in Spall's article.
        num_tangents: K >= 1.
        epsilon: half the distance of the two points, in units of a direction.
        shrinkage: multiply the mean by 1 / (1 + s), see `fgtrain.tangents.combine.Shrinkage`.
        rowwise: example i of the loss depends on row i of every parameter alone, as in `ForwardGradient`.

    Raises:
        ValueError: an argument out of its range.

    Source: Spall 1992, IEEE Transactions on Automatic Control 37(3), equation 2.2.

    The derivative of x1^2 + x2^2 at (1, 2) along v = (1, 1) is (2, 4) . v = 6:

    >>> model = nn.ParameterDict({"x": torch.tensor([1.0, 2.0])})
    >>> estimate = SPSA()(model, lambda m: m["x"].square().sum(), generator=torch.Generator().manual_seed(1))
    >>> estimate.grads["x"].round(decimals=2)
    tensor([6., 6.])
    """

    def __init__(
        self,
        tangents: Tangents | None = None,
        num_tangents: int = 1,
        *,
        epsilon: float = 1e-3,
        shrinkage: bool = False,
        rowwise: bool = False,
    ) -> None:
        super().__init__(law_or(tangents, Rademacher()), num_tangents, epsilon, shrinkage=shrinkage, rowwise=rowwise)

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
            tangents = {name: dense(tangent) for name, tangent in directions.items()}

            def at(k: int, distance: float) -> Mapping[str, Tensor]:
                return {name: torch.add(p, tangents[name][k], alpha=distance) for name, p in params.items()}

            losses, derivatives = self.differences(model, loss_fn, at)
            if self.rowwise:
                derivatives = derivatives / losses.numel()
            elif losses.dim():
                derivatives = derivatives.mean(1)
            if reduce is not None:
                derivatives = reduce(derivatives)
            grads = directions.weighted_sum(self._weights(params, derivatives))
        return Estimate(losses.mean(), grads, derivatives.flatten())

    def replay(self, model: nn.Module, derivatives: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        params = trainable_params(model)
        directions = self.tangents.sample(params, draw_seeds(generator, self.num_tangents), rowwise=self.rowwise)
        if self.rowwise:
            derivatives = derivatives.view(self.num_tangents, -1)
        return directions.weighted_sum(self._weights(params, derivatives))

    def _weights(self, params: Mapping[str, Tensor], derivatives: Tensor) -> Tensor:
        return derivatives / self.num_tangents * self.shrinkage.factor(params)

"""SPSA: central differences along random directions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fgtrain.estimators.central_differences import CentralDifferences, Lines
from fgtrain.tangents import Rademacher, Tangents, law_or
from fgtrain.tangents.directions import Directions, dense


class SPSA(CentralDifferences):
    """Simultaneous perturbation: the directional derivative by a central difference of two losses.

    Formula: g = (1/K) sum_k d_k v_k, d_k = (f(p + epsilon v_k) - f(p - epsilon v_k)) / (2 epsilon).

    Bias: d_k = grad f . v_k + (epsilon^2 / 6) D^3 f[v_k, v_k, v_k] + O(epsilon^4). It is zero for a quadratic, and half
    the epsilon gives a quarter of it. Rounding adds about |f| / epsilon times the unit roundoff to d_k. A difference of
    losses also follows what a model computes under no_grad or detaches, such as a target of its own.

    Relative variance: that of `ForwardGradient`, s = (n - 1 + excess) / K, for small epsilon. `shrinkage` multiplies
    the mean by 1 / (1 + s), so that one learning rate serves every K and n.

    Cost: 2 K forward passes, and an unperturbed one if the model has buffers or writes into its parameters. Memory:
    that of inference, K directions and a second copy of the parameters. Ranks exchange K floats. No operation needs a
    derivative. The reported loss is the mean of the 2 K losses, f + O(epsilon^2).

    Args:
        tangents: law of the directions; signs by default, as in Spall's article.
        num_tangents: K >= 1.
        epsilon: half the distance of the two points, in units of a direction.
        shrinkage: multiply the mean by 1 / (1 + s), see `fgtrain.tangents.combine.Shrinkage`.
        rowwise: example i of the loss depends only on row i of every parameter, as in `ForwardGradient`.

    Raises:
        ValueError: an argument is out of its range.

    Source: Spall 1992, IEEE Transactions on Automatic Control 37(3), equation 2.2.

    The derivative of x1^2 + x2^2 at (1, 2) along v = (1, 1) is (2, 4) . v = 6:

    >>> model = torch.nn.ParameterDict({"x": torch.tensor([1.0, 2.0])})
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

    def lines(self, params: Mapping[str, Tensor], seeds: list[int]) -> Lines:
        return _Stored(params, self.tangents.sample(params, seeds, rowwise=self.rowwise))


class _Stored:
    """Lines along directions that are kept in memory."""

    def __init__(self, params: Mapping[str, Tensor], directions: Directions) -> None:
        self._params = params
        self._tangents = {name: dense(tangent) for name, tangent in directions.items()}
        self._directions = directions

    def at(self, k: int, distance: float) -> Mapping[str, Tensor]:
        return {name: torch.add(p, self._tangents[name][k], alpha=distance) for name, p in self._params.items()}

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        return self._directions.weighted_sum(weights)

"""Weights of K directions from their directional derivatives: g = sum_k c_k v_k.

`mean` uses c = d / K, which is unbiased. `projection` uses c = (V^T V)^-1 d, the orthogonal projection of the true
gradient on the span of the directions. It has the least error within the span but is biased in length: its mean is
about K/n of the gradient.

Source of the projection: Fluegel, Coquelin, Debus, Streit, Goetz 2024, arXiv:2410.17764; of the shrinkage: Shukla and
Shin 2023, arXiv:2310.14168.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from fgtrain.tangents import Tangents

Combine = Literal["mean", "projection"]


def coefficients(combine: Combine, derivatives: Tensor, gram: Callable[[], Tensor]) -> Tensor:
    """The weights c of the directions, shaped like `derivatives`: (K,), or (K, N) for N rows.

    Args:
        combine: "mean" or "projection".
        derivatives: grad f . v_k.
        gram: returns the inner products of the directions, (K, K) or (N, K, K); called only for "projection".
    """
    if combine == "mean":
        num = derivatives.shape[0]
        return derivatives if num == 1 else derivatives / num
    inverse = torch.linalg.pinv(gram(), hermitian=True)  # (K, K) or (N, K, K)
    solution = inverse @ derivatives.to(inverse.dtype).t().unsqueeze(-1)
    return solution.squeeze(-1).t().to(derivatives.dtype)


class Shrinkage:
    """Scales the mean of K directions by 1 / (1 + s), which gives the least squared error.

    The mean has the relative variance s = (n - 1 + excess) / K. Multiplied by a, it has the relative squared error a^2
    s + (1 - a)^2. The least error is s / (1 + s), at a = 1 / (1 + s). Only the length changes, not the direction. The
    largest stable learning rate of SGD then neither falls with n nor grows with K.

    Args:
        tangents: law of the directions. If s depends on how the gradient is distributed over the layers (low-rank
            tangents), an even distribution is assumed.
        num_tangents: K.
        on: False leaves the mean unchanged, a = 1.
        rowwise: whether every row of a parameter has its own gradient of n / rows numbers.
    """

    def __init__(self, tangents: Tangents, num_tangents: int, *, on: bool, rowwise: bool = False) -> None:
        self.on = on
        self._tangents = tangents
        self._num_tangents = num_tangents
        self._rowwise = rowwise
        self._variances: dict[tuple[tuple[int, ...], ...], float] = {}

    def factor(self, params: Mapping[str, Tensor], estimates: int = 1) -> float:
        """The factor a for the mean of `estimates` estimates, of K directions each, over the parameters `params`."""
        if not self.on:
            return 1.0
        shapes = tuple(p.shape[1:] if self._rowwise else p.shape for p in params.values())
        if shapes not in self._variances:
            one = torch.ones((), dtype=torch.float64)
            even = {str(i): one.expand(shape) for i, shape in enumerate(shapes)}  # all entries in one place
            self._variances[shapes] = self._relative_variance(even)
        return 1 / (1 + self._variances[shapes] / estimates)

    def relative_squared_error(self, grads: Mapping[str, Tensor]) -> float:
        """E ||a mean - g||^2 / ||g||^2, where g is the gradient `grads`."""
        factor = self.factor(grads)
        return factor**2 * self._relative_variance(grads) + (1 - factor) ** 2

    def _relative_variance(self, grads: Mapping[str, Tensor]) -> float:
        return self._tangents.relative_variance(grads) / self._num_tangents

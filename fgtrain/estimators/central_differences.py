"""What zeroth-order methods share: the directional derivative from two losses instead of one JVP."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain.estimators.base import GradientEstimator, require_positive_int
from fgtrain.forward_ad.passes import RepeatedPass, plain_losses
from fgtrain.tangents import Tangents
from fgtrain.tangents.combine import Shrinkage


class CentralDifferences(GradientEstimator):
    """Estimates from d_k = (f(p + epsilon v_k) - f(p - epsilon v_k)) / (2 epsilon).

    Args:
        tangents: law of the directions.
        num_tangents: K >= 1.
        epsilon: half the distance of the two points, in units of a direction.
        shrinkage: multiply the mean by 1 / (1 + s).
        rowwise: example i of the loss depends on row i of every parameter alone.

    Raises:
        ValueError: an argument out of its range.
    """

    scalar_reducible = True
    loss_at_parameters = False

    def __init__(
        self, tangents: Tangents, num_tangents: int, epsilon: float, *, shrinkage: bool, rowwise: bool = False
    ) -> None:
        super().__init__()
        require_positive_int("num_tangents", num_tangents)
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon!r}")
        self.tangents = tangents
        self.num_tangents = num_tangents
        self.epsilon = epsilon
        self.shrinkage = Shrinkage(tangents, num_tangents, on=shrinkage, rowwise=rowwise)
        self.rowwise = rowwise

    def relative_squared_error(self, grads: Mapping[str, Tensor]) -> float | None:
        """For small epsilon."""
        return None if self.rowwise else self.shrinkage.relative_squared_error(grads)

    def mean_length(self, grads: Mapping[str, Tensor]) -> float:
        return self.shrinkage.factor(grads)

    def mean_length_of(self, estimates: int, grads: Mapping[str, Tensor]) -> float:
        return self.shrinkage.factor(grads, estimates)

    def differences(
        self, model: nn.Module, loss_fn: Callable[[Any], Tensor], at: Callable[[int, float], Mapping[str, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Losses (B,) or (), averaged over all passes, and derivatives (K, B) or (K,).

        Args:
            model: leaves with the trace of one plain pass.
            loss_fn: of the model.
            at: maps k and a distance to the parameters moved so far along direction k.
        """
        repeated = RepeatedPass(model)

        def losses_at(k: int, distance: float) -> Tensor:
            repeated.rewind()
            return plain_losses(model, loss_fn, at(k, distance))

        pairs = [(losses_at(k, self.epsilon), losses_at(k, -self.epsilon)) for k in range(self.num_tangents)]
        if any(True for _ in model.buffers()):
            repeated.rewind()
            plain_losses(model, loss_fn)
        plus, minus = (torch.stack(side) for side in zip(*pairs, strict=True))
        return (plus + minus).mean(0) / 2, (plus - minus) / (2 * self.epsilon)

    def extra_repr(self) -> str:
        return f"tangents={self.tangents}, num_tangents={self.num_tangents}, epsilon={self.epsilon}"

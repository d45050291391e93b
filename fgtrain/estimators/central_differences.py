"""The base of zeroth-order methods: directional derivatives from two losses instead of one JVP."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fgtrain.estimators.base import Estimate, GradientEstimator, Reduce, require_positive_int
from fgtrain.estimators.gradients import of_mean_loss
from fgtrain.forward_ad.passes import LossFn, plain_losses
from fgtrain.network.displaced import is_changed
from fgtrain.network.parameters import trainable_params
from fgtrain.network.snapshot import Snapshot
from fgtrain.random import draw_seeds
from fgtrain.tangents import Tangents
from fgtrain.tangents.combine import Shrinkage


class Lines(Protocol):
    """Straight lines through the parameters along K directions."""

    def at(self, k: int, distance: float) -> Mapping[str, Tensor]:
        """The parameters moved by `distance` times direction k."""
        ...

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """sum_k weights_k v_k, from weights (K,) or, if rowwise, (K, rows)."""
        ...


class CentralDifferences(GradientEstimator):
    """Estimates from d_k = (f(p + epsilon v_k) - f(p - epsilon v_k)) / (2 epsilon).

    Args:
        tangents: law of the directions.
        num_tangents: K >= 1.
        epsilon: half the distance of the two points, in units of a direction.
        shrinkage: multiply the mean by 1 / (1 + s).
        rowwise: example i of the loss depends only on row i of every parameter.

    Raises:
        ValueError: an argument is out of its range.
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
        self.lacks_shrinkage = not shrinkage
        self.rowwise = rowwise

    def relative_squared_error(self, grads: Mapping[str, Tensor]) -> float | None:
        """The limit for small epsilon."""
        return None if self.rowwise else self.shrinkage.relative_squared_error(grads)

    def mean_length(self, grads: Mapping[str, Tensor]) -> float:
        return self.shrinkage.factor(grads)

    def mean_length_of(self, estimates: int, grads: Mapping[str, Tensor]) -> float:
        return self.shrinkage.factor(grads, estimates)

    @abstractmethod
    def lines(self, params: Mapping[str, Tensor], seeds: list[int]) -> Lines:
        """The lines along the directions drawn from `seeds`."""

    @torch.no_grad()
    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        params = trainable_params(model)
        lines = self.lines(params, draw_seeds(generator, self.num_tangents))
        losses, derivatives = self._differences(model, loss_fn, lines)
        derivatives = of_mean_loss(losses, derivatives, reduce, rowwise=self.rowwise)
        return Estimate(losses.mean(), self._mean(lines, derivatives, params), derivatives.flatten())

    def replay(self, model: nn.Module, derivatives: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        params = trainable_params(model)
        lines = self.lines(params, draw_seeds(generator, self.num_tangents))
        return self._mean(lines, derivatives.view(self.num_tangents, -1) if self.rowwise else derivatives, params)

    def _mean(self, lines: Lines, derivatives: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return lines.weighted_sum(derivatives / self.num_tangents * self.shrinkage.factor(params))

    def _differences(self, model: nn.Module, loss_fn: LossFn, lines: Lines) -> tuple[Tensor, Tensor]:
        """Losses (B,) or (), averaged over all passes, and derivatives (K, B) or (K,); leaves the state of one pass."""
        snapshot, found = Snapshot(model), list[Tensor]()
        writes = any(True for _ in model.buffers())
        for k in range(self.num_tangents):
            for distance in (self.epsilon, -self.epsilon):
                if found:
                    snapshot.restore()
                moved = lines.at(k, distance)
                found.append(plain_losses(model, loss_fn, moved))
                writes = writes or any(map(is_changed, moved.values()))
        if writes:
            snapshot.restore()
            plain_losses(model, loss_fn)
        plus, minus = torch.stack(found[::2]), torch.stack(found[1::2])
        return (plus + minus).mean(0) / 2, (plus - minus) / (2 * self.epsilon)

    def extra_repr(self) -> str:
        return f"tangents={self.tangents}, num_tangents={self.num_tangents}, epsilon={self.epsilon}"

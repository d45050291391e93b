"""Zeroth-order neighbours of the forward gradient: the directional derivative from two losses instead of one JVP."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain.estimators.base import Estimate, GradientEstimator, Reduce
from fgtrain.forward_ad.passes import RepeatedPass, plain_losses
from fgtrain.network.displaced import Perturbed
from fgtrain.network.parameters import trainable_params
from fgtrain.random import draw_seeds, fold_in
from fgtrain.tangents import Normal, Rademacher, Tangents, law_or
from fgtrain.tangents.combine import Shrinkage
from fgtrain.tangents.directions import dense


class SPSA(GradientEstimator):
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

    scalar_reducible = True
    loss_at_parameters = False

    def __init__(
        self,
        tangents: Tangents | None = None,
        num_tangents: int = 1,
        *,
        epsilon: float = 1e-3,
        shrinkage: bool = False,
        rowwise: bool = False,
    ) -> None:
        super().__init__()
        _check(num_tangents, epsilon)
        self.tangents = law_or(tangents, Rademacher())
        self.num_tangents = num_tangents
        self.epsilon = epsilon
        self.shrinkage = Shrinkage(self.tangents, num_tangents, on=shrinkage, rowwise=rowwise)
        self.rowwise = rowwise

    def relative_squared_error(self, grads: Mapping[str, Tensor]) -> float | None:
        """For small epsilon."""
        return None if self.rowwise else self.shrinkage.relative_squared_error(grads)

    def mean_length(self, grads: Mapping[str, Tensor]) -> float:
        return self.shrinkage.factor(grads)

    def mean_length_of(self, estimates: int, grads: Mapping[str, Tensor]) -> float:
        return self.shrinkage.factor(grads, estimates)

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

            losses, derivatives = _central_differences(model, loss_fn, at, self.num_tangents, self.epsilon)
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

    def extra_repr(self) -> str:
        return f"tangents={self.tangents}, num_tangents={self.num_tangents}, epsilon={self.epsilon}"


class MeZO(GradientEstimator):
    """Zeroth-order steps in the memory of inference: directions are drawn again from their seeds, never stored.

    Formula, bias and relative variance: those of `SPSA`, with normal directions by default.

    MeZO adds epsilon z to the parameters and subtracts it again, which in floating point does not give them back. Here
    a perturbed weight exists only while an operation uses it: the parameters stay as they are, bit for bit, also when
    the loss raises an error.

    Cost: 2 K forward passes, and an unperturbed one if the model has buffers; memory of inference and one perturbed
    parameter at a time. K floats sent between ranks. A direction is drawn anew wherever a parameter is used, so a
    recurrent layer written as a loop pays for it at every step.

    A step can be made again without model, loss or data, from its K directional derivatives and the generator's state:
    see `replay`.

    Args:
        tangents: law of the directions, drawn parameter by parameter.
        num_tangents: K >= 1.
        epsilon: half the distance of the two points, in units of a direction.
        shrinkage: multiply the mean by 1 / (1 + s), see `fgtrain.tangents.combine.Shrinkage`.

    Raises:
        ValueError: an argument out of its range.

    Source: Malladi, Gao, Nichani, Damian, Lee, Chen, Arora 2023, arXiv:2305.17333, algorithm 1.

    >>> model = nn.ParameterDict({"x": torch.tensor([1.0, 2.0])})
    >>> mezo, seed = MeZO(), lambda: torch.Generator().manual_seed(0)
    >>> estimate = mezo(model, lambda m: m["x"].square().sum(), generator=seed())
    >>> again = mezo.replay(model, estimate.directional_derivatives, seed())
    >>> torch.equal(again["x"], estimate.grads["x"])
    True
    """

    scalar_reducible = True
    loss_at_parameters = False

    def __init__(
        self,
        tangents: Tangents | None = None,
        num_tangents: int = 1,
        *,
        epsilon: float = 1e-3,
        shrinkage: bool = False,
    ) -> None:
        super().__init__()
        _check(num_tangents, epsilon)
        self.tangents = law_or(tangents, Normal())
        self.num_tangents = num_tangents
        self.epsilon = epsilon
        self.shrinkage = Shrinkage(self.tangents, num_tangents, on=shrinkage)

    def relative_squared_error(self, grads: Mapping[str, Tensor]) -> float:
        """For small epsilon."""
        return self.shrinkage.relative_squared_error(grads)

    def mean_length(self, grads: Mapping[str, Tensor]) -> float:
        return self.shrinkage.factor(grads)

    def mean_length_of(self, estimates: int, grads: Mapping[str, Tensor]) -> float:
        return self.shrinkage.factor(grads, estimates)

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

            def at(k: int, distance: float) -> Mapping[str, Tensor]:
                def moved(i: int, p: Tensor) -> Tensor:
                    return torch.add(p, self._direction(p, i, seeds[k]), alpha=distance)

                return {name: Perturbed(p.detach(), moved, i) for i, (name, p) in enumerate(params.items())}

            losses, derivatives = _central_differences(model, loss_fn, at, self.num_tangents, self.epsilon)
            derivatives = derivatives.mean(1) if losses.dim() else derivatives
            if reduce is not None:
                derivatives = reduce(derivatives)
            grads = self._weighted_sum(params, seeds, derivatives)
        return Estimate(losses.mean(), grads, derivatives)

    def replay(self, model: nn.Module, derivatives: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return self._weighted_sum(trainable_params(model), draw_seeds(generator, self.num_tangents), derivatives)

    @torch.no_grad()
    def _weighted_sum(self, params: Mapping[str, Tensor], seeds: list[int], derivatives: Tensor) -> dict[str, Tensor]:
        grads, weights = {}, derivatives / self.num_tangents * self.shrinkage.factor(params)
        for i, (name, p) in enumerate(params.items()):
            grads[name] = total = torch.zeros_like(p)
            for seed, weight in zip(seeds, weights, strict=True):
                total.addcmul_(self._direction(p, i, seed), weight.to(p.dtype))
        return grads

    def _direction(self, p: Tensor, index: int, seed: int) -> Tensor:
        """Direction `seed` of the parameter of this index, drawn by itself."""
        return dense(self.tangents.sample({"": p}, [fold_in(seed, index)])[""])[0]

    def extra_repr(self) -> str:
        return f"tangents={self.tangents}, num_tangents={self.num_tangents}, epsilon={self.epsilon}"


def _check(num_tangents: int, epsilon: float) -> None:
    if not isinstance(num_tangents, int) or isinstance(num_tangents, bool) or num_tangents < 1:
        raise ValueError(f"num_tangents must be an integer of at least 1, got {num_tangents!r}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon!r}")


def _central_differences(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    at: Callable[[int, float], Mapping[str, Tensor]],
    num_tangents: int,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Losses (B,) or (), averaged over all passes, and derivatives (K, B) or (K,).

    Args:
        model: leaves with the trace of one plain pass.
        loss_fn: of the model.
        at: the parameters moved so far along direction k.
        num_tangents: K.
        epsilon: half the distance of the two points.
    """
    repeated = RepeatedPass(model)

    def losses_at(k: int, distance: float) -> Tensor:
        repeated.rewind()
        return plain_losses(model, loss_fn, at(k, distance))

    pairs = [(losses_at(k, epsilon), losses_at(k, -epsilon)) for k in range(num_tangents)]
    if any(True for _ in model.buffers()):
        repeated.rewind()
        plain_losses(model, loss_fn)
    plus, minus = (torch.stack(side) for side in zip(*pairs, strict=True))
    return (plus + minus).mean(0) / 2, (plus - minus) / (2 * epsilon)

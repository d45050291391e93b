"""MeZO: central differences in the memory of inference."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain.estimators.base import Estimate, Reduce
from fgtrain.estimators.central_differences import CentralDifferences
from fgtrain.network.displaced import Displaced
from fgtrain.network.parameters import trainable_params
from fgtrain.random import draw_seeds, fold_in
from fgtrain.tangents import Normal, Tangents, law_or
from fgtrain.tangents.directions import dense


class MeZO(CentralDifferences):
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

    def __init__(
        self,
        tangents: Tangents | None = None,
        num_tangents: int = 1,
        *,
        epsilon: float = 1e-3,
        shrinkage: bool = False,
    ) -> None:
        super().__init__(law_or(tangents, Normal()), num_tangents, epsilon, shrinkage=shrinkage)

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

                return {name: Displaced(p.detach(), moved, i) for i, (name, p) in enumerate(params.items())}

            losses, derivatives = self.differences(model, loss_fn, at)
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

"""MeZO: central differences with the memory use of inference."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fgtrain.estimators.central_differences import CentralDifferences, Lines
from fgtrain.network.displaced import Displaced
from fgtrain.random import fold_in
from fgtrain.tangents import Normal, Tangents, law_or
from fgtrain.tangents.directions import dense


class MeZO(CentralDifferences):
    """Zeroth-order steps with the memory use of inference: directions are redrawn from their seeds and never stored.

    Formula, bias and relative variance: those of `SPSA`, with normal directions by default.

    The original adds epsilon z to the parameters and subtracts it again, which in floating point does not restore them.
    Here a perturbed weight exists only while an operation uses it. So the parameters stay the same bit for bit, even if
    the loss raises an error.

    Cost: 2 K forward passes, and an unperturbed one if the model has buffers or writes into its parameters. Memory:
    that of inference, and one perturbed parameter at a time. Ranks exchange K floats. A direction is redrawn at every
    use of a parameter, so a recurrent layer in a loop draws it at every time step.

    A step can be repeated without the loss or the data, from its K directional derivatives and the generator's state:
    see `replay`.

    Args:
        tangents: law of the directions, drawn parameter by parameter.
        num_tangents: K >= 1.
        epsilon: half the distance of the two points, in units of a direction.
        shrinkage: multiply the mean by 1 / (1 + s), see `fgtrain.tangents.combine.Shrinkage`.

    Raises:
        ValueError: an argument is out of its range.

    Source: Malladi, Gao, Nichani, Damian, Lee, Chen, Arora 2023, arXiv:2305.17333, algorithm 1.

    >>> model = torch.nn.ParameterDict({"x": torch.tensor([1.0, 2.0])})
    >>> mezo, seed = MeZO(), lambda: torch.Generator().manual_seed(0)
    >>> estimate = mezo(model, lambda m: m["x"].square().sum(), generator=seed())
    >>> again = mezo.replay(model, estimate.directional_derivatives, seed())
    >>> torch.equal(again["x"], estimate.grads["x"])
    True
    """

    def __init__(
        self, tangents: Tangents | None = None, num_tangents: int = 1, *, epsilon: float = 1e-3, shrinkage: bool = False
    ) -> None:
        super().__init__(law_or(tangents, Normal()), num_tangents, epsilon, shrinkage=shrinkage)

    def lines(self, params: Mapping[str, Tensor], seeds: list[int]) -> Lines:
        return _DrawnAgain(params, seeds, self.tangents)


class _DrawnAgain:
    """Lines along directions that are redrawn from their seeds at every use, one parameter at a time."""

    def __init__(self, params: Mapping[str, Tensor], seeds: list[int], tangents: Tangents) -> None:
        self._params = params
        self._seeds = seeds
        self._tangents = tangents

    def at(self, k: int, distance: float) -> Mapping[str, Tensor]:
        def moved(i: int, p: Tensor) -> Tensor:
            return torch.add(p, self._direction(p, i, self._seeds[k]), alpha=distance)

        return {name: Displaced(p.detach(), moved, i, name) for i, (name, p) in enumerate(self._params.items())}

    @torch.no_grad()
    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        grads = {}
        for i, (name, p) in enumerate(self._params.items()):
            grads[name] = total = torch.zeros_like(p)
            for seed, weight in zip(self._seeds, weights, strict=True):
                total.addcmul_(self._direction(p, i, seed), weight.to(p.dtype))
        return grads

    def _direction(self, p: Tensor, index: int, seed: int) -> Tensor:
        return dense(self._tangents.sample({"": p}, [fold_in(seed, index)])[""])[0]

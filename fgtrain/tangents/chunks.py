"""K directions drawn in chunks, for when not all fit into memory; they are redrawn from their seeds when needed."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from fgtrain.tangents import Tangents
from fgtrain.tangents.directions import Directions


class Chunks:
    """K directions, at most `size` of which are in memory at a time.

    Args:
        tangents: their law.
        params: {name: parameter}, the parameters of the directions.
        seeds: K integers.
        size: number of directions in a chunk.
        rowwise: as in `Tangents.sample`.
    """

    def __init__(
        self, tangents: Tangents, params: Mapping[str, Tensor], seeds: list[int], size: int, *, rowwise: bool
    ) -> None:
        self._seeds = [seeds[start : start + size] for start in range(0, len(seeds), size)]
        self._draw = partial(tangents.sample, params, rowwise=rowwise)
        self._only = self._draw(seeds) if len(self._seeds) == 1 else None

    def __len__(self) -> int:
        return len(self._seeds)

    def __iter__(self) -> Iterator[Directions]:
        return (self._draw(seeds) for seeds in self._seeds) if self._only is None else iter([self._only])

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """As `Directions.weighted_sum` of all directions; may destroy them."""
        if self._only is not None:
            return self._only.weighted_sum(weights, consume=True)
        total: dict[str, Tensor] = {}
        for part, directions in zip(weights.split([len(seeds) for seeds in self._seeds]), self, strict=True):
            for name, block in directions.weighted_sum(part, consume=True).items():
                total[name] = total[name].add_(block) if name in total else block
        return total

    def gram(self) -> Tensor:
        """As `Directions.gram` of all directions."""
        if self._only is not None:
            return self._only.gram()
        return torch.cat([torch.cat([left.gram(right) for right in self], -1) for left in self], -2)

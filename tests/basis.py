"""A complete basis in place of random directions: an unbiased estimate is then the exact gradient up to rounding.

An estimate (1/K) sum_k (g . v_k) v_k is g if (1/K) sum_k v_k v_k^T is the identity. For random directions this holds
only in the mean, so a test needs many draws and misses small errors. For a basis it holds in one call, and a wrong
scale shows in every digit.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fgtrain.layer_noise.layers import perturbed_layers, run_perturbed
from fgtrain.layer_noise.noise import LayerNoise, PerturbedPass
from fgtrain.random import draw_seeds, fold_in
from fgtrain.tangents import Tangents
from fgtrain.tangents.directions import Directions, Piece
from tests.cases import Case


class Basis(Tangents):
    """The unit vectors of all n trainable numbers, times sqrt(K); K = first + n directions are complete.

    The k-th new seed gives direction k (mod K), so chunks and replays get the same directions.

    Args:
        first: number of directions that come first and are 0, because something else, such as noise, takes their place.
        rank: 0 for dense directions; r for a matrix as r equal products (1 / sqrt(r)) sum_a u_a z_a^T.
    """

    def __init__(self, first: int = 0, rank: int = 0) -> None:
        self.first = first
        self.rank = rank
        self._numbers: dict[int, int] = {}

    def sample(self, params: Mapping[str, Tensor], seeds: Sequence[int], *, rowwise: bool = False) -> Directions:
        num_rows = next(iter(params.values())).shape[0] if rowwise else 1
        sizes = [p.numel() // num_rows for p in params.values()]
        num = self.first + sum(sizes)
        numbers = torch.tensor([self._numbers.setdefault(seed, len(self._numbers)) for seed in seeds]) % num
        units = numbers[:, None] - self.first == torch.arange(sum(sizes))
        vectors = units.to(next(iter(params.values())).dtype) * math.sqrt(num)
        if rowwise:
            buffer = vectors[:, None].repeat(1, num_rows, 1)
            return Directions(
                buffer, [Piece(name, p, size) for (name, p), size in zip(params.items(), sizes, strict=True)]
            )
        pieces, blocks = [], []
        for (name, p), block in zip(params.items(), vectors.split(sizes, dim=1), strict=True):
            if self.rank and p.dim() > 1:
                matrices = block.view(len(block), p.shape[0], -1)
                left, right = matrices.sum(2), (matrices != 0).any(1).to(block.dtype)
                factors = [left.repeat(1, self.rank) / math.sqrt(self.rank), right.repeat(1, self.rank)]
            else:
                factors = [block]
            pieces += [Piece(name, p, factor.shape[1], part) for part, factor in enumerate(factors)]
            blocks += factors
        return Directions(torch.cat(blocks, dim=1), pieces, self.rank or 1)

    def relative_variance(self, grads: Mapping[str, Tensor]) -> float:
        """Of one of the n directions, drawn at random."""
        return sum(g.numel() for g in grads.values()) - 1

    def __repr__(self) -> str:
        return f"Basis(rank={self.rank})"


class PartwiseBasis(Tangents):
    """`Basis` for MeZO, which draws direction k of its i-th parameter by itself, from the seed fold_in(seeds[k], i).

    Args:
        case: whose parameters these are.
        draw: seeds the generator that the estimator is given.
    """

    def __init__(self, case: Case, draw: int = 0) -> None:
        self._sizes = [p.numel() for p in case.build().parameters()]
        self.num = sum(self._sizes)
        seeds = draw_seeds(torch.Generator().manual_seed(draw), self.num)
        self._places = {fold_in(seed, i): (k, i) for k, seed in enumerate(seeds) for i in range(len(self._sizes))}

    def sample(self, params: Mapping[str, Tensor], seeds: Sequence[int], *, rowwise: bool = False) -> Directions:
        ((name, p),) = params.items()
        ((k, i),) = (self._places[seed] for seed in seeds)
        vector = math.sqrt(self.num) * torch.eye(self.num, dtype=p.dtype)[k : k + 1]
        return Directions(vector.split(self._sizes, dim=1)[i], [Piece(name, p, p.numel())])

    def relative_variance(self, grads: Mapping[str, Tensor]) -> float:
        return self.num - 1


class Sizes(NamedTuple):
    """The sizes of a complete set of directions.

    Args:
        noise: N, the numbers of noise on layers per direction, over the whole batch.
        others: n, the numbers in the parameters with their own directions.
    """

    noise: int
    others: int


def sizes_of(case: Case) -> Sizes:
    """The sizes for one pass of activity perturbation."""
    model, perturbed = case.build(), PerturbedPass(1, seed=0)
    with torch.random.fork_rng(), torch.no_grad():
        biases = perturbed_layers(model, case.loss).biases
        run_perturbed(model, case.loss, {name: LayerNoise(name, perturbed) for name in biases})
    of_layers = {*biases, *biases.values()}
    return Sizes(perturbed.noise_size, sum(p.numel() for name, p in model.named_parameters() if name not in of_layers))


@contextmanager
def noise_of(given: Tensor) -> Generator[None]:
    """A context in which the noise of one pass is `given`, (K, numbers), layer by layer in the order of the calls."""

    def draw(self: PerturbedPass, output: Tensor, channels: int) -> tuple[Tensor, None]:
        first = self.noise_size
        self.noise_size += output.numel()
        assert self.noise_size <= given.shape[1], "less noise than the pass asks for"
        return given[:, first : self.noise_size].to(output.dtype).view(len(given), *output.shape), None

    with mock.patch.object(PerturbedPass, "draw", draw):
        yield


def complete_noise(sizes: Sizes) -> AbstractContextManager[None]:
    """A context in which the noise is the first part of a basis; `Basis(sizes.noise)` is the second. K is their sum."""
    num = sum(sizes)
    return noise_of(math.sqrt(num) * torch.eye(num, dtype=torch.float64)[:, : sizes.noise])


@contextmanager
def signs(sign: Callable[[int, int], Tensor]) -> Generator[None]:
    """Within it the signs that noise is made of are sign(first, count): numbers first to first + count of the pass."""
    drawn = 0

    def given(shape: list[int], generator: torch.Generator, like: Tensor) -> Tensor:
        nonlocal drawn
        count = math.prod(shape)
        drawn += count
        return sign(drawn - count, count).to(like.dtype).view(shape)

    with mock.patch("fgtrain.layer_noise.noise._signs", given):
        yield


def walsh(row: int, first: int, count: int) -> Tensor:
    """Entries first to first + count of a row of the Hadamard matrix, (-1)^popcount(row & column).

    Over 2^m rows the mean of the product of two different columns below 2^m is 0.
    """
    common = torch.arange(first, first + count) & row
    for shift in (32, 16, 8, 4, 2, 1):
        common = common ^ (common >> shift)
    return 1 - 2 * (common & 1)

"""Random directions: the laws from which the tangents v of a forward gradient are drawn.

A forward gradient (grad f . v) v is unbiased for every law with E[v v^T] = I. Laws differ in the variance and in the
cost of a draw. With n trainable numbers, one tangent and gradient g,

    E ||(g . v) v - g||^2 / ||g||^2  =  n - 1 + excess,

where the excess is 2 for normal entries and 0 for every law with ||v||^2 = n (Rademacher, sphere, coordinate, rank-1
signs). The mean over K tangents divides the whole by K.

Direction k depends only on `seeds[k]`, so tangents can be redrawn from their seeds, in chunks of any size.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fgtrain.errors import ModelError
from fgtrain.tangents.directions import Directions, Piece


class Tangents(ABC):
    """A law of random directions with E[v v^T] = I.

    Attributes:
        isotropic: whether all directions in space are equally likely.
        shardable: whether a rank can compute its own rows of a direction without the others.
    """

    isotropic: bool = False
    shardable: bool = False

    @abstractmethod
    def sample(self, params: Mapping[str, Tensor], seeds: Sequence[int], *, rowwise: bool = False) -> Directions:
        """Draw one direction over all `params` per seed.

        Args:
            params: {name: tensor}, all on one device.
            seeds: K integers; direction k depends only on seeds[k].
            rowwise: draw an independent direction for every index of the parameters' common first dimension.
        """

    @abstractmethod
    def relative_variance(self, grads: Mapping[str, Tensor]) -> float:
        """E ||(g . v) v - g||^2 / ||g||^2 for one direction v, where g is the gradient `grads`.

        If the value depends on g, it is nan for g = 0.
        """

    def bytes_of(self, params: Mapping[str, Tensor]) -> int:
        """Memory of one direction over `params`."""
        return sum(p.numel() * p.element_size() for p in params.values())


def law_or(tangents: Tangents | None, default: Tangents) -> Tangents:
    """`tangents`, or `default` if it is None.

    Raises:
        ValueError: `tangents` is not a law.
    """
    if tangents is None:
        return default
    if not isinstance(tangents, Tangents):
        raise ValueError(f"tangents must be a law of directions such as {default!r}, got {tangents!r}")
    return tangents


class _DenseLaw(Tangents):
    """A law over all trainable numbers as one vector."""

    excess: float

    @abstractmethod
    def fill(self, rows: Tensor, size: int, generator: torch.Generator) -> None:
        """Write an independent direction of `size` numbers into every row of `rows`; the rest of a row is arbitrary.

        Rows are contiguous, and their length is a multiple of 16.
        """

    def sample(self, params: Mapping[str, Tensor], seeds: Sequence[int], *, rowwise: bool = False) -> Directions:
        num_rows = _common_rows(params) if rowwise else 1
        pieces = [Piece(name, p, p.numel() // num_rows) for name, p in params.items()]
        return draw(self, pieces, seeds, num_rows if rowwise else None)

    def relative_variance(self, grads: Mapping[str, Tensor]) -> float:
        return sum(g.numel() for g in grads.values()) - 1 + self.excess

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Normal(_DenseLaw):
    """Independent standard normal entries: the law of Baydin et al. (2022).

    Relative variance: (n + 1) / K.
    Source: Baydin, Pearlmutter, Syme, Wood, Torr 2022, arXiv:2202.08587, section 3.

    >>> sample = Normal().sample({"w": torch.zeros(2, 3)}, seeds=[0, 1])
    >>> sample["w"].shape
    torch.Size([2, 2, 3])
    """

    isotropic = True
    excess = 2.0

    def fill(self, rows: Tensor, size: int, generator: torch.Generator) -> None:
        rows.normal_(generator=generator)


class Rademacher(_DenseLaw):
    """Independent fair signs, +1 or -1: the entrywise law of least kurtosis, so of least variance.

    Relative variance: (n - 1) / K.
    Source: Belouze 2022, arXiv:2209.06302; Shukla and Shin 2023, arXiv:2310.14168.
    """

    excess = 0.0

    def fill(self, rows: Tensor, size: int, generator: torch.Generator) -> None:
        # A random word gives 64 signs: each of its bytes selects the eight signs of its bits from a table.
        num_bytes = rows.numel() // 8
        words = torch.empty(-(-num_bytes // 8), dtype=torch.int64, device=rows.device)
        bits = words.random_(-(2**63), None, generator=generator).view(torch.uint8)[:num_bytes].int()
        torch.index_select(_signs_of_bytes(rows.dtype, rows.device), 0, bits, out=rows.view(-1, 8))


class Sphere(_DenseLaw):
    """Uniform on the sphere of radius sqrt(n).

    Relative variance: (n - 1) / K.
    Source: Belouze 2022, arXiv:2209.06302 (law "circle" of its code).
    """

    isotropic = True
    excess = 0.0

    def fill(self, rows: Tensor, size: int, generator: torch.Generator) -> None:
        rows.normal_(generator=generator)
        rows.mul_(math.sqrt(size) / rows[:, :size].norm(dim=1, keepdim=True))


class Coordinate(_DenseLaw):
    """sqrt(n) times a unit vector along one coordinate, drawn uniformly and with replacement.

    Relative variance: (n - 1) / K.
    Source: Nesterov and Spokoiny 2017 (random coordinate directions); the complete basis is forward-mode AD itself.
    """

    excess = 0.0

    def fill(self, rows: Tensor, size: int, generator: torch.Generator) -> None:
        index = torch.randint(size, (len(rows), 1), generator=generator, device=rows.device)
        rows.zero_().scatter_(1, index, math.sqrt(size))


class LowRank(Tangents):
    """Matrices V = (1 / sqrt(r)) sum_a u_a z_a^T with independent factors; vectors and scalars entrywise.

    A parameter of two or more dimensions is treated as a matrix (shape[0], rest). A direction needs m + n random
    numbers per rank instead of m n, and a linear layer's x V^T is the vector product (x z) u^T: see
    `fgtrain.forward_ad`.

    Relative variance of all layers together, with w_l = ||g_l||^2 / ||g||^2 for the matrices:

        signs:   (n - 1 + sum_l w_l 2 (1 - 1/r)) / K        rank 1 costs nothing over a dense Rademacher
        normal:  (n - 1 + sum_l w_l (2 + 2 (m_l + n_l + 1) / r) + 2 sum over vectors w_l) / K

    Args:
        rank: r >= 1.
        factors: law of the factors' entries.

    Raises:
        ValueError: an argument is out of its range.

    Source: low-rank perturbations in evolution strategies, Sarkar et al. 2025, arXiv:2511.16652 (EGGROLL); here they
    are tangents of an exact directional derivative. Variances: derived here, checked by tests/test_tangents.py.
    """

    shardable = True

    def __init__(self, rank: int = 1, factors: Literal["rademacher", "normal"] = "rademacher") -> None:
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
        if factors not in ("rademacher", "normal"):
            raise ValueError(f"factors must be 'rademacher' or 'normal', got {factors!r}")
        self.rank = rank
        self.factors = factors
        self._law = Rademacher() if factors == "rademacher" else Normal()

    def sample(self, params: Mapping[str, Tensor], seeds: Sequence[int], *, rowwise: bool = False) -> Directions:
        if rowwise:
            if any(p.dim() > 2 for p in params.values()):
                raise ValueError("LowRank has no row-wise form for rows that are matrices; use Rademacher")
            return self._law.sample(params, seeds, rowwise=True)
        pieces = []
        for name, p in params.items():
            if p.dim() > 1:
                pieces += [
                    Piece(name, p, self.rank * p.shape[0]),
                    Piece(name, p, self.rank * math.prod(p.shape[1:]), part=1),
                ]
            else:
                pieces.append(Piece(name, p, p.numel()))
        return draw(self._law, pieces, seeds, rank=self.rank)

    def bytes_of(self, params: Mapping[str, Tensor]) -> int:
        return sum(
            self.rank * (p.shape[0] + math.prod(p.shape[1:])) * p.element_size() if p.dim() > 1 else p.nbytes
            for p in params.values()
        )

    def relative_variance(self, grads: Mapping[str, Tensor]) -> float:
        count, excess, norm = 0, 0.0, 0.0
        for g in grads.values():
            square = float(g.double().square().sum())
            count, norm = count + g.numel(), norm + square
            if g.dim() < 2:
                excess += square * self._law.excess
            elif self.factors == "rademacher":
                excess += square * 2 * (1 - 1 / self.rank)
            else:
                excess += square * (2 + 2 * (g.shape[0] + math.prod(g.shape[1:]) + 1) / self.rank)
        return count - 1 + (excess / norm if norm else math.nan)

    def __repr__(self) -> str:
        return f"LowRank(rank={self.rank}, factors={self.factors!r})"


def draw(
    law: _DenseLaw, pieces: Sequence[Piece], seeds: Sequence[int], num_rows: int | None = None, rank: int = 1
) -> Directions:
    """Draw directions from `law`, one per seed."""
    device, dtype = _common_device_and_dtype([piece.like for piece in pieces])
    # Pieces whose size is a multiple of 16 come first, and rows are padded to one, to align addresses for kernels.
    pieces = [p for p in pieces if p.size % 16 == 0] + [p for p in pieces if p.size % 16]
    total = sum([piece.size for piece in pieces])
    buffer = torch.empty(len(seeds), num_rows or 1, total + -total % 16, dtype=dtype, device=device)
    generator = torch.Generator(device)
    for k, seed in enumerate(seeds):
        law.fill(buffer[k], total, generator.manual_seed(seed))
    return Directions(buffer if num_rows else buffer.squeeze(1), pieces, rank)


def _common_device_and_dtype(params: Sequence[Tensor]) -> tuple[torch.device, torch.dtype]:
    device, dtype = params[0].device, params[0].dtype
    for p in params:
        if p.device != device:
            raise ModelError(
                f"the trainable parameters must be on one device, got {device} and {p.device}; "
                "move the model with .to()"
            )
        if p.dtype != dtype:
            dtype = torch.promote_types(dtype, p.dtype)
    return device, dtype


def _common_rows(params: Mapping[str, Tensor]) -> int:
    rows = {p.shape[0] if p.dim() else 0 for p in params.values()}
    if len(rows) != 1 or 0 in rows:
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in params.items())
        raise ValueError(f"rowwise needs parameters with one common first dimension, got {shapes}")
    return rows.pop()


@cache
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): row b holds +1 or -1 for each bit of the byte b."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(dtype)

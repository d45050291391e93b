"""Random directions: the laws from which the tangents v of a forward gradient are drawn.

A forward gradient (grad f . v) v is unbiased for every law with E[v v^T] = I. What a law decides is the
variance and what a draw costs. With n trainable numbers, one tangent and gradient g,

    E ||(g . v) v - g||^2 / ||g||^2  =  n - 1 + excess,

where the excess is 2 for normal entries, 0 for every law with ||v||^2 = n (Rademacher, sphere, coordinate, rank-1
signs); the mean over K tangents divides it by K.

K directions for one parameter are a *tangent*: a tensor (K, *p.shape), or a `LowRankTangent` that stands for one.
Direction k is a function of `seeds[k]` alone, so tangents can be drawn again, in any chunks, from their seeds.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankTangent:
    """K directions V_k = sum_a left[k, a] right[k, a]^T for a parameter read as a matrix (shape[0], rest).

    Args:
        left: (K, r, m) with m = shape[0].
        right: (K, r, n) with n = the product of the other dimensions; carries the factor 1 / sqrt(r).
        shape: shape of the parameter.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size

    def dense(self) -> Tensor:
        """The directions written out, (K, *shape)."""
        return torch.einsum("kam,kan->kmn", self.left, self.right).reshape(-1, *self.shape)

    def __len__(self) -> int:
        return len(self.left)


Tangent = Tensor | LowRankTangent


def dense(tangent: Tangent) -> Tensor:
    """(K, *p.shape), whatever the tangent is made of."""
    return tangent if isinstance(tangent, Tensor) else tangent.dense()


class Tangents(ABC):
    """A law of random directions with E[v v^T] = I."""

    @abstractmethod
    def sample(
        self, params: Mapping[str, Tensor], seeds: Sequence[int], *, rowwise: bool = False
    ) -> dict[str, Tangent]:
        """Draw one direction over all `params` per seed.

        Args:
            params: {name: tensor}, all on one device.
            seeds: K integers; direction k depends on seeds[k] alone.
            rowwise: draw an independent direction for every index of the parameters' common first dimension.
        """

    @abstractmethod
    def relative_variance(self, grads: Mapping[str, Tensor]) -> float:
        """E ||(g . v) v - g||^2 / ||g||^2 for one direction v, where g is the gradient `grads`."""


class _DenseLaw(Tangents):
    """A law over all trainable numbers written as one vector."""

    excess: float

    @abstractmethod
    def fill(self, rows: Tensor, generator: torch.Generator) -> None:
        """Write an independent direction into every row of `rows` (R, n)."""

    def sample(
        self, params: Mapping[str, Tensor], seeds: Sequence[int], *, rowwise: bool = False
    ) -> dict[str, Tangent]:
        num_rows = _common_rows(params) if rowwise else 1
        sizes = [p.numel() // num_rows for p in params.values()]
        blocks = _draw(self, sizes, seeds, num_rows, list(params.values()))
        return {name: block.view(-1, *p.shape) for (name, p), block in zip(params.items(), blocks, strict=True)}

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

    excess = 2.0

    def fill(self, rows: Tensor, generator: torch.Generator) -> None:
        rows.normal_(generator=generator)


class Rademacher(_DenseLaw):
    """Independent fair signs, +1 or -1: the entrywise law of least kurtosis, so of least variance.

    Relative variance: (n - 1) / K.
    Source: Belouze 2022, arXiv:2209.06302; Shukla and Shin 2023, arXiv:2310.14168.
    """

    excess = 0.0

    def fill(self, rows: Tensor, generator: torch.Generator) -> None:
        # Sixty-four signs from every random word: each byte picks the eight signs of its bits from a table.
        words = torch.empty(-(-rows.numel() // 64), dtype=torch.int64, device=rows.device)
        words.random_(-(2**63), None, generator=generator)
        byte = words.view(torch.uint8).to(torch.int32)
        signs = _signs_of_bytes(rows.dtype, rows.device).index_select(0, byte).view(-1)
        rows.copy_(signs[: rows.numel()].view(rows.shape))


class Sphere(_DenseLaw):
    """Uniform on the sphere of radius sqrt(n).

    Relative variance: (n - 1) / K.
    Source: Belouze 2022, arXiv:2209.06302 (law "circle" of its code).
    """

    excess = 0.0

    def fill(self, rows: Tensor, generator: torch.Generator) -> None:
        rows.normal_(generator=generator)
        rows.mul_(math.sqrt(rows.shape[1]) / rows.norm(dim=1, keepdim=True))


class Coordinate(_DenseLaw):
    """sqrt(n) times a unit vector along one coordinate, drawn uniformly and with replacement.

    Relative variance: (n - 1) / K.
    Source: Nesterov and Spokoiny 2017 (random coordinate directions); the complete basis is forward-mode AD itself.
    """

    excess = 0.0

    def fill(self, rows: Tensor, generator: torch.Generator) -> None:
        index = torch.randint(rows.shape[1], (len(rows), 1), generator=generator, device=rows.device)
        rows.zero_().scatter_(1, index, math.sqrt(rows.shape[1]))


class LowRank(Tangents):
    """Matrices V = (1 / sqrt(r)) sum_a u_a z_a^T with independent factors; vectors and scalars entrywise.

    A parameter of two or more dimensions is read as a matrix (shape[0], rest). Needs m + n random numbers per rank
    instead of m n, and a linear layer's x V^T is the vector product (x z) u^T: see `fgtrain.forward_ad`.

    Relative variance, all layers together, w_l = ||g_l||^2 / ||g||^2 over the matrices:

        signs:   (n - 1 + sum_l w_l 2 (1 - 1/r)) / K        rank 1 costs nothing over a dense Rademacher
        normal:  (n - 1 + sum_l w_l (2 + 2 (m_l + n_l + 1) / r) + 2 sum over vectors w_l) / K

    Args:
        rank: r >= 1.
        factors: law of the factors' entries.

    Source: low-rank perturbations in evolution strategies, Sarkar et al. 2025, arXiv:2511.16652 (EGGROLL); here they
    are tangents of an exact directional derivative. Variances: derived here, held by tests/test_tangents.py.
    """

    def __init__(self, rank: int = 1, factors: Literal["rademacher", "normal"] = "rademacher") -> None:
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
        if factors not in ("rademacher", "normal"):
            raise ValueError(f"factors must be 'rademacher' or 'normal', got {factors!r}")
        self.rank = rank
        self.factors = factors
        self._law = Rademacher() if factors == "rademacher" else Normal()

    def sample(
        self, params: Mapping[str, Tensor], seeds: Sequence[int], *, rowwise: bool = False
    ) -> dict[str, Tangent]:
        if rowwise:
            if any(p.dim() > 2 for p in params.values()):
                raise ValueError("LowRank has no row-wise form for rows that are matrices; use tangents=rademacher")
            return self._law.sample(params, seeds, rowwise=True)
        sizes = [self.rank * (p.shape[0] + p[0].numel()) if p.dim() > 1 else p.numel() for p in params.values()]
        blocks = _draw(self._law, sizes, seeds, 1, list(params.values()))
        return {
            name: self._factors(block, p.shape) if p.dim() > 1 else block.view(-1, *p.shape)
            for (name, p), block in zip(params.items(), blocks, strict=True)
        }

    def _factors(self, block: Tensor, shape: torch.Size) -> LowRankTangent:
        split = self.rank * shape[0]
        left = block[:, 0, :split].view(len(block), self.rank, shape[0])
        right = block[:, 0, split:].view(len(block), self.rank, -1)
        return LowRankTangent(left, right / math.sqrt(self.rank) if self.rank > 1 else right, shape)

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
                excess += square * (2 + 2 * (g.shape[0] + g[0].numel() + 1) / self.rank)
        return count - 1 + excess / norm

    def __repr__(self) -> str:
        return f"LowRank(rank={self.rank}, factors={self.factors!r})"


def _draw(
    law: _DenseLaw, sizes: Sequence[int], seeds: Sequence[int], num_rows: int, params: Sequence[Tensor]
) -> Iterator[Tensor]:
    """One block (K, num_rows, size) per size, all from one buffer that `law` fills seed by seed."""
    devices = {p.device for p in params}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the trainable parameters must be on one device, got {names}; move the model with .to()")
    device = devices.pop()
    dtype = params[0].dtype
    for p in params[1:]:
        dtype = torch.promote_types(dtype, p.dtype)
    # Blocks of a multiple of 16 numbers first and rows padded to one: matrix kernels want aligned addresses.
    order = sorted(range(len(sizes)), key=lambda i: sizes[i] % 16 != 0)
    total = sum(sizes)
    padded = -(-total // 16) * 16
    flat = torch.empty(len(seeds), num_rows, padded, dtype=dtype, device=device)[..., :total]
    generator = torch.Generator(device)
    for rows, seed in zip(flat, seeds, strict=True):
        law.fill(rows, generator.manual_seed(int(seed)))
    split = dict(zip(order, flat.split([sizes[i] for i in order], dim=-1), strict=True))
    return (split[i].to(p.dtype) for i, p in enumerate(params))


def _common_rows(params: Mapping[str, Tensor]) -> int:
    rows = {p.shape[0] if p.dim() else 0 for p in params.values()}
    if len(rows) != 1 or 0 in rows:
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in params.items())
        raise ValueError(f"rowwise needs parameters with one common first dimension, got {shapes}")
    return rows.pop()


_SIGN_TABLES: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): row b holds +1 or -1 for each bit of the byte b."""
    if (dtype, device) not in _SIGN_TABLES:
        bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
        _SIGN_TABLES[dtype, device] = (2 * bits - 1).to(dtype)
    return _SIGN_TABLES[dtype, device]

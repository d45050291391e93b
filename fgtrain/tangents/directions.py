"""K directions over all parameters of a model, and their weighted sum.

K directions of one parameter are a *tangent*: a tensor (K, *p.shape), or a `LowRankTangent` or `LastTangent` that
represents one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgtrain.network.sharding import from_own_rows, is_sharded, own_rows
from fgtrain.tangents.factored import product


@dataclass(frozen=True, slots=True)
class LowRankTangent:
    """K directions V_k = sum_a u_ka z_ka^T for a parameter treated as a matrix (shape[0], rest).

    Args:
        left: the u, (K r, m) with m = shape[0].
        right: the z, (K r, n) with n = the product of the other dimensions; carries the factor 1 / sqrt(r).
        rank: r.
        shape: shape of the parameter.
    """

    left: Tensor
    right: Tensor
    rank: int
    shape: torch.Size

    @property
    def num(self) -> int:
        """K, the number of directions."""
        return self.left.shape[0] // self.rank

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The u (K, r, m) and the z (K, r, n)."""
        num, rank, (left, right) = self.num, self.rank, (self.left, self.right)
        return left.view(num, rank, left.shape[1]), right.view(num, rank, right.shape[1])

    def dense(self) -> Tensor:
        """The directions as one dense tensor (K, *shape)."""
        left, right = self.factors
        return (left.mT @ right).reshape(self.num, *self.shape)


@dataclass(frozen=True, slots=True)
class LastTangent:
    """K directions of which only the last one moves the parameter.

    Parameters may differ in K: those of the k-th block of a network have k, so that a pass has no more directions in a
    block than move it or an earlier one. In all directions after its last, a parameter does not move.

    Args:
        last: the direction, shaped like the parameter.
        num: K.
    """

    last: Tensor
    num: int

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter."""
        return self.last.shape

    def dense(self) -> Tensor:
        """The directions as one dense tensor (K, *shape)."""
        return padded(self.last.unsqueeze(0), self.num, at_start=True)


Drawn = Tensor | LowRankTangent
Tangent = Drawn | LastTangent


def dense(tangent: Tangent) -> Tensor:
    """The tangent as a dense tensor (K, *p.shape)."""
    return tangent if isinstance(tangent, Tensor) else tangent.dense()


def padded(tangent: Tensor, num: int, *, at_start: bool = False) -> Tensor:
    """The tangent (K, *shape) with directions of zeros at its end, or at its start, as (num, *shape)."""
    if len(tangent) == num:
        return tangent
    zeros = tangent.new_zeros(num - len(tangent), *tangent.shape[1:])
    return torch.cat([zeros, tangent] if at_start else [tangent, zeros])


def num_in(tangent: Tangent) -> int:
    """K, the number of directions of one tangent."""
    return tangent.shape[0] if isinstance(tangent, Tensor) else tangent.num


def num_of(tangents: Mapping[Any, Tangent]) -> int:
    """K, the number of directions; 0 if there are no tangents."""
    return max(map(num_in, tangents.values()), default=0)


def all_dense(tangents: Mapping[str, Tangent]) -> dict[str, Tensor]:
    """The tangents as dense tensors (K, *p.shape) with one K."""
    num = num_of(tangents)
    return {name: padded(dense(tangent), num) for name, tangent in tangents.items()}


def width_of(tangents: Mapping[Any, Any]) -> int | None:
    """The number of directions if the tangents may differ in it, since they are `LastTangent`s; else None."""
    return num_of(tangents) if isinstance(next(iter(tangents.values()), None), LastTangent) else None


class Piece(NamedTuple):
    """A part of the buffer that belongs to one parameter.

    Args:
        name: name of the parameter.
        like: the parameter, for its shape and dtype.
        size: number of elements per direction and row.
        part: 0 for the whole direction or its factor u, 1 for its factor z.
    """

    name: str
    like: Tensor
    size: int
    part: int = 0


class Directions(dict[str, Drawn]):
    """K directions, {parameter name: tangent}, stored in one buffer.

    Args:
        buffer: (K, size), or (K, N, size) for N independent rows of every parameter; elements after the pieces are
            padding.
        pieces: the parts of the buffer, in order. Two pieces of one parameter are the factors of a low-rank direction.
        rank: rank of low-rank directions.
    """

    def __init__(self, buffer: Tensor, pieces: Sequence[Piece], rank: int = 1) -> None:
        self.buffer = buffer
        self.rank = rank
        sizes = [piece.size for piece in pieces]
        self._sizes = [*sizes, buffer.shape[-1] - sum(sizes)]
        self._places: dict[str, list[int]] = {}
        self._likes = {piece.name: piece.like for piece in pieces}
        for i, piece in enumerate(pieces):
            self._places.setdefault(piece.name, []).insert(piece.part, i)  # u before z, whichever comes first
        self._is_dense = len(pieces) == len(self._places)
        blocks = torch.split_with_sizes(buffer, self._sizes, dim=-1)
        super().__init__({name: self._tangent(name, [blocks[i] for i in at]) for name, at in self._places.items()})

    def _tangent(self, name: str, blocks: list[Tensor]) -> Drawn:
        like = self._likes[name]
        if like.dtype != self.buffer.dtype:
            blocks = [block.to(like.dtype) for block in blocks]
        if len(blocks) == 1:
            is_in_shape = like.dim() == 1 and self.buffer.dim() == 2
            return blocks[0] if is_in_shape else blocks[0].view(self.buffer.shape[0], *like.shape)
        if self.rank == 1:
            return LowRankTangent(*blocks, 1, like.shape)
        left, right = (block.reshape(len(block) * self.rank, block.shape[1] // self.rank) for block in blocks)
        return LowRankTangent(left, right / self.rank**0.5, self.rank, like.shape)

    def weighted_sum(self, weights: Tensor, *, consume: bool = False) -> dict[str, Tensor]:
        """{name: sum_k weights[k] v_k}, shaped like the parameters.

        Args:
            weights: (K,), or (K, N) with one per row.
            consume: the directions are no longer needed, so with K = 1 their memory may be reused for the sum.
        """
        weights = weights.to(self.buffer.dtype)
        if self.buffer.shape[0] == 1:
            weight = weights.unsqueeze(-1)
            summed = (self.buffer.mul_(weight) if consume and self._is_dense else self.buffer * weight)[0]
        elif weights.dim() == 1:
            summed = (weights @ self.buffer.flatten(1)).view(self.buffer.shape[1:])
        else:
            summed = torch.einsum("kn,kns->ns", weights, self.buffer)
        blocks, sums = torch.split_with_sizes(summed, self._sizes, dim=-1), {}
        for name, at in self._places.items():
            like, tangent = self._likes[name], self[name]
            if is_sharded(like):
                sums[name] = from_own_rows(_own_part(tangent, weights, own_rows(like)), like)
            elif isinstance(tangent, Tensor):
                block = blocks[at[0]]
                total = block if block.shape == like.shape else block.reshape(like.shape)
                sums[name] = total if total.dtype == like.dtype else total.to(like.dtype)
            else:
                if self.buffer.shape[0] == 1:  # the u of a single direction is weighted already
                    left = blocks[at[0]].view(self.rank, tangent.left.shape[1])
                else:
                    left = _weighted(tangent, weights)
                sums[name] = product(left.to(like.dtype), tangent.right, like.shape)
        return sums

    def gram(self, others: "Directions | None" = None) -> Tensor:
        """Inner products with `others`, by default with these directions: (K, L), or (N, K, L) per row, in float64."""
        others = self if others is None else others
        total: Tensor | None = None
        for name, tangent in self.items():
            other = others[name]
            if isinstance(tangent, LowRankTangent) and isinstance(other, LowRankTangent):
                left, right = (factor.double() for factor in tangent.factors)
                left2, right2 = (factor.double() for factor in other.factors)
                products = torch.einsum("kam,lbm,kan,lbn->kl", left, left2, right, right2)
            else:
                products = self._rows(name) @ others._rows(name).mT
            total = products if total is None else total + products
        assert total is not None
        return total

    def _rows(self, name: str) -> Tensor:
        """The directions of a dense parameter as vectors, (K, size) or (N, K, size), in float64."""
        tangent = self[name]
        assert isinstance(tangent, Tensor)
        if self.buffer.dim() == 3:
            return tangent.double().unsqueeze(-1).flatten(2).transpose(0, 1)
        return tangent.double().unsqueeze(-1).flatten(1)


def unit_directions(params: Mapping[str, Tensor]) -> Directions:
    """The unit direction of each of the n numbers in `params`, as n directions."""
    pieces = [Piece(name, p, p.numel()) for name, p in params.items()]
    like = pieces[0].like
    return Directions(torch.eye(sum(piece.size for piece in pieces), dtype=like.dtype, device=like.device), pieces)


def _own_part(tangent: Drawn, weights: Tensor, rows: slice) -> Tensor:
    """The `rows` of sum_k weights[k] v_k, without the others."""
    if isinstance(tangent, Tensor):
        return torch.einsum("k,k...->...", weights.to(tangent.dtype), tangent[:, rows])
    return _weighted(tangent, weights)[:, rows].t() @ tangent.right


def _weighted(tangent: LowRankTangent, weights: Tensor) -> Tensor:
    per_factor = weights if tangent.rank == 1 else weights.repeat_interleave(tangent.rank)
    return tangent.left * per_factor.unsqueeze(1).to(tangent.left.dtype)

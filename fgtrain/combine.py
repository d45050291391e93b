"""K directions and K directional derivatives into one gradient: g = sum_k c_k v_k.

`mean` takes c = d / K, which is unbiased. `projection` takes c = (V^T V)^-1 d, the orthogonal projection of the true
gradient on the span of the directions: the least error inside the span, biased in length (its mean is about K/n of
the gradient).

Source of the projection: Fluegel, Coquelin, Debus, Streit, Goetz 2024, arXiv:2410.17764.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fgtrain.tangents import Tangent

Combine = Literal["mean", "projection"]


def coefficients(
    combine: Combine, derivatives: Tensor, tangents: Mapping[str, Tangent], *, rowwise: bool = False
) -> Tensor:
    """The weights c of the directions, shaped like `derivatives`: (K,), or (K, N) row by row."""
    if combine == "mean":
        return derivatives / len(derivatives)
    matrix = gram(tangents, rowwise=rowwise)
    d = derivatives.to(matrix.dtype)
    solution = (torch.linalg.pinv(matrix, hermitian=True) @ d.t().reshape(*matrix.shape[:-1], 1)).squeeze(-1)
    return solution.t().to(derivatives.dtype) if rowwise else solution.to(derivatives.dtype)


def weighted_sum(tangent: Tangent, weights: Tensor) -> Tensor:
    """sum_k weights[k] v_k for one parameter; weights (K,), or (K, N) with one per row of the parameter."""
    if not isinstance(tangent, Tensor):
        weighted = tangent.left * weights[:, None, None].to(tangent.left.dtype)
        return (weighted.flatten(0, 1).t() @ tangent.right.flatten(0, 1)).view(tangent.shape)
    weights = weights.to(tangent.dtype)
    if len(tangent) == 1:
        return tangent[0] * weights[0].view(*weights.shape[1:], *[1] * (tangent.dim() - weights.dim()))
    if weights.dim() == 1:
        return (weights @ tangent.flatten(1)).view(tangent.shape[1:])
    return torch.einsum("kn,kn...->n...", weights, tangent)


def gram(tangents: Mapping[str, Tangent], *, rowwise: bool = False) -> Tensor:
    """Inner products of the directions over all parameters, (K, K) or (N, K, K) row by row, in float64."""
    total: Tensor | int = 0
    for tangent in tangents.values():
        if not isinstance(tangent, Tensor):
            left, right = tangent.left.double(), tangent.right.double()
            total = total + torch.einsum("kam,lbm,kan,lbn->kl", left, left, right, right)
        elif rowwise:
            rows = tangent.double().flatten(2).transpose(0, 1)
            total = total + rows @ rows.mT
        else:
            rows = tangent.double().reshape(len(tangent), -1)
            total = total + rows @ rows.mT
    assert isinstance(total, Tensor)
    return total

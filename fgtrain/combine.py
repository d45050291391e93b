"""K directional derivatives into the weights of the directions: g = sum_k c_k v_k.

`mean` takes c = d / K, which is unbiased. `projection` takes c = (V^T V)^-1 d, the orthogonal projection of the true
gradient on the span of the directions: the least error inside the span, biased in length (its mean is about K/n of
the gradient).

Source of the projection: Fluegel, Coquelin, Debus, Streit, Goetz 2024, arXiv:2410.17764.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Combine = Literal["mean", "projection"]


def coefficients(combine: Combine, derivatives: Tensor, gram: Callable[[], Tensor]) -> Tensor:
    """The weights c of the directions, shaped like `derivatives`: (K,), or (K, N) row by row.

    Args:
        combine: "mean" or "projection".
        derivatives: grad f . v_k.
        gram: gives the inner products of the directions, (K, K) or (N, K, K); asked for by "projection" alone.
    """
    if combine == "mean":
        return derivatives / derivatives.shape[0]
    inverse = torch.linalg.pinv(gram(), hermitian=True)  # (K, K) or (N, K, K)
    solution = inverse @ derivatives.to(inverse.dtype).t().unsqueeze(-1)
    return solution.squeeze(-1).t().to(derivatives.dtype)

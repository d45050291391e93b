"""Functions with an infinite slope at a finite argument, such as sqrt at 0.

There backpropagation gives 0 if what comes before has no slope, as in sqrt(relu(x)) for x < 0, since relu drops
the gradient of sqrt. The product of forward mode, infinity times 0, would be nan.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fgtrain.forward_ad.registry import functions_named

_NAMES = """
sqrt rsqrt reciprocal log log2 log10 log1p logit pow __pow__ __rpow__ float_power acos arccos asin arcsin acosh arccosh
atanh arctanh erfinv lgamma digamma atan2 arctan2 hypot xlogy logaddexp2 entr xlog1py ndtri
"""

STEEP = frozenset(functions_named(_NAMES)) | {
    getattr(torch.special, name) for name in _NAMES.split() if hasattr(torch.special, name)
}
"""Elementwise functions of this kind."""


def where_moved(tangent: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """The tangent of an elementwise result, with 0 where no argument moves.

    Args:
        tangent: as the slopes give it.
        sources: the tangents of the arguments.
    """
    return tangent.masked_fill(functools.reduce(torch.logical_and, [t == 0 for t in sources]), 0)

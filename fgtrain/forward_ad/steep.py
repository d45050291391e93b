"""Functions with an infinite slope at a finite argument, such as sqrt at 0.

There backpropagation gives 0 if what comes before has no slope, as in sqrt(relu(x)) for x < 0, since relu drops
the gradient of sqrt. The product of forward mode, infinity times 0, would be nan.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from fgtrain._torch import tree_flatten, tree_unflatten
from fgtrain.forward_ad.lost_derivatives import is_differentiable
from fgtrain.forward_ad.registry import functions_named

_NAMES = """
sqrt rsqrt reciprocal log log2 log10 log1p logit pow __pow__ __rpow__ float_power acos arccos asin arcsin acosh arccosh
atanh arctanh erfinv lgamma digamma atan2 arctan2 hypot xlogy logaddexp2 entr xlog1py ndtri
"""

STEEP = frozenset(functions_named(_NAMES)) | {
    getattr(torch.special, name) for name in _NAMES.split() if hasattr(torch.special, name)
}
"""Elementwise functions of this kind."""

IN_PLACE = {
    getattr(Tensor, f"{name}_"): getattr(Tensor, name)
    for name in _NAMES.split()
    if hasattr(Tensor, name) and hasattr(Tensor, f"{name}_")
}
"""{a method that changes its first argument by a function of this kind: the method that makes a new tensor}."""


def where_moved(tangent: Tensor, source: Tensor) -> Tensor:
    """The tangent of an elementwise result, as the slope gives it, with 0 where the argument with `source` rests."""
    return tangent.masked_fill(source == 0, 0)


def call_steep(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """func(*args, **kwargs) of dual numbers of PyTorch's forward mode, with 0 from every argument where it rests."""
    leaves, spec = tree_flatten((args, kwargs))
    pairs = {i: fwAD.unpack_dual(x) for i, x in enumerate(leaves) if is_differentiable(x)}
    moved = {i: pair for i, pair in pairs.items() if pair.tangent is not None}
    result, tangent = fwAD.unpack_dual(func(*args, **kwargs))  # a graph of its value saves all tangents
    if tangent is None:
        return result
    total = torch.zeros_like(tangent)
    for i, (_, source) in moved.items():
        if len(moved) > 1:
            alone = [moved[j].primal if j in moved and j != i else x for j, x in enumerate(leaves)]
            positional, keywords = tree_unflatten(alone, spec)
            tangent = fwAD.unpack_dual(func(*positional, **keywords)).tangent
        if tangent is not None:
            total = total + where_moved(tangent, source)
    return fwAD.make_dual(result, total)

"""Forward mode by two backward passes, for an operation that only has a derivative in reverse mode.

Autograd's graph of one operation gives the product J^T w of its Jacobian J with any cotangent w. The product is linear
in w, and its own backward pass, along tangents v of the inputs, gives J v. Source: Townsend 2017, "A new trick for
calculating Jacobian vector products".
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fgtrain.agreement import agree
from fgtrain.forward_ad.passes import UnsupportedByEngine

_NOTHING = nullcontext()


def transposed_twice(
    x: Tensor,
    inputs: list[Tensor] | list[GradientEdge],
    tangents: list[Tensor],
    during: AbstractContextManager[Any] = _NOTHING,
) -> Tensor:
    """J v for each of K directions v, (K, *x.shape).

    Args:
        x: a result with a graph.
        inputs: where the graph begins.
        tangents: of the inputs, (K, ..) each.
        during: a context for the backward pass that computes J^T w.

    Raises:
        UnsupportedByEngine: the graph cannot be differentiated twice.
    """
    w = torch.empty_like(x).normal_(generator=torch.Generator(x.device).manual_seed(0)).requires_grad_()
    try:
        with torch.enable_grad():
            with during:
                products = torch.autograd.grad(x, inputs, w, create_graph=True, allow_unused=True)
            pairs = [(g, t) for g, t in zip(products, tangents, strict=True) if g is not None]
            if not pairs:
                return x.new_zeros(len(tangents[0]), *x.shape)
            # One product per direction: in a product of all, the nan of one would reach the others.
            terms = [torch.cat([(g * t[k]).flatten() for g, t in pairs]) for k in range(len(tangents[0]))]
            moved = torch.stack([torch.autograd.grad(term.sum(), w, retain_graph=True)[0] for term in terms])
    except RuntimeError as reason:
        raise UnsupportedByEngine(str(reason)) from reason
    along = torch.stack(terms).detach()
    repeated = (moved * w.detach()).view(len(moved), -1).sum(1)  # (J^T w) . v again, unless a part lost its graph
    found, expected, size = (y.nan_to_num(0, 0, 0) for y in (repeated, along.sum(1), along.abs().sum(1)))
    if not agree(found, expected, size):
        raise UnsupportedByEngine(f"{type(x.grad_fn).__name__} cannot be differentiated twice")
    return moved

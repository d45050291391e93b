"""Forward mode by two backward passes, for operations that have a derivative only in reverse mode.

Autograd's graph of one operation gives the product J^T w of its Jacobian J with any cotangent w. The product is linear
in w, and its own backward pass, along tangents v of the inputs, gives J v. Source: Townsend 2017, "A new trick for
calculating Jacobian vector products".
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fgtrain._torch import tree_map_only
from fgtrain.agreement import agree
from fgtrain.forward_ad.passes import UnsupportedByEngine

_NOTHING = nullcontext()


def run_transposed(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    moving: Mapping[int, tuple[Tensor, Tensor]],
    make_dual: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """The result of a call, whose derivative PyTorch knows in reverse mode.

    Args:
        func: the function.
        args: of the call.
        kwargs: of the call.
        moving: {id of an argument with tangents: (its value, its tangents (K, ..))}.
        make_dual: called with the value of a result and its tangents.

    Raises:
        UnsupportedByEngine: the derivative cannot be differentiated.
    """
    inputs = {key: laid_out(value).detach().requires_grad_() for key, (value, _) in moving.items()}
    tangents = [tangent for _, tangent in moving.values()]
    args, kwargs = tree_map_only(Tensor, lambda x: inputs.get(id(x), x), (args, kwargs))
    with torch.enable_grad():
        found = func(*args, **kwargs)

    def with_tangents(x: Tensor) -> Tensor:
        if x.grad_fn is None:
            return x
        return make_dual(x.detach(), transposed_twice(x, list(inputs.values()), tangents))

    return tree_map_only(Tensor, with_tangents, found)


def laid_out(primal: Tensor) -> Tensor:
    """A copy of an expanded tensor, since autograd requires the tangent in the layout of the value."""
    return primal.contiguous() if 0 in primal.stride() else primal


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
    if x.layout != torch.strided:
        raise UnsupportedByEngine("a sparse tensor has a tangent")
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

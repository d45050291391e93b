"""Derivatives of what a custom autograd.Function without `jvp` computes, from the graph that autograd records of it.

A Function takes duals as leaves of autograd's graph, and its result is a plain tensor with a graph. The graph gives the
product J^T w of its Jacobian J with any cotangent w. The product is linear in w, so its own backward pass, along the
tangents v of the leaves, gives J v (Townsend 2017, "A new trick for calculating Jacobian vector products"). The
derivative is that of `backward`, as in backpropagation: of a straight-through estimator or a surrogate gradient too.

Only the graph between two operations on duals is stored, until the second one has run.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, Function
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from fgtrain._torch import tree_leaves
from fgtrain.agreement import agree
from fgtrain.forward_ad.dual import Dual, dual, num_directions, tangent_of
from fgtrain.forward_ad.passes import UnsupportedByEngine
from fgtrain.forward_ad.running import current
from fgtrain.forward_ad.stale import graph_of
from fgtrain.tangents.directions import padded


def with_derivative(x: Tensor) -> Tensor:
    """The dual of a plain tensor with a graph; other tensors are returned unchanged.

    Raises:
        UnsupportedByEngine: the graph does not determine the derivative: a Function is differentiable only once, has a
            `jvp`, or uses parameters that are not its arguments; or a leaf is not a dual.
    """
    if x.grad_fn is None:
        return x
    known, graph, version = getattr(x, "_with_derivative", (None, None, None))
    if known is None or (graph, version) != (x.grad_fn, x._version):
        known = _dual_of(x)
        setattr(x, "_with_derivative", (known, x.grad_fn, x._version))
    return known


def depends_on_duals(x: Tensor) -> bool:
    """Whether duals are among the leaves of a tensor's graph."""
    return any(isinstance(getattr(node, "variable", None), Dual) for node in graph_of(x, set()))


def _dual_of(x: Tensor) -> Tensor:
    leaves = _leaves(x)
    sources = list(leaves.values())
    if isinstance(x, Dual) or x.is_complex() or any(map(torch.is_complex, sources)):
        raise UnsupportedByEngine(f"{type(x.grad_fn).__name__} was recorded for a backward pass")
    num = max(map(num_directions, sources))
    tangents = [padded(tangent_of(leaf), num) for leaf in sources]
    running, current.running = current.running, None  # in the graph, duals are values
    assert running is not None
    running.has_graphs = True
    try:
        with torch.enable_grad(), _NothingHidden(sources):
            moved = _through(x, [GradientEdge(node, 0) for node in leaves], tangents)
    except RuntimeError as reason:
        raise UnsupportedByEngine(str(reason)) from reason
    finally:
        current.running = running
    return dual(x.detach(), moved, *sources)


def _leaves(x: Tensor) -> Mapping[Any, Dual]:
    """The leaves of a tensor's graph, by their nodes."""
    leaves = {}
    for node in graph_of(x, set()):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Dual):
            leaves[node] = leaf
        elif leaf is not None:
            raise UnsupportedByEngine("a tensor that is not a parameter of the model requires a gradient")
        elif isinstance(node, BackwardCFunction) and type(node)._forward_cls.jvp is not Function.jvp:
            raise UnsupportedByEngine(f"{type(node).__name__} has a jvp")
    return leaves


def _through(x: Tensor, edges: list[GradientEdge], tangents: list[Tensor]) -> Tensor:
    """J v for each direction v in `tangents`, (K, *x.shape)."""
    w = torch.empty_like(x).normal_(generator=torch.Generator(x.device).manual_seed(0)).requires_grad_()
    products = torch.autograd.grad(x, edges, w, create_graph=True, allow_unused=True)
    pairs = [(g, t) for g, t in zip(products, tangents, strict=True) if g is not None]
    if not pairs:
        return x.new_zeros(len(tangents[0]), *x.shape)
    # One product per direction: in a product of all, the nan of one would reach the others.
    terms = [torch.cat([(g * t[k]).flatten() for g, t in pairs]) for k in range(len(tangents[0]))]
    moved = torch.stack([torch.autograd.grad(term.sum(), w, retain_graph=True)[0] for term in terms])
    along = torch.stack(terms).detach()
    repeated = (moved * w.detach()).view(len(moved), -1).sum(1)  # (J^T w) . v again, unless a part lost its graph
    found, expected, size = (y.nan_to_num(0, 0, 0) for y in (repeated, along.sum(1), along.abs().sum(1)))
    if not agree(found, expected, size):
        raise UnsupportedByEngine(f"{type(x.grad_fn).__name__} cannot be differentiated twice")
    return moved


class _NothingHidden(TorchFunctionMode):
    """Refuses parameters that a backward pass uses although they are not leaves of the graph."""

    def __init__(self, leaves: list[Dual]) -> None:
        super().__init__()
        self._leaves = {id(leaf) for leaf in leaves}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            hidden = isinstance(x, Dual) and id(x) not in self._leaves
            if hidden or (isinstance(x, nn.Parameter) and x.requires_grad and not isinstance(x, Dual)):
                raise UnsupportedByEngine("a custom autograd.Function uses parameters that are not its arguments")
        return func(*args, **(kwargs or {}))

"""Plain tensors that require a gradient: results of custom autograd.Functions, and inputs of the model.

A Function takes duals as leaves of autograd's graph and returns a plain tensor with a graph. Without `jvp` it has the
derivative of its `backward`, as in backpropagation, also if it is a straight-through estimator or a surrogate gradient.
`transposed` computes it. Only the graph of one Function is stored, until its result is used.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, Function
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from fgtrain._torch import tree_leaves, tree_map_only
from fgtrain.forward_ad.dual import Dual, dual, num_directions, tangent_of
from fgtrain.forward_ad.passes import UnsupportedByEngine
from fgtrain.forward_ad.running import current
from fgtrain.forward_ad.stale import graph_of, is_stale
from fgtrain.forward_ad.transposed import transposed_twice
from fgtrain.tangents.directions import padded


class RecordedTensors(TorchFunctionMode):
    """A mode in which calls see the duals of the results of custom autograd.Functions, instead of plain tensors.

    In this mode no call can differentiate with respect to an input without notice, so inputs may be constants.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(_may_have_graph, args)) or any(map(_may_have_graph, kwargs.values())):
            args, kwargs = tree_map_only(Tensor, self.dual_of, (args, kwargs))
        return func(*args, **kwargs)

    def dual_of(self, x: Tensor) -> Tensor:
        """The dual of a real tensor whose graph begins at duals; other tensors are returned unchanged.

        Raises:
            UnsupportedByEngine: the graph does not determine the derivative: a Function is differentiable only once,
                has a `jvp`, or uses parameters that are not its arguments.
        """
        if x.grad_fn is None or isinstance(x, Dual) or x.is_complex():
            return x
        known = vars(x)
        if "as_dual" not in known:
            leaves = _leaves(x)
            known["as_dual"] = _dual_of(x, leaves) if leaves else None
        return x if known["as_dual"] is None else known["as_dual"]

    def is_constant(self, x: Tensor) -> bool:
        """Whether a tensor that requires a gradient depends neither on duals nor on parameters."""
        nodes = list(graph_of(x, set()))
        leaves = [node.variable for node in nodes if hasattr(node, "variable")] if nodes else [x]
        may_hide_some = any(isinstance(node, BackwardCFunction) for node in nodes)
        return not may_hide_some and not any(isinstance(y, (Dual, nn.Parameter)) or is_stale(y) for y in leaves)


def _may_have_graph(x: Any) -> bool:
    return x.grad_fn is not None if isinstance(x, Tensor) else isinstance(x, (tuple, list, dict))


def depends_on_duals(x: Tensor) -> bool:
    """Whether duals are among the leaves of a tensor's graph."""
    return any(isinstance(getattr(node, "variable", None), Dual) for node in graph_of(x, set()))


def _dual_of(x: Tensor, leaves: Mapping[Any, Dual]) -> Tensor:
    sources = list(leaves.values())
    if any(map(torch.is_complex, sources)):
        raise UnsupportedByEngine(f"{type(x.grad_fn).__name__} is of complex numbers")
    num = max(map(num_directions, sources))
    tangents = [padded(tangent_of(leaf), num) for leaf in sources]
    running, current.running = current.running, None  # in the graph, duals are values
    try:
        moved = transposed_twice(x, [GradientEdge(node, 0) for node in leaves], tangents, _NothingHidden(sources))
    finally:
        current.running = running
    return dual(x.detach(), moved, *sources)


def _leaves(x: Tensor) -> Mapping[Any, Dual]:
    """The leaves of a tensor's graph, by their nodes; none if one of them is not a dual."""
    leaves = {}
    for node in graph_of(x, set()):
        if isinstance(node, BackwardCFunction) and type(node)._forward_cls.jvp is not Function.jvp:
            raise UnsupportedByEngine(f"{type(node).__name__} has a jvp")
        if hasattr(node, "variable"):
            leaves[node] = node.variable
    return leaves if all(isinstance(leaf, Dual) for leaf in leaves.values()) else {}


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

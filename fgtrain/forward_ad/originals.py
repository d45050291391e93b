"""Parameters that a loss reaches past the model, and tensors that were made of them before the pass."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function

from fgtrain._torch import SET_REQUIRES_GRAD, is_inside_transform
from fgtrain.errors import UnsupportedOperation
from fgtrain.forward_ad.dual import Dual
from fgtrain.forward_ad.stale import graph_of, is_stale, stale_message
from fgtrain.network.as_parameter import is_held_constant, refuse_freezing

SETS_REQUIRES_GRAD = frozenset({torch.Tensor.requires_grad_, SET_REQUIRES_GRAD})
"""The functions that a mode receives when a model freezes or unfreezes a tensor."""


class Originals:
    """The parameters of a model in a pass of PyTorch's forward mode.

    Args:
        params: {name: parameter}.
        duals: {name: what moves in its place}, for the parameters that have a tangent.
    """

    def __init__(self, params: Mapping[str, Tensor], duals: Mapping[str, Tensor]) -> None:
        self._params = params
        self._names = {id(p): name for name, p in params.items()}
        self._duals = duals
        self._clean: set[Any] = set()  # graph nodes that depend on no parameter

    def checked(self, x: Tensor) -> Tensor:
        """`x`, or its dual if it is a parameter that the loss accesses directly, not through the model.

        Raises:
            UnsupportedOperation: it was computed from a parameter outside of this pass.
        """
        if isinstance(x, Dual):
            raise UnsupportedOperation(stale_message(x))
        if is_inside_transform(x) or not x.requires_grad:
            return x
        if id(x) in self._names:
            return self._duals.get(self._names[id(x)], x.detach())
        if is_stale(x) or any(map(self._is_parameter, graph_of(x, self._clean))):
            raise UnsupportedOperation(stale_message(x))
        return x

    def _is_parameter(self, node: Any) -> bool:
        """Whether a node of autograd's graph stands for a parameter, or for what an earlier pass made of some."""
        if isinstance(node, BackwardCFunction) and type(node)._forward_cls.jvp is Function.jvp:
            raise NotImplementedError("forward AD with a custom autograd.Function without jvp that may use parameters")
        leaf = getattr(node, "variable", None)
        return leaf is not None and (id(leaf) in self._names or is_stale(leaf))

    def refuse_freezing(self, x: Tensor, requires_grad: bool = True) -> None:
        """Refuse that `requires_grad` of a parameter or of its dual changes."""
        name = next((name for name, p in self._duals.items() if p is x), self._names.get(id(x)))
        if name is not None and requires_grad != (name in self._duals or is_held_constant(self._params[name])):
            refuse_freezing(name, requires_grad)

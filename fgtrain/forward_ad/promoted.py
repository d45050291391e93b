"""Plain tensors into which duals are written: from then on they, and all tensors that share their memory, are duals.

`out = torch.zeros(n, d); out.index_add_(0, index, h)` gives a plain tensor derivatives, but Python still refers to the
plain one. A mode replaces it by its dual in every later call of the pass. What `out.detach()` returns stays a constant,
though it shares the memory, and so do its views.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fgtrain._torch import tree_leaves, tree_map_only
from fgtrain.forward_ad.dual import Dual, duals_in
from fgtrain.forward_ad.lost_derivatives import is_differentiable
from fgtrain.forward_ad.passes import UnsupportedByEngine


class PromotedTensors(TorchFunctionMode):
    """A mode in which calls see the duals of promoted tensors.

    Memory is promoted, not a tensor, so views made before and after the write are followed too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tangents: dict[int, tuple[Tensor, Tensor]] = {}  # {memory: (a tensor that keeps it, its tangents)}
        self._constants: dict[int, Tensor] = {}  # {id: a tensor with promoted memory but without a derivative}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._tangents:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, self.dual_of, (args, kwargs))
        result = func(*args, **kwargs)
        self._keep_constants(result, args, kwargs)
        return result

    def _keep_constants(self, result: Any, args: Any, kwargs: Any) -> None:
        """Remember the tensors that a call detached, or made under the model's no_grad, from promoted memory."""
        changed = {id(x.primal) for x in duals_in((args, kwargs))}  # in place
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and id(x) not in changed and self.dual_of(x) is not x:
                self._constants[id(x)] = x

    def promote(self, x: Tensor, num_directions: int) -> Dual:
        """Promote `x`, a plain tensor of real or complex numbers, and return its dual; its tangents are 0.

        Raises:
            UnsupportedByEngine: it is detached from memory that is promoted.
        """
        if id(x) in self._constants:
            raise UnsupportedByEngine("a change of a detached tensor, which shares its memory with one that is not")
        memory = x.untyped_storage()
        if memory._cdata not in self._tangents:
            size = memory.nbytes() // x.element_size()
            self._tangents[memory._cdata] = (x, x.new_zeros(num_directions, size))
        return self.dual_of(x)

    def dual_of(self, x: Any) -> Any:
        """`x`, or its dual if its memory is promoted."""
        if isinstance(x, Dual) or not is_differentiable(x) or x.layout != torch.strided or id(x) in self._constants:
            return x
        _, tangents = self._tangents.get(x.untyped_storage()._cdata, (None, None))
        if tangents is None:
            return x
        num, size = tangents.shape
        return Dual(x, tangents.as_strided((num, *x.shape), (size, *x.stride()), x.storage_offset()))

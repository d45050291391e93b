"""Plain tensors into which duals are written: from then on they, and all tensors that share their memory, are duals.

`out = torch.zeros(n, d); out.index_add_(0, index, h)` gives a plain tensor derivatives, but Python still refers to the
plain one. A mode replaces it by its dual in every later call of the pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fgtrain._torch import tree_map_only
from fgtrain.forward_ad.dual import Dual, is_differentiable


class PromotedTensors(TorchFunctionMode):
    """A mode in which calls see the duals of promoted tensors.

    Memory is promoted, not a tensor, so views made before and after the write are followed too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tangents: dict[int, tuple[Tensor, Tensor]] = {}  # {memory: (a tensor that keeps it, its tangents)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._tangents:
            args, kwargs = tree_map_only(Tensor, self.dual_of, (args, kwargs))
        return func(*args, **kwargs)

    def promote(self, x: Tensor, num_directions: int) -> Dual:
        """Promote `x`, a plain tensor of real or complex numbers, and return its dual; its tangents are 0."""
        memory = x.untyped_storage()
        if memory._cdata not in self._tangents:
            size = memory.nbytes() // x.element_size()
            self._tangents[memory._cdata] = (x, x.new_zeros(num_directions, size))
        return self.dual_of(x)

    def dual_of(self, x: Any) -> Any:
        """`x`, or its dual if its memory is promoted."""
        if isinstance(x, Dual) or not is_differentiable(x) or x.layout != torch.strided:
            return x
        _, tangents = self._tangents.get(x.untyped_storage()._cdata, (None, None))
        if tangents is None:
            return x
        num, size = tangents.shape
        return Dual(x, tangents.as_strided((num, *x.shape), (size, *x.stride()), x.storage_offset()))

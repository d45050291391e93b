"""Parameters that have another value while an operation uses them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fgtrain._torch import outside_transforms, plain_tensors, tree_map
from fgtrain.network.as_parameter import KeepsFlag


class Displaced(KeepsFlag, Tensor):  # ty: ignore[lost-keyword-for-regular-parameter] - torch's stub errs
    """Stands for moved(index, p), which is computed at every use and then freed.

    Args:
        p: the original tensor, unchanged.
        moved: maps (index, p) to the value that operations use.
        index: the index of this tensor.
        name: the name of the parameter p.
    """

    trained = True

    _value: Callable[[], Tensor]

    @staticmethod
    def __new__(cls: type, p: Tensor, moved: Callable[[int, Tensor], Tensor], index: int, name: str) -> "Displaced":
        make: Any = torch.Tensor._make_wrapper_subclass
        return make(cls, p.shape, strides=p.stride(), dtype=p.dtype, device=p.device)

    def __init__(self, p: Tensor, moved: Callable[[int, Tensor], Tensor], index: int, name: str) -> None:
        def value() -> Tensor:
            with outside_transforms():
                return moved(index, p)

        self._value = value
        self.param_name = name

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with plain_tensors():
            if func in _OF_THE_OUTSIDE:
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map(_value, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod  # torch's stub and its callers differ in the order of parameters
    def __torch_dispatch__(  # ty: ignore[incompatible-method-override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _value(x: Any) -> Any:
    return x._value() if isinstance(x, Displaced) else x


# These do not depend on the moved value; drawing a direction just to read a shape would be expensive.
_OF_THE_OUTSIDE = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_cuda", "layout")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point}

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

    Attributes:
        was_changed: whether a value may have been changed in place, which has no effect on p.
    """

    trained = True
    was_changed = False

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
        return _call(func, args, kwargs or {})

    @classmethod  # torch's stub and its callers differ in the order of parameters
    def __torch_dispatch__(  # ty: ignore[incompatible-method-override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    used: list[tuple[Displaced, Tensor]] = []

    def value(x: Any) -> Any:
        if not isinstance(x, Displaced):
            return x
        used.append((x, x._value()))
        return used[-1][1]

    with plain_tensors():
        args, kwargs = tree_map(value, (args, kwargs))
    result = func(*args, **kwargs)
    for x, now in used:
        x.was_changed |= now._version > 0
    return result


def is_changed(x: Tensor) -> bool:
    """Whether a pass has changed a tensor in place that was made for it."""
    return x.was_changed if isinstance(x, Displaced) else x._version > 0


# These do not depend on the moved value; drawing a direction just to read a shape would be expensive.
_OF_THE_OUTSIDE = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_cuda", "layout")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point}

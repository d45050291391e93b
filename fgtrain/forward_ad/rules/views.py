"""Short rules that apply the commonest views and sums to all K tangents at once.

The rules of `fgtrain.forward_ad.rules.operations` apply a function to one direction at a time. Here a dimension d >= 0
of the value is the dimension d + 1 of the tangents (K, *shape), so one call does the same for all directions. In other
cases, such as dimensions given by name or a change of the dtype, the general rule runs.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fgtrain.forward_ad.dual import Dual, dual
from fgtrain.forward_ad.registry import SHORT, functions_named
from fgtrain.forward_ad.rules.arithmetic import aligned
from fgtrain.forward_ad.rules.short import dual_part

Moved = Callable[..., Any]
"""Maps the function, the tangents (K, *shape), the new value and the other arguments to the new tangents."""


def _register(names: str, moved: Moved, *, may_copy: bool = False) -> None:
    """Make `moved` the short rule of these functions.

    Args:
        names: their names.
        moved: see `Moved`.
        may_copy: whether a function may return a view of the value but a copy of the tangents, or the reverse.
    """
    SHORT.update({func: _short(func, moved, may_copy) for func in functions_named(names)})


def _short(func: Any, moved: Moved, may_copy: bool) -> Any:
    def short(running: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        part = dual_part(args[0], running) if args and not kwargs else None
        sizes = args[1:]
        if part is None or not part[0].dim() or not all(map(_is_size, sizes)):
            return NotImplemented
        value = func(part[0], *sizes)
        tangents = moved(func, part[1], value, *sizes)
        if may_copy:
            return dual(value, tangents, args[0])
        return Dual(value, tangents) if isinstance(value, Tensor) else tuple(map(Dual, value, tangents))

    return short


def _is_size(x: Any) -> bool:
    """Whether x is an integer or a sequence of integers."""
    return isinstance(x, int) or (isinstance(x, (tuple, list)) and all(isinstance(n, int) for n in x))


def _shifted(dim: int) -> int:
    return dim + 1 if dim >= 0 else dim


def _same_order(_: Any, tangents: Tensor, value: Tensor, *__: Any) -> Tensor:
    """For functions that change the shape, but not the order of the elements."""
    return tangents.reshape(tangents.shape[0], *value.shape)


def _expanded(_: Any, tangents: Tensor, value: Tensor, *__: Any) -> Tensor:
    return aligned(tangents, value.dim()).expand(-1, *value.shape)


def _transposed(_: Any, tangents: Tensor, __: Tensor, first: int, second: int) -> Tensor:
    return tangents.transpose(_shifted(first), _shifted(second))


def _permuted(_: Any, tangents: Tensor, __: Tensor, *dims: Any) -> Tensor:
    dims = dims[0] if isinstance(dims[0], (tuple, list)) else dims
    return tangents.permute(0, *map(_shifted, dims))


def _along_first(func: Any, tangents: Tensor, _: Any, dim: int = 0, *rest: Any) -> Any:
    """For functions whose first argument is the dimension."""
    return func(tangents, _shifted(dim), *rest)


def _along_second(func: Any, tangents: Tensor, _: Any, sizes: Any, dim: int = 0) -> Any:
    """For functions whose second argument is the dimension."""
    return func(tangents, sizes, _shifted(dim))


def _reduced(func: Any, tangents: Tensor, _: Tensor, *args: Any) -> Tensor:
    dims, *keepdim = args or (range(tangents.dim() - 1),)
    dims = [dims] if isinstance(dims, int) else dims or range(tangents.dim() - 1)
    return func(tangents, [*map(_shifted, dims)], *keepdim)


_register("unsqueeze squeeze", _same_order)
_register("reshape flatten unflatten view ravel", _same_order, may_copy=True)
_register("expand", _expanded)
_register("transpose swapaxes swapdims", _transposed)
_register("permute", _permuted)
_register("unbind select narrow", _along_first)
_register("chunk split split_with_sizes", _along_second)
_register("sum mean", _reduced)

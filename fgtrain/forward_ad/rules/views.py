"""Rules that apply the commonest views and sums to all K tangents at once.

The rules of `fgtrain.forward_ad.rules.operations` apply a function to one direction at a time. Here a dimension d >= 0
of the value is the dimension d + 1 of the tangents (K, *shape), so one call does the same for all directions. In other
cases, such as dimensions given by name or a change of the dtype, the general rule runs.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fgtrain.forward_ad.dual import Dual, tangent_of
from fgtrain.forward_ad.registry import RULES, functions_named
from fgtrain.forward_ad.rules.arithmetic import aligned
from fgtrain.forward_ad.rules.operations import zip_duals

Stacked = Callable[..., Any]
"""Maps the function, the tangents (K, *shape), the new value and the other arguments to the new tangents, or None."""


def _register(names: str, stacked: Stacked) -> None:
    RULES.update({func: _rule(func, stacked, RULES[func]) for func in functions_named(names)})


def _rule(func: Any, stacked: Stacked, general: Any) -> Any:
    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and isinstance(x, Dual) and x.dim() and all(map(_is_size, args)):
            primal = func(x.primal, *args)
            moved = stacked(func, tangent_of(x), primal, *args)
            if moved is not None:
                return zip_duals(primal, moved, [x])
        return general(x, *args, **kwargs)

    return rule


def _is_size(x: Any) -> bool:
    """Whether x is an integer or a sequence of integers."""
    return isinstance(x, int) or (isinstance(x, (tuple, list)) and all(isinstance(n, int) for n in x))


def _shifted(dim: int) -> int:
    return dim + 1 if dim >= 0 else dim


def _same_order(_: Any, tangent: Tensor, primal: Tensor, *__: Any) -> Tensor:
    """For functions that change the shape, but not the order of the elements."""
    return tangent.reshape(tangent.shape[0], *primal.shape)


def _expanded(_: Any, tangent: Tensor, primal: Tensor, *__: Any) -> Tensor:
    return aligned(tangent, primal.dim()).expand(-1, *primal.shape)


def _transposed(_: Any, tangent: Tensor, __: Tensor, first: int, second: int) -> Tensor:
    return tangent.transpose(_shifted(first), _shifted(second))


def _permuted(_: Any, tangent: Tensor, __: Tensor, *dims: Any) -> Tensor:
    dims = dims[0] if isinstance(dims[0], (tuple, list)) else dims
    return tangent.permute(0, *map(_shifted, dims))


def _along_first(func: Any, tangent: Tensor, _: Any, dim: int = 0, *rest: Any) -> Any:
    """For functions whose first argument is the dimension."""
    return func(tangent, _shifted(dim), *rest)


def _along_second(func: Any, tangent: Tensor, _: Any, sizes: Any, dim: int = 0) -> Any:
    """For functions whose second argument is the dimension."""
    return func(tangent, sizes, _shifted(dim))


def _reduced(func: Any, tangent: Tensor, _: Tensor, *args: Any) -> Tensor | None:
    dims, *keepdim = args or (range(tangent.dim() - 1),)
    dims = [dims] if isinstance(dims, int) else dims or range(tangent.dim() - 1)
    return func(tangent, [*map(_shifted, dims)], *keepdim)


_register("reshape flatten unflatten unsqueeze squeeze view ravel", _same_order)
_register("expand", _expanded)
_register("transpose swapaxes swapdims", _transposed)
_register("permute", _permuted)
_register("unbind select narrow", _along_first)
_register("chunk split split_with_sizes", _along_second)
_register("sum mean", _reduced)

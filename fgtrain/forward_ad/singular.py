"""Functions with an infinite slope or curvature at a finite argument, for forward mode over forward mode.

There a term infinity times 0 would be nan, as of sqrt(relu(x)) for x < 0. As in `steep`, it is 0 where the argument
rests.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fgtrain._torch import tree_flatten, tree_unflatten
from fgtrain.forward_ad.lost_derivatives import is_differentiable
from fgtrain.forward_ad.rules.compositions import change_of
from fgtrain.forward_ad.steep import IN_PLACE, STEEP

_REGULAR = {"acosh": 2.0, "arccosh": 2.0}
"""Arguments at which a function is smooth, if they are not 0.5."""


def singular(func: Any) -> Callable[..., Any] | None:
    """A composition of an elementwise function, which is NotImplemented if no argument is singular; None if none is."""
    if func in IN_PLACE:

        def in_place(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = _composed(IN_PLACE[func], x, *args, **kwargs)
            return result if result is NotImplemented else x.copy_(result)

        return in_place
    return None if func not in STEEP else lambda *args, **kwargs: _composed(func, *args, **kwargs)


def _composed(func: Any, *args: Any, **kwargs: Any) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [i for i, x in enumerate(leaves) if is_differentiable(x)]
    if any(leaves[i].is_complex() for i in tensors) or "out" in kwargs or _is_natural_power(func, args):
        return NotImplemented

    def called(*xs: Tensor) -> Tensor:
        placed = dict(zip(tensors, xs, strict=True))
        positional, keywords = tree_unflatten([placed.get(i, x) for i, x in enumerate(leaves)], spec)
        return func(*positional, **keywords)

    at = [leaves[i].detach() for i in tensors]
    derivatives = [_derivatives_along(called, at, k) for k in range(len(at))]
    bad = ~torch.stack([d for pair in derivatives for d in pair]).isfinite().all(0)
    if not bad.any():
        return NotImplemented
    regular = _REGULAR.get(func.__name__, 0.5)
    total = called(*at)
    for i, (slope, curvature) in zip(tensors, derivatives, strict=True):
        change = change_of(leaves[i])
        total = total + _times(slope, change) + _times(curvature, change * change) / 2
    return torch.where(bad, total, called(*(torch.where(bad, regular, leaves[i]) for i in tensors)))


def _is_natural_power(func: Any, args: tuple[Any, ...]) -> bool:
    return "pow" in func.__name__ and len(args) == 2 and type(args[1]) is int and args[1] >= 0


def _derivatives_along(func: Any, at: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The first and the second derivative of an elementwise function in argument k."""
    jvp: Any = torch.func.jvp

    def slope(x: Tensor) -> Tensor:
        return jvp(lambda x: func(*at[:k], x, *at[k + 1 :]), (x,), (torch.ones_like(x),))[1]

    return jvp(slope, (at[k],), (torch.ones_like(at[k]),))


def _times(factor: Tensor, change: Tensor) -> Tensor:
    """factor * change, where the change is 0 and has derivatives; an infinite factor keeps derivatives of 0."""
    large = torch.finfo(factor.dtype).max
    return (
        factor.nan_to_num(large, large, -large)
        * change
        * torch.where(factor.isfinite(), torch.ones_like(factor), large)
    )

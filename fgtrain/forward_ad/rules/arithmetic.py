"""Rules for sums, differences, products and quotients of two tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fgtrain.forward_ad.dual import dual, primal_of, tangent_of
from fgtrain.forward_ad.registry import register


def aligned(tangent: Any, ndim: int) -> Any:
    """The tangent with `ndim` dimensions after K, to be added to or multiplied with a value of `ndim` dimensions."""
    if tangent is None or tangent.dim() == ndim + 1:
        return tangent
    return tangent.reshape(tangent.shape[0], *[1] * (ndim + 1 - tangent.dim()), *tangent.shape[1:])


def each(push: Callable[[Tensor], Tensor], tangents: Tensor) -> Tensor:
    """push(v_1), .., push(v_K) as one tensor."""
    return stacked([push(tangent) for tangent in tangents.unbind()])


def stacked(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """torch.stack, without a copy if there is only one tensor."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


@register("add __add__ __radd__")
def _add(x: Any, y: Any, *, alpha: float = 1) -> Any:
    return _sum(torch.add(primal_of(x), primal_of(y), alpha=alpha), x, y, alpha)


@register("sub __sub__ subtract")
def _sub(x: Any, y: Any, *, alpha: float = 1) -> Any:
    return _sum(torch.sub(primal_of(x), primal_of(y), alpha=alpha), x, y, -alpha)


@register("rsub")
def _rsub(x: Any, y: Any, *, alpha: float = 1) -> Any:
    return _sum(torch.rsub(primal_of(x), primal_of(y), alpha=alpha), y, x, -alpha)


def _sum(primal: Tensor, x: Any, y: Any, scale: float) -> Tensor:
    xt, yt = aligned(tangent_of(x), primal.dim()), aligned(tangent_of(y), primal.dim())
    if xt is None or yt is None:
        # A tangent is copied, since the result may be changed in place.
        return dual(primal, xt.clone() if yt is None else yt * scale)
    return dual(primal, torch.add(xt, yt, alpha=scale))


@register("add_ __iadd__")
def _add_in_place(x: Any, y: Any, *, alpha: float = 1) -> Any:
    xt, yt = tangent_of(x), tangent_of(y)
    if xt is None or yt is None or x.aliased or yt.shape != xt.shape:
        return NotImplemented
    primal_of(x).add_(primal_of(y), alpha=alpha)
    xt.add_(yt, alpha=alpha)
    return x


@register("mul __mul__ __rmul__ multiply")
def _mul(x: Any, y: Any) -> Any:
    px, py = primal_of(x), primal_of(y)
    primal = torch.mul(px, py)
    xt, yt = aligned(tangent_of(x), primal.dim()), aligned(tangent_of(y), primal.dim())
    left, right = (None if xt is None else xt * py), (None if yt is None else yt * px)
    return dual(primal, left if right is None else right if left is None else left + right)


@register("div __truediv__ true_divide divide")
def _div(x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return NotImplemented
    px, py = primal_of(x), primal_of(y)
    primal = torch.div(px, py)
    xt, yt = aligned(tangent_of(x), primal.dim()), aligned(tangent_of(y), primal.dim())
    if yt is None:
        return dual(primal, xt / py)
    return dual(primal, ((0 if xt is None else xt) - primal * yt) / py)

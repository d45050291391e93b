"""Short rules for long chains of small operations, where a call takes longer than its arithmetic.

They need neither to leave grad mode nor to disable overrides, since they see only plain tensors: the values and dense
tangents of duals of the running pass, and constants of the same dtype on the same device. In all other cases they
return NotImplemented, and the general rule runs.
"""

from collections.abc import Callable, Sequence
from types import EllipsisType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain.forward_ad.dual import Dual
from fgtrain.forward_ad.registry import SHORT, register
from fgtrain.forward_ad.rules.arithmetic import aligned
from fgtrain.forward_ad.steep import STEEP, where_moved
from fgtrain.network.as_parameter import AsParameter

Part = tuple[Any, Any]
"""A value, and its tangents (K, *shape) or None."""


def _part(x: Any, running: Any) -> Part | None:
    """The parts of an operand; None if it needs the general rule."""
    kind = type(x)
    if kind is Dual:
        tangent = x.tangent
        if x.of_pass is not running or type(tangent) is not Tensor or tangent.dtype is not x.primal.dtype:
            return None
        return x.primal, tangent
    if kind is float or kind is int:
        return x, None
    is_constant = kind is AsParameter or ((kind is Tensor or kind is nn.Parameter) and not x.requires_grad)
    if is_constant and x.layout is torch.strided:
        return x, None
    return None


def dual_part(x: Any, running: Any) -> tuple[Tensor, Tensor] | None:
    """The value and the tangents of a dual; None if it needs the general rule, or is a constant."""
    part = _part(x, running)
    return None if part is None or part[1] is None else part


def _operands(running: Any, args: Sequence[Any]) -> list[Part] | None:
    """The parts of operands of one dtype and device; None if they need the general rule."""
    parts, first = [], None
    for x in args:
        part = _part(x, running)
        if part is None:
            return None
        value = part[0]
        if isinstance(value, Tensor):
            if first is None:
                first = value
            elif value.dtype is not first.dtype or value.device != first.device:
                return None
        parts.append(part)
    return parts


def _dual(value: Tensor, tangents: Tensor) -> Dual:
    if tangents.shape[1:] != value.shape:
        tangents = tangents.expand(-1, *value.shape).contiguous()
    return Dual(value, tangents)


def _binary(rule: Callable[[Any, Any, Any, Any], Any]) -> Callable[..., Any]:
    """A short rule from one for two values and their tangents, which have as many dimensions as the result."""

    def short(running: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or len(args) != 2:
            return NotImplemented
        operands = _operands(running, args)
        if operands is None:
            return NotImplemented
        (px, xt), (py, yt) = operands
        if isinstance(px, Tensor) and isinstance(py, Tensor) and px.dim() != py.dim():
            ndim = max(px.dim(), py.dim())
            xt, yt = aligned(xt, ndim), aligned(yt, ndim)
        return _dual(*rule(px, py, xt, yt))

    return short


@register("add __add__ __radd__", SHORT)
@_binary
def _add(px: Any, py: Any, xt: Any, yt: Any) -> tuple[Tensor, Tensor]:
    # A tangent is copied, since the result may be changed in place.
    return px + py, xt.clone() if yt is None else yt.clone() if xt is None else xt + yt


def _difference(px: Any, py: Any, xt: Any, yt: Any) -> tuple[Tensor, Tensor]:
    return px - py, xt.clone() if yt is None else yt.neg() if xt is None else xt - yt


register("sub __sub__ subtract", SHORT)(_binary(_difference))
register("rsub __rsub__", SHORT)(_binary(lambda px, py, xt, yt: _difference(py, px, yt, xt)))


@register("mul __mul__ __rmul__ multiply", SHORT)
@_binary
def _mul(px: Any, py: Any, xt: Any, yt: Any) -> tuple[Tensor, Tensor]:
    value = px * py
    if yt is None:
        return value, xt * py
    if xt is None:
        return value, yt * px
    left = xt * py
    if left.shape[1:] == value.shape:
        return value, left.addcmul_(yt, px)
    right = yt * px
    return value, right.addcmul_(xt, py) if right.shape[1:] == value.shape else left + right


@register("div __truediv__ true_divide divide", SHORT)
@_binary
def _div(px: Any, py: Any, xt: Any, yt: Any) -> tuple[Tensor, Tensor]:
    value = px / py
    if yt is None:
        return value, xt / py
    return value, ((0 if xt is None else xt) - value * yt) / py


def _unary(func: Callable[..., Tensor], slope: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    """A short rule for an elementwise function of real numbers.

    Args:
        func: the function.
        slope: its derivative, from the argument and the value.
    """

    def short(running: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        part = dual_part(args[0], running) if len(args) == 1 and not kwargs else None
        if part is None or part[0].is_complex():
            return NotImplemented
        value = func(part[0])
        tangent = part[1] * slope(part[0], value)
        return Dual(value, where_moved(tangent, part[1]) if func in STEEP else tangent)

    return short


_SLOPES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "neg": lambda *_: -1,
    "__neg__": lambda *_: -1,
    "exp": lambda _, y: y,
    "log": lambda x, _: x.reciprocal(),
    "sin": lambda x, _: x.cos(),
    "cos": lambda x, _: x.sin().neg(),
    "tanh": lambda _, y: 1 - y * y,
    "sigmoid": lambda _, y: y * (1 - y),
    "sqrt": lambda _, y: 0.5 / y,
    "square": lambda x, _: 2 * x,
}
for _name, _slope in _SLOPES.items():
    register(_name, SHORT)(_unary(getattr(torch, _name.strip("_")), _slope))


@register("pow __pow__", SHORT)
def _pow(running: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A power with a constant exponent of at least 1."""
    part = dual_part(args[0], running) if len(args) == 2 and not kwargs else None
    if part is None or type(args[1]) not in (int, float) or args[1] < 1 or part[0].is_complex():
        return NotImplemented
    (x, tangents), n = part, args[1]
    return Dual(x**n, tangents * (n * x ** (n - 1)))


@register("__getitem__", SHORT)
def _get_item(running: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """By numbers and slices."""
    part, index = dual_part(args[0], running), args[1] if type(args[1]) is tuple else (args[1],)
    if part is None or not all(type(i) in (int, slice, NoneType, EllipsisType) for i in index):
        return NotImplemented
    return Dual(part[0][index], part[1][(slice(None), *index)])


def _joined(func: Callable[..., Tensor]) -> Callable[..., Any]:
    """A short rule for stack or cat of tensors with as many dimensions, some of them constant."""

    def short(running: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors, *dims = *args, *kwargs.values()
        if kwargs.keys() - {"dim"} or len(dims) > 1 or not isinstance(tensors, (tuple, list)):
            return NotImplemented
        parts = _operands(running, tensors)
        if parts is None or any(p.dim() != parts[0][0].dim() for p, _ in parts):
            return NotImplemented
        dim = dims[0] if dims else 0
        num = next(len(t) for _, t in parts if t is not None)
        tangents = [p.new_zeros(()).expand(num, *p.shape) if t is None else t for p, t in parts]
        return Dual(func([p for p, _ in parts], dim), func(tangents, dim + 1 if dim >= 0 else dim))

    return short


register("stack", SHORT)(_joined(torch.stack))
register("cat concat", SHORT)(_joined(torch.cat))


@register("matmul __matmul__ mm mv", SHORT)
def _matmul(running: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product of matrices, of a matrix and a vector, or of two vectors."""
    operands = _operands(running, args) if len(args) == 2 and not kwargs else None
    if operands is None:
        return NotImplemented
    (px, xt), (py, yt) = operands
    if not (0 < px.dim() < 3 and 0 < py.dim() < 3) or torch.is_autocast_enabled(px.device.type):
        return NotImplemented
    value, total = px @ py, None if xt is None else xt @ py
    if yt is not None:
        term = px @ yt if py.dim() == 2 else yt @ px.mT if px.dim() == 2 else yt @ px
        return Dual(value, term if total is None else total + term)
    assert total is not None
    return Dual(value, total)

"""Fallbacks for functions without a rule: reading values, changes in place, functions implemented in Python."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from fgtrain._torch import REQUIRES_GRAD, SET_DATA, SET_REQUIRES_GRAD, tree_leaves
from fgtrain.forward_ad.dual import Dual, call, num_directions, primal_of, promoted, tangent_of, values
from fgtrain.forward_ad.lost_derivatives import is_differentiable, only_reads
from fgtrain.forward_ad.passes import UnsupportedByEngine
from fgtrain.forward_ad.registry import FALLBACKS, Fallback, Rule, functions_named
from fgtrain.forward_ad.rules.arithmetic import aligned
from fgtrain.forward_ad.rules.compositions import no_backward
from fgtrain.forward_ad.rules.opened import opened
from fgtrain.forward_ad.rules.per_direction import per_direction
from fgtrain.network.as_parameter import refuse_freezing, set_data


def find_fallback(func: Any) -> Fallback:
    """The fallback of a function of PyTorch without a rule."""
    name = getattr(func, "__name__", "")
    if func in _OF_A_BACKWARD_PASS:
        return Fallback(_OF_A_BACKWARD_PASS[func])
    if only_reads(func):
        return Fallback(_reading(func), reads=True)
    if name == "__set__" and func.__self__.__name__ != "grad":
        return Fallback(_refused_property(func.__self__.__name__))
    if name == "__setitem__":
        return Fallback(_set_item, writes=True)
    if name.endswith("_") and not name.startswith("_") and not name.endswith("__"):
        return Fallback(_in_place(name), writes=True)
    if name.startswith("__i") and name.endswith("__") and hasattr(torch.Tensor, f"{name[3:-2]}_"):
        return Fallback(_in_place(f"{name[3:-2]}_"), writes=True)
    body = opened(func)
    return Fallback(per_direction(func)) if body is None else Fallback(body, is_opened=True)


FALLBACKS.find = find_fallback


def _requires_grad(x: Any, requires_grad: bool = True) -> Any:
    if requires_grad:
        return x
    if x.param_name:
        refuse_freezing(x.param_name, requires_grad)
    raise UnsupportedByEngine("requires_grad_(False)")


def _set_data(x: Any, value: Any) -> None:
    if not isinstance(x, Dual) or not x.param_name:
        raise UnsupportedByEngine("an assignment to .data of a tensor")
    set_data(x.primal, primal_of(value))


def _derivative(*_: Any, **__: Any) -> Any:
    """Refuse to differentiate a dual, which has no graph; the reference engine may be able to."""
    raise NotImplementedError("forward AD with a derivative with respect to an intermediate result that is a dual")


# With these a model checks, prepares or runs a backward pass; it must behave as if there were one.
_OF_A_BACKWARD_PASS: dict[Any, Rule] = {
    REQUIRES_GRAD: lambda _: True,
    Tensor.requires_grad_: _requires_grad,
    SET_REQUIRES_GRAD: _requires_grad,
    SET_DATA: _set_data,
    Tensor.register_hook: no_backward,
    Tensor.retain_grad: no_backward,
    Tensor.backward: _derivative,
    torch.autograd.grad: _derivative,
}


def _refused_property(name: str) -> Rule:
    def rule(*_: Any) -> NoReturn:
        raise UnsupportedByEngine(f"an assignment to .{name} of a tensor")

    return rule


def _reading(func: Any) -> Rule:
    def rule(*args: Any, **kwargs: Any) -> Any:
        return func(*map(primal_of, args), **{name: primal_of(x) for name, x in kwargs.items()})

    return rule


# --- changes in place ---------------------------------------------------------------------------------------------


def _target(x: Any, name: str, *sources: Any) -> tuple[Dual, Tensor, Tensor]:
    """The argument that is changed in place, as a dual, with its value and its tangents."""
    if not isinstance(x, Dual):
        x = promoted(primal_of(x), name, num_directions(*tree_leaves(sources)))
    if x.aliased:
        raise UnsupportedByEngine(f"{name} changes memory that other tensors share")
    tangent = tangent_of(x)
    return x, primal_of(x), tangent


_FILLS = frozenset(
    ["zero_", "normal_", "uniform_", "bernoulli_", "exponential_", "random_", "log_normal_", "cauchy_", "geometric_"]
)
"""Changes in place after which a tensor is a constant."""


def _in_place(name: str) -> Rule:
    """A rule for `name`, such as add_: compute the out-of-place result and copy it into the argument's memory."""
    outside = next(iter(functions_named(name[:-1])), None)

    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_differentiable(x):
            return getattr(x, name)(*values(args), **values(kwargs))
        x, primal, tangent = _target(x, name, args, kwargs)
        if name in _FILLS:
            getattr(primal, name)(*values(args), **values(kwargs))
            tangent.zero_()
            return x
        if name in ("copy_", "fill_"):
            result = args[0] if args else kwargs.get("value", kwargs.get("src"))
        elif outside is None:
            raise UnsupportedByEngine(f"{name} has no out-of-place form")
        else:
            with torch.enable_grad():
                result = call(outside, (x, *args), kwargs)
        moved = tangent_of(result)
        tangent.zero_() if moved is None else tangent.copy_(aligned(moved, primal.dim()))
        value = primal_of(result)
        primal.copy_(value) if isinstance(value, Tensor) else primal.fill_(value)
        return x

    return rule


def _set_item(x: Any, index: Any, value: Any) -> None:
    if not is_differentiable(x):
        x[values(index)] = values(value)
        return
    _, primal, tangent = _target(x, "x[...] = y", value)
    index, moved = values(index), tangent_of(value)
    primal[index] = primal_of(value)
    for k in range(tangent.shape[0]):
        tangent[k][index] = 0 if moved is None else moved[k]

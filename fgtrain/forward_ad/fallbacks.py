"""What is done with functions that have no rule: reading values, changes in place, functions written in Python."""

from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fgtrain.forward_ad import kernels
from fgtrain.forward_ad.dual import Dual, Rule, call, per_direction, primal_of, tangent_of, values
from fgtrain.forward_ad.passes import NotIntercepted

READS_THE_VALUE = frozenset(
    """
    size stride dim ndimension numel nelement element_size is_floating_point is_complex is_contiguous data_ptr
    storage_offset get_device item tolist numpy __bool__ __float__ __int__ __index__ __len__ __repr__ __format__
    __contains__ detach eq ne lt le gt ge equal allclose isclose isnan isinf isfinite argmax argmin argsort zeros_like
    ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor bernoulli
    nonzero logical_not logical_and logical_or signbit all any count_nonzero is_nonzero is_tensor is_same_size
    result_type can_cast
    """.split()  # noqa: SIM905 - a list of eighty names reads worse
)
DIFFERENTIABLE_PROPERTIES = frozenset({"T", "mT", "H", "mH", "real", "imag"})
_OWNERS = (torch.Tensor, torch, torch._C._nn)


def find_fallback(func: Any) -> tuple[bool, Rule]:
    """(whether it is a composite, the rule) for a function of PyTorch."""
    name = getattr(func, "__name__", "")
    if func in _OF_A_BACKWARD_PASS:
        return False, _OF_A_BACKWARD_PASS[func]
    if only_reads(func):
        return False, _reading(func)
    if name == "__setitem__":
        return False, _set_item
    if name.endswith("_") and not name.startswith("_") and not name.endswith("__"):
        return False, _in_place(name)
    if name.startswith("__i") and name.endswith("__") and hasattr(torch.Tensor, f"{name[3:-2]}_"):
        return False, _in_place(f"{name[3:-2]}_")
    body = _opened(func)
    return (False, per_direction(func)) if body is None else (True, body)


def _requires_grad(x: Any, requires_grad: bool = True) -> Any:
    if not requires_grad:
        raise NotIntercepted("requires_grad_(False)")
    return x


# Models ask these of tensors that wait for a backward pass, and are to take the way they would take with one.
_OF_A_BACKWARD_PASS: dict[Any, Rule] = {
    kernels.REQUIRES_GRAD: lambda _: True,
    Tensor.requires_grad_: _requires_grad,
    Tensor.register_hook: kernels.no_backward,
    Tensor.retain_grad: kernels.no_backward,
}


def only_reads(func: Any) -> bool:
    """Whether a function of PyTorch takes nothing from its arguments that could be differentiated."""
    name = getattr(func, "__name__", "")
    return name in READS_THE_VALUE or (name == "__get__" and func.__self__.__name__ not in DIFFERENTIABLE_PROPERTIES)


def _reading(func: Any) -> Rule:
    def rule(*args: Any, **kwargs: Any) -> Any:
        return func(*[primal_of(x) for x in args], **{name: primal_of(x) for name, x in kwargs.items()})

    return rule


# --- changes in place ---------------------------------------------------------------------------------------------


def _target(x: Any, name: str) -> tuple[Tensor, Tensor]:
    """Value and tangents of an argument that may be changed in place."""
    if not isinstance(x, Dual):
        raise NotIntercepted(f"{name} writes into a tensor that has no tangent")
    if x.aliased:
        raise NotIntercepted(f"{name} changes memory that other tensors share")
    tangent = tangent_of(x)
    return primal_of(x), tangent


def _in_place(name: str) -> Rule:
    """name_ as name: the result is computed anew and copied into the argument's own memory."""
    outside = next((getattr(owner, name[:-1]) for owner in _OWNERS if hasattr(owner, name[:-1])), None)

    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        primal, tangent = _target(x, name)
        if name == "zero_":
            result: Any = 0.0
        elif name in ("copy_", "fill_"):
            result = args[0]
        elif outside is None:
            raise NotIntercepted(f"{name} has no form that leaves its argument alone")
        else:
            with torch.enable_grad():
                result = call(outside, (x, *args), kwargs)
        moved = tangent_of(result)
        tangent.zero_() if moved is None else tangent.copy_(moved)
        value = primal_of(result)
        primal.copy_(value) if isinstance(value, Tensor) else primal.fill_(value)
        return x

    return rule


def _set_item(x: Any, index: Any, value: Any) -> None:
    primal, tangent = _target(x, "x[...] = y")
    index, moved = values(index), tangent_of(value)
    primal[index] = primal_of(value)
    for k in range(tangent.shape[0]):
        tangent[k][index] = 0 if moved is None else moved[k]


# --- functions written in Python ----------------------------------------------------------------------------------


def _opened(func: Any) -> Rule | None:
    """A twin of a Python function of torch whose body runs instead of asking for `__torch_function__` again."""
    if not isinstance(func, FunctionType) or not func.__module__.startswith("torch."):
        return None
    inner = getattr(func, "__wrapped__", func)
    if not isinstance(inner, FunctionType):
        return inner
    if inner.__qualname__ == "boolean_dispatch.<locals>.fn":  # its branches name it again
        return None
    if "super" in inner.__code__.co_names:  # a method of the same name, which would come back here
        return None
    never = {name: _never for name in inner.__globals__ if name.startswith("has_torch_function")}
    twin = FunctionType(
        inner.__code__, {**inner.__globals__, **never}, inner.__name__, inner.__defaults__, inner.__closure__
    )
    twin.__kwdefaults__ = inner.__kwdefaults__
    return twin


def _never(*_: Any) -> bool:
    return False

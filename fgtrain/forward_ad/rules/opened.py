"""Functions that PyTorch implements in Python, opened: their bodies run, and the calls in them are handled in turn.

Such a function first checks whether an argument overrides `__torch_function__`. If so, it calls the override with
itself as the function, and its body does not run. There are three ways to run the body.

1. Disable overrides: the calls in the body do not reach the rules either, so derivatives are lost.
2. Reimplement it here: a hundred functions would have to follow every release of PyTorch.
3. Run its own body with a negative answer to that check.

This module does the third. A twin of the function has the same code and the same globals, except that
`has_torch_function` and its variants return False. PyTorch's own function is not changed or patched. If a release
renames the check, tests/test_coverage.py, which opens every such function, fails. The pass is then refused, since the
function calls the override again.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any


@cache
def opened(func: Any) -> Callable[..., Any] | None:
    """A twin of a Python function of torch that runs its body without checking for `__torch_function__`."""
    if not isinstance(func, FunctionType) or not func.__module__.startswith("torch."):
        return None
    inner = getattr(func, "__wrapped__", None)
    if inner is None and not any(name in func.__globals__ for name in func.__code__.co_names if _is_check(name)):
        return None  # another function does the check, and would repeat it, or it is out of reach, as in torch.nn.init
    inner = inner or func
    if not isinstance(inner, FunctionType):
        return inner
    if inner.__qualname__ == "boolean_dispatch.<locals>.fn":  # its branches call it by name
        return None
    if "super" in inner.__code__.co_names:  # a method that would return here
        return None
    never = {name: _never for name in inner.__globals__ if _is_check(name)}
    twin = FunctionType(
        inner.__code__, {**inner.__globals__, **never}, inner.__name__, inner.__defaults__, inner.__closure__
    )
    twin.__kwdefaults__ = inner.__kwdefaults__
    return twin


def _is_check(name: str) -> bool:
    return name.startswith("has_torch_function")


def _never(*_: Any) -> bool:
    return False

"""Functions that PyTorch writes in Python, opened: their bodies run, and the calls in them are looked at in turn.

Such a function begins by asking whether an argument overrides `__torch_function__`, and if so hands itself over whole.
What it does is then its author's secret: nothing can be said of its derivative. Three ways lead inside.
(1) To run it where overrides are off: the calls in its body do not reach the rules either, so derivatives are lost.
(2) To write it anew here: a hundred functions to keep in step with every release of PyTorch.
(3) To run its own body with that one question answered no. This is done here: a twin of the function has the same code
and sees the same module, except that `has_torch_function` and its variants return False. PyTorch's function itself
stays as it is, and nothing is patched. A release that asks by another name is caught by tests/test_coverage.py, which
opens every one of them; until then the pass is refused, since the function hands itself over again.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any


@cache
def opened(func: Any) -> Callable[..., Any] | None:
    """A twin of a Python function of torch whose body runs instead of asking for `__torch_function__` again."""
    if not isinstance(func, FunctionType) or not func.__module__.startswith("torch."):
        return None
    inner = getattr(func, "__wrapped__", None)
    if inner is None and not any(name.startswith("has_torch_function") for name in func.__code__.co_names):
        return None  # another function asks in its name, and would ask again
    inner = inner or func
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

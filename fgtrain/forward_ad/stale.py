"""Tensors that a model stores in its attributes during a pass, and that are stale afterwards.

A forward pass may store a tensor for later use: an attention map for inspection, a bias computed once in eval mode. If
such a tensor depends on the parameters, it loses its derivative at the end of its pass. The model keeps its value with
a mark, and a later pass refuses to use it as a constant.
"""

from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

from torch import Tensor, nn

from fgtrain.network.snapshot import OF_EVERY_MODULE


def is_stale(x: Tensor) -> bool:
    """Whether a tensor was made from parameters in an earlier pass."""
    return getattr(x, "_is_stale", False)


def stale_message(x: Tensor) -> str:
    """The error message for a tensor that was computed from parameters outside of the pass that uses it."""
    return (
        f"the loss uses a tensor of shape {tuple(x.shape)} that was computed from the model's parameters before this "
        "pass, so its derivative is not known; compute it inside loss_fn, or .detach() it if it is a constant"
    )


def graph_of(x: Tensor, seen: set[Any]) -> Iterator[Any]:
    """The nodes of autograd's graph behind a tensor, up to those in `seen`, to which they are added."""
    todo = [x.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [following for following, _ in node.next_functions]


def release(model: nn.Module, replacement: Callable[[Tensor], Tensor | None]) -> None:
    """Remove the derivatives of all tensors in the model's attributes.

    Args:
        model: the model after a pass.
        replacement: maps a tensor with a derivative to what replaces it, and other tensors, which stay, to None.
    """
    for attributes in map(vars, model.modules()):
        for name in attributes.keys() - OF_EVERY_MODULE:
            released = _released(attributes[name], replacement)
            if released is not attributes[name]:
                attributes[name] = released


def _released(held: Any, replacement: Callable[[Tensor], Tensor | None], depth: int = 4) -> Any:
    """`held` with the values of tensors that have a derivative; lists and dictionaries are changed in place."""
    if isinstance(held, Tensor):
        value = replacement(held)
        return held if value is None else value
    if isinstance(held, ref):  # a recurrent layer finds out by weak references whether its weights have changed
        part = held()
        released = _released(part, replacement)
        return held if released is part else ref(released)
    if depth == 0:
        return held
    if isinstance(held, (dict, list)):
        for key, part in list(held.items() if isinstance(held, dict) else enumerate(held)):
            released = _released(part, replacement, depth - 1)
            if released is not part:
                held[key] = released
    elif isinstance(held, tuple):
        parts = [_released(part, replacement, depth - 1) for part in held]
        if any(new is not old for new, old in zip(parts, held, strict=True)):
            return type(held)(*parts) if hasattr(held, "_fields") else tuple(parts)
    return held


def as_stale(value: Tensor) -> Tensor:
    """A value as the model keeps it, marked; it requires a gradient, like a tensor with a graph."""
    stale = value.detach().requires_grad_()
    setattr(stale, "_is_stale", True)
    return stale

"""Attributes that a model sets in its forward pass and keeps.

A forward pass may count its calls, or store a tensor for later use: an attention map for inspection, a bias computed
once in eval mode. A repeated pass must start with the same attributes. A stored tensor that depends on the parameters
loses its derivative at the end of its pass. The model keeps its value with a mark, and a later pass refuses to use it
as a constant.
"""

from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

from torch import Tensor, nn

_OWN = frozenset(vars(nn.Module())) - {"_buffers"}
"""The attributes of every module."""


def is_kept(x: Tensor) -> bool:
    """Whether a tensor was made from parameters in an earlier pass."""
    return getattr(x, "_of_earlier_pass", False)


def of_earlier_pass(x: Tensor) -> str:
    """The error message for a tensor that was computed from parameters outside of the pass that uses it."""
    return (
        f"the loss uses a tensor of shape {tuple(x.shape)} that was computed from the model's parameters before this "
        "pass, so its derivative is not known; compute it inside loss_fn, or .detach() it if it is a constant"
    )


def release(model: nn.Module, replacement: Callable[[Tensor], Tensor | None]) -> None:
    """Remove the derivatives of all tensors in the model's attributes.

    Args:
        model: the model after a pass.
        replacement: maps a tensor with a derivative to what replaces it, and other tensors, which stay, to None.
    """
    for attributes in _attributes_of(model):
        for name in attributes.keys() - _OWN:
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


def marked(value: Tensor) -> Tensor:
    """A value as the model keeps it, marked; it requires a gradient, like a tensor with a graph."""
    kept = value.detach().requires_grad_()
    setattr(kept, "_of_earlier_pass", True)
    return kept


class Attributes:
    """A copy of the attributes of a model's modules, with the contents of their lists, dictionaries and tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (attributes, {name: attributes[name] for name in attributes.keys() - _OWN})
            for attributes in _attributes_of(model)
        ]
        values = [value for _, before in self._before for value in before.values()]
        self._containers = [(x, x.copy()) for x in values if type(x) in (dict, list)]
        self._tensors = [(x, x._version, x.detach().clone()) for x in values if type(x) is Tensor and x.grad_fn is None]

    def restore(self) -> None:
        """Restore the attributes that have changed."""
        for attributes, before in self._before:
            for name in attributes.keys() - _OWN - before.keys():
                del attributes[name]
            for name, value in before.items():
                if attributes.get(name, attributes) is not value:
                    attributes[name] = value
        for container, content in self._containers:
            if not _same(container, content):
                container.clear()
                container.update(content) if isinstance(container, dict) else container.extend(content)
        for x, version, value in self._tensors:
            if x._version != version:
                x.data.copy_(value)


def _same(now: Any, before: Any) -> bool:
    """Whether two lists or dictionaries hold the same objects."""
    if isinstance(now, dict):
        return len(now) == len(before) and all(key in before and before[key] is value for key, value in now.items())
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _attributes_of(model: nn.Module) -> Iterator[dict[str, Any]]:
    return (vars(module) for module in model.modules())

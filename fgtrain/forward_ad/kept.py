"""What a model keeps of a pass: attributes that its forward sets.

A forward may count its calls, or keep a tensor for later: an attention map to look at, a bias computed once in eval
mode. A pass that is repeated has to begin with the attributes of the first one. A tensor that depends on the parameters
loses its derivative when its pass ends: the model keeps its value, marked, and a later pass that would take it for a
constant refuses it.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

_OWN = frozenset(vars(nn.Module())) - {"_buffers"}
"""What every module has."""


def is_kept(x: Tensor) -> bool:
    """Whether a tensor was made from parameters in an earlier pass."""
    return getattr(x, "_of_earlier_pass", False)


def of_earlier_pass(x: Tensor) -> str:
    """What to say of a tensor that was made from parameters outside of the pass that takes it."""
    return (
        f"the loss takes a tensor of shape {tuple(x.shape)} that was computed from the model's parameters before this "
        "pass, so its derivative is not known; compute it inside loss_fn, or .detach() it if it is a constant"
    )


def release(model: nn.Module, value_of: Callable[[Tensor], Tensor | None]) -> None:
    """End the derivatives of all tensors that the model's attributes hold.

    Args:
        model: after a pass.
        value_of: what is to stand for a tensor that has a derivative; None for others, which stay.
    """
    for attributes in _attributes_of(model):
        for name in attributes.keys() - _OWN:
            released = _released(attributes[name], value_of)
            if released is not attributes[name]:
                attributes[name] = released


def _released(held: Any, value_of: Callable[[Tensor], Tensor | None], depth: int = 4) -> Any:
    """`held` with the values of tensors that have a derivative; lists and dictionaries are changed in place."""
    if isinstance(held, Tensor):
        value = value_of(held)
        return held if value is None else value
    if depth == 0:
        return held
    if isinstance(held, (dict, list)):
        for key, part in list(held.items() if isinstance(held, dict) else enumerate(held)):
            released = _released(part, value_of, depth - 1)
            if released is not part:
                held[key] = released
    elif isinstance(held, tuple):
        parts = [_released(part, value_of, depth - 1) for part in held]
        if any(new is not old for new, old in zip(parts, held, strict=True)):
            return type(held)(*parts) if hasattr(held, "_fields") else tuple(parts)
    return held


def marked(value: Tensor) -> Tensor:
    """A value as the model keeps it; like a tensor with a graph it requires a gradient."""
    kept = value.detach().requires_grad_()
    setattr(kept, "_of_earlier_pass", True)
    return kept


class Attributes:
    """The attributes of a model's modules as they stand, with what their lists, dictionaries and tensors hold."""

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (attributes, {name: attributes[name] for name in attributes.keys() - _OWN})
            for attributes in _attributes_of(model)
        ]
        values = [value for _, before in self._before for value in before.values()]
        self._containers = [(x, x.copy()) for x in values if type(x) in (dict, list)]
        self._tensors = [(x, x._version, x.detach().clone()) for x in values if type(x) is Tensor and x.grad_fn is None]

    def restore(self) -> None:
        """Put back what has changed."""
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

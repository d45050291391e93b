"""Tensors that stand in the places of parameters during a pass without a graph.

A loss may ask whether a parameter is trained, as a penalty does. So a stand-in has the parameter's `requires_grad` and
attributes.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fgtrain.errors import UnsupportedOperation


class KeepsFlag:
    """A tensor in place of a parameter, which has the parameter's `requires_grad`, although no graph is recorded.

    If the model sets its `data`, as an initialisation from the first batch does, its memory gets the numbers.

    Attributes:
        param_name: the name of the parameter.
        trained: its `requires_grad`.
        was_changed: whether its `data` was set or read, and so may have been changed in place.
    """

    param_name: str
    trained: bool
    was_changed: bool

    @property
    def requires_grad(self) -> bool:
        return self.trained

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value != self.trained:
            refuse_freezing(self.param_name, value)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        self.requires_grad = requires_grad
        return self

    @property
    def data(self: Any) -> Any:
        self.was_changed = True
        return self.detach()

    @data.setter
    def data(self: Any, value: Tensor) -> None:
        set_data(self.data, value)


class AsParameter(KeepsFlag, nn.Parameter):  # ty: ignore[lost-keyword-for-regular-parameter] - torch's stub errs
    """A plain tensor in place of a parameter; a copy of it is a parameter again."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return memo.setdefault(id(self), nn.Parameter(self.data.clone(), self.trained))


def as_parameter(value: Tensor, name: str, p: Tensor) -> Tensor:
    """`value`, without a graph, as a stand-in for the parameter p; subclasses of tensors stay what they are."""
    if type(value) is not Tensor:
        return value
    stand_in: Any = AsParameter(value, requires_grad=False)
    vars(stand_in).update(vars(p), param_name=name, trained=p.requires_grad or is_held_constant(p))
    return stand_in


def is_held_constant(p: Tensor) -> bool:
    """Whether `network.blocks.frozen` makes a trained parameter a constant now."""
    return hasattr(p, "_is_held_constant")


def set_data(memory: Tensor, value: Tensor) -> None:
    """Write a value into the memory of a parameter whose `data` the model sets."""
    if value.shape != memory.shape or value.dtype != memory.dtype:
        raise UnsupportedOperation(
            f"the loss function gives a parameter other data, {tuple(value.shape)} of {value.dtype} instead of "
            f"{tuple(memory.shape)} of {memory.dtype}; do this before the step, or train with Backprop"
        )
    with torch.no_grad():
        memory.copy_(value)


def refuse_freezing(name: str, requires_grad: bool) -> NoReturn:
    """Refuse a change of the parameters that are trained, which a pass without a graph cannot follow."""
    raise UnsupportedOperation(
        f"the loss function sets requires_grad={requires_grad} of {name}; do this before the step, for example in "
        "on_train_batch_start, or train with Backprop"
    )

"""Tensors that stand in the places of parameters during a pass without a graph.

A loss may ask whether a parameter is trained, as a penalty does. So a stand-in has the parameter's `requires_grad` and
attributes.
"""

from typing import Any, NoReturn

from torch import Tensor, nn

from fgtrain.errors import UnsupportedOperation

held_constant: set[Tensor] = set()
"""The parameters that are trained, but are constants for the part of a model that a method differentiates now."""


class KeepsFlag:
    """A tensor in place of a parameter, which has the parameter's `requires_grad`, although no graph is recorded.

    Attributes:
        param_name: the name of the parameter.
        trained: its `requires_grad`.
    """

    param_name: str
    trained: bool

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


class AsParameter(KeepsFlag, nn.Parameter):  # ty: ignore[lost-keyword-for-regular-parameter] - torch's stub errs
    """A plain tensor in place of a parameter; a copy of it is a parameter again."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return memo.setdefault(id(self), nn.Parameter(self.data.clone(), self.trained))


def as_parameter(value: Tensor, name: str, p: Tensor) -> Tensor:
    """`value`, without a graph, as a stand-in for the parameter p; subclasses of tensors stay what they are."""
    if type(value) is not Tensor:
        return value
    stand_in: Any = AsParameter(value, requires_grad=False)
    vars(stand_in).update(vars(p), param_name=name, trained=p.requires_grad or p in held_constant)
    return stand_in


def refuse_freezing(name: str, requires_grad: bool) -> NoReturn:
    """Refuse a change of the parameters that are trained, which a pass without a graph cannot follow."""
    raise UnsupportedOperation(
        f"the loss function sets requires_grad={requires_grad} of {name}; do this before the step, for example in "
        "on_train_batch_start, or train with Backprop"
    )

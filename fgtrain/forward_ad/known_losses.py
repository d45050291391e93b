"""Losses that PyTorch computes row by row, recorded where a loss function calls them.

Their Hessian in the input has a closed form. If a loss function is the mean of one of them, the loss of every row is
known too.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fgtrain.forward_ad.dual import Dual
from fgtrain.forward_ad.native import has_tangent, value_of
from fgtrain.forward_ad.running import watch


class KnownLoss(NamedTuple):
    """A call func(input, target, **options) of a loss, without the input.

    Args:
        func: one of `CLOSED_FORMS`.
        shape: of the input.
        target: of the call.
        options: of the call.
        autocast: the dtype of autocast at the call; None without autocast.
    """

    func: Any
    shape: torch.Size
    target: Tensor
    options: dict[str, Any]
    autocast: torch.dtype | None

    def curvature(self, z: Tensor, tangents: Tensor) -> Tensor:
        """T_j . H T_k, (K, K), where H is the Hessian of the mean of the result.

        Args:
            z: the input, as a vector (N,).
            tangents: its derivatives T, (K, N).
        """
        factors, diagonal = CLOSED_FORMS[self.func](self, z.view(self.shape), tangents.view(-1, *self.shape))
        rows = factors.reshape(len(factors), -1)
        return (factors * diagonal).reshape(rows.shape) @ rows.mT

    def weights(self, unit: Tensor) -> Tensor:
        """The weight of every element in the mean of the result: class weights, ignored targets and the reduction.

        They are multiplied by the loss that `unit` has without weights.

        Args:
            unit: an input with the same loss for every element, apart from the weights.
        """
        each = self._unreduced(unit)
        return each * self._share(unit, each)

    def rows(self, z: Tensor, result: Tensor) -> Tensor:
        """One loss for every row (.., C) of the input; their mean is the mean of the result.

        Args:
            z: the input.
            result: of the call.
        """
        if result.dim():
            each = result
        else:
            each, unit = self._unreduced(z), torch.zeros_like(value_of(z))
            unit = self.target + 1 if self.func is F.mse_loss else unit
            of_unit = self._unreduced(unit)
            each = each * (of_unit.numel() * self._share(unit, of_unit))
        return each.mean(-1) if each.dim() == len(self.shape) > 1 else each

    def _unreduced(self, z: Tensor) -> Tensor:
        return self._result(z, size_average=None, reduce=None, reduction="none")

    def _share(self, z: Tensor, each: Tensor) -> Tensor:
        """The mean of the result over the sum of the elements `each`, for one input."""
        return self._result(z).mean() / torch.where(each.any(), each.sum(), 1)

    def _result(self, z: Tensor, **changes: Any) -> Tensor:
        """What the call would return for another input, under the autocast of the call."""
        with torch.autocast(z.device.type, self.autocast, enabled=self.autocast is not None):
            return self.func(z, self.target, **self.options | changes)


def _cross_entropy(loss: KnownLoss, z: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """H = c (diag(p) - p p^T), whatever the target is; the loss of equal logits is c log C."""
    dim = 1 if z.dim() > 1 else 0
    weights = loss.weights(torch.zeros_like(z)) / math.log(z.shape[dim])
    p = z.softmax(dim)
    return tangents - (p * tangents).sum(dim + 1, keepdim=True), p * weights.unsqueeze(dim)


def _mse_loss(loss: KnownLoss, z: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """H = 2 c; the loss of an error of 1 is c."""
    return tangents, 2 * loss.weights(loss.target + 1)


CLOSED_FORMS: dict[Any, Callable[[KnownLoss, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    F.cross_entropy: _cross_entropy,
    F.mse_loss: _mse_loss,
}
"""{loss: a function of `KnownLoss`, its input z and the derivatives T of z, (K, *z.shape)}.

It returns A, shaped like T, and the diagonal D, shaped like z: A D A^T = T H T^T for the Hessian H of the mean loss.
"""


class RecordedLosses:
    """A context that records the calls of losses with a closed form.

    A pass of stacked duals reports such calls. In other passes, a function mode sees every call, which takes longer.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Any, ...]] = []

    def __enter__(self) -> "RecordedLosses":
        is_watched = watch(CLOSED_FORMS, self._record)
        self._mode: AbstractContextManager[Any] = nullcontext() if is_watched else _RecordingMode(self._record)
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if len(args) == 2 and carries_tangent(args[0]):
            device = value_of(args[0]).device.type
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            self._calls.append((func, *args, kwargs, autocast, result))

    def only(self) -> tuple[KnownLoss, Any, Any] | None:
        """The call, its input and its result; None unless there is one call, whose input alone carries a derivative."""
        if len(self._calls) != 1:
            return None
        func, z, target, options, autocast, result = self._calls[0]
        shape = value_of(z).shape
        if any(map(carries_tangent, (target, *options.values()))) or not shape.numel():
            return None
        if func is F.mse_loss and shape != target.shape:
            return None
        if func is F.cross_entropy and shape[len(shape) > 1] == 1:  # one class: the loss of equal logits is 0
            return None
        return KnownLoss(func, shape, target, options, autocast), z, result


class _RecordingMode(TorchFunctionMode):
    """Calls record(func, args, kwargs, result) after every call of a loss with a closed form."""

    def __init__(self, record: Callable[..., None]) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func in CLOSED_FORMS:
            self._record(func, args, kwargs or {}, result)
        return result


def carries_tangent(x: Any) -> bool:
    """Whether x carries a derivative in the pass that runs."""
    return isinstance(x, Dual) or (isinstance(x, Tensor) and has_tangent(x))

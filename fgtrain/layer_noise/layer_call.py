"""The record of one call of a perturbed layer, and of what uses its output.

The output of a perturbed layer is a `PerturbedDual`, which tells its `LayerCall` which functions use it, since units
behind a ReLU may have no gradient. After the pass, `LayerCall.grad_output` turns the derivatives of the losses into the
gradient of the output, and `local_grads` turns this into the gradients of weight and bias.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fgtrain.errors import UnsupportedOperation
from fgtrain.forward_ad.dual import Dual, call, duals_in, primal_of
from fgtrain.forward_ad.lost_derivatives import only_reads
from fgtrain.forward_ad.output_tangent import LocalGrads

_RELU = {torch.relu, torch.Tensor.relu, F.relu, torch.relu_, torch.Tensor.relu_, F.relu_}


def passing(output: Tensor) -> Tensor:
    """1 where a ReLU passes the output, 0 elsewhere; numbers, because multiplying by bools takes five times as long."""
    return output.sign().clamp_(min=0)


def as_input(x: Tensor) -> tuple[Tensor, int]:
    """A layer's input, and its version, which counts changes in place; tensors made in inference mode have none."""
    return x, 0 if x.is_inference() else x._version


@dataclass(eq=False)
class LayerCall:
    """One call of a layer in a pass.

    Args:
        name: name of the weight.
        local_grads: maps the gradient of the output to those of weight and bias.
        noise: the noise u as drawn, without `pattern`.
        pattern: (K, q) or None; if there is one, direction k is noise * pattern[k].
        channels: dimension of the channels in the output.
        shape: shape of the output.
        inputs: the layer's input, and its version at the time of the call.
        tangent: tangent (K, B, C) of the head's output, without the unit directions.
        active: `passing` of the output, if a ReLU follows; else None.
        used_otherwise: whether something else than a ReLU uses the output.
        settled: whether a ReLU has changed the output in place, so that later uses are of the ReLU's output.
    """

    name: str
    local_grads: LocalGrads | None
    noise: Tensor | None
    pattern: Tensor | None
    channels: int
    shape: torch.Size
    inputs: tuple[Tensor, int] | None
    tangent: Tensor | None = None
    active: Tensor | None = None
    used_otherwise: bool = False
    settled: bool = False

    @property
    def is_rectified(self) -> bool:
        """Whether only a ReLU uses the output: then units that it zeroes have zero gradient."""
        return self.active is not None and not self.used_otherwise

    def noted(self, func: Any, result: Any, output: Dual) -> None:
        """Record a function that used the layer's output."""
        if self.settled:
            return
        if func in _RELU:
            self.active = passing(primal_of(result))
            self.settled = result is output
        else:
            self.used_otherwise = True

    def forget(self) -> None:
        """Free all tensors as large as an activation."""
        self.local_grads = self.noise = self.inputs = self.tangent = None
        self.active = None if self.active is None else self.active[:0]  # an empty tensor marks that there is one

    def grad_output(self, derivatives: Tensor, dim: int = 0) -> Tensor:
        """(1/K) sum_k d_k u_k in every row of the output, from derivatives of the rows that begin at dimension `dim`.

        Args:
            derivatives: (K, rows), or (K, .., rows) if the rows take several dimensions. A single row stands for all.
            dim: the first dimension of the rows.
        """
        assert self.noise is not None
        self.check_inputs()
        signal = _local_signal(self.noise, self.pattern, derivatives, self.channels, dim)
        return self.cut_off(signal).expand(self.shape)

    def cut_off(self, signal: Tensor) -> Tensor:
        """`signal` at the layer's output, set to 0 where the following ReLU is zero."""
        return signal if self.active is None or self.used_otherwise else signal * self.active.to(signal.dtype)

    def check_inputs(self) -> None:
        """Refuse local gradients if the layer's input was changed in place after the call."""
        assert self.inputs is not None
        inputs, version = self.inputs
        if as_input(inputs)[1] != version:
            raise UnsupportedOperation(
                f"the input of {self.name.removesuffix('.weight')} is changed in place after the layer has used it; "
                "use the out-of-place form, memory='replay', or ForwardGradient"
            )


def _local_signal(noise: Tensor, pattern: Tensor | None, derivatives: Tensor, channels: int, dim: int) -> Tensor:
    """(1/K) sum_k d_k u_k, with a single position if all positions share their noise.

    Args:
        noise: (B, .., q), or (K, B, .., q) without a pattern.
        pattern: (K, q) or None.
        derivatives: (K, rows of the output), or (K, .., rows).
        channels: dimension of the channels in the output.
        dim: first dimension of the rows in the output.
    """
    num, *rows = derivatives.shape
    if pattern is None:
        behind = noise.dim() - 1 - dim - len(rows)
        return (noise * derivatives.view(num, *[1] * dim, *rows, *[1] * behind)).sum(0) / num
    weights = (derivatives.flatten(1).T @ pattern.to(derivatives.dtype)) / num  # (rows, q)
    shape = [1] * noise.dim()
    shape[dim : dim + len(rows)], shape[channels] = rows, weights.shape[1]
    return noise * weights.view(shape)


class PerturbedDual(Dual):
    """The output of a perturbed layer, which records the functions that use it."""

    layer: LayerCall

    def __init__(self, primal: Tensor, tangent: Tensor, layer: LayerCall) -> None:
        self.layer = layer  # Dual.__new__ sets the others

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = call(func, args, kwargs or {})
        if not only_reads(func):
            for x in duals_in((args, kwargs)):
                if isinstance(x, PerturbedDual):
                    x.layer.noted(func, result, x)
        return result

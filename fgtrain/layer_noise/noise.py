"""Noise on the outputs of layers: the pass of activity perturbation.

A layer that is linear in its weight W has, for one example with input x and output z, the weight gradient g_z x^T. So
it is enough to perturb z, which is far smaller than W.

The tangent of a weight is a `LayerNoise`, whose layer's rule passes the output to a `PerturbedPass`. The pass draws the
noise u_k, adds it to the tangents of the output, and records the call of the layer in a `LayerCall`. The output is a
`PerturbedDual`, which tells its `LayerCall` which functions use it, since units behind a ReLU may have no gradient.
After the pass, `LayerCall.grad_output` turns the derivatives of the losses into the gradient of z, and `local_grads`
turns this into the gradients of weight and bias.

Shapes: K directions, B examples, q channels of a layer's output z (B, .., q), or (B, q, ..) of a convolution.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fgtrain._torch import is_inside_transform
from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.forward_ad.dual import Dual, call, duals_in, primal_of, tangent_of
from fgtrain.forward_ad.lost_derivatives import only_reads
from fgtrain.forward_ad.output_tangent import LocalGrads, OutputTangent
from fgtrain.forward_ad.passes import UnsupportedByEngine
from fgtrain.forward_ad.row_losses import marks
from fgtrain.forward_ad.running import widen
from fgtrain.random import fold_in
from fgtrain.tangents import Rademacher

Noise = Literal["balanced", "rademacher", "normal"]

WITHOUT_HEAD = "train without it: exact_head=False, or ActivityPerturbation instead of FDFA"

_RELU = {torch.relu, torch.Tensor.relu, F.relu, torch.relu_, torch.Tensor.relu_, F.relu_}


def passing(output: Tensor) -> Tensor:
    """1 where a ReLU passes the output, 0 elsewhere; numbers, because multiplying by bools takes five times as long."""
    return output.sign().clamp_(min=0)


def as_input(x: Tensor) -> tuple[Tensor, int]:
    """A layer's input, and its version, which counts changes in place; tensors made in inference mode have none."""
    return x, 0 if x.is_inference() else x._version


class UsedElsewhere(UnsupportedOperation):
    """A weight is used outside its layer, so noise on the layer's output is not enough to estimate its gradient."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} is used outside its layer, which it was not in the first step; instead of a penalty on weights "
            "that begins later, use weight_decay, or train with ForwardGradient"
        )
        self.name = name


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


@dataclass(eq=False)
class PerturbedPass:
    """The noise of one pass, and the record of its layer calls.

    Args:
        num_tangents: K.
        seed: seed of the noise; with the index of the call it determines the noise of every layer.
        noise: "rademacher" and "normal" draw every entry of every direction; "balanced" assigns every unit to one of
            the K directions (entries sqrt(K) times a sign, 0 in the others), which gives the least variance.
        shared_positions: use one draw for all positions of a map or sequence.
        head: name of the weight whose output gets C unit directions and `marks` of its rows in addition to the K; None
            for no such layer.
        keeps: whether inputs and noise are kept for `LayerCall.grad_output`.

    Attributes:
        calls: the calls of layers, in order.
        noise_size: numbers drawn per direction, over the whole batch.
    """

    num_tangents: int
    seed: int
    noise: Noise = "balanced"
    shared_positions: bool = False
    head: str | None = None
    keeps: bool = True
    calls: list[LayerCall] = field(default_factory=list)
    noise_size: int = 0
    _num_draws: int = 0
    _num_units: int = 0

    def perturb(self, name: str, inputs: Tensor, output: Tensor, local_grads: LocalGrads, channels: int) -> Tensor:
        """The layer's output as a dual with noise in its tangents."""
        primal, tangent = primal_of(output), tangent_of(output)
        noise, pattern, of_head = None, None, None
        if primal.is_nested:
            raise UnsupportedByEngine("a layer's output is a nested tensor")
        if is_inside_transform(primal):
            raise UnsupportedByEngine("a layer is called inside torch.vmap or another transform")
        if name == self.head:
            of_head = primal.new_zeros(self.num_tangents, *primal.shape) if tangent is None else tangent
            tangent = self._with_unit_directions(name, primal, of_head, channels)
        else:
            if tangent is not None and len(tangent) > self.num_tangents and self._has_called(self.head):
                of_last, after = (x.removesuffix(".weight") for x in (str(self.head), name))
                raise UnsupportedOperation(f"{of_last}, the last layer, is called before {after}; {WITHOUT_HEAD}")
            noise, pattern = self.draw(primal, channels)
            tangent = _add_noise(tangent, noise, pattern, primal, channels)
        layer = LayerCall(name, local_grads, noise, pattern, channels, primal.shape, as_input(inputs), of_head)
        if not self.keeps:
            layer.forget()
        self.calls.append(layer)
        return PerturbedDual(primal, tangent, layer)

    def draw(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """The noise for the output of the next layer: (noise, pattern) of `LayerCall`."""
        shape = list(output.shape)
        if self.shared_positions:
            shape = [n if dim in (0, channels % output.dim()) else 1 for dim, n in enumerate(shape)]
        self.noise_size += torch.Size(shape).numel()
        generator = torch.Generator(output.device).manual_seed(fold_in(self.seed, self._num_draws))
        first, num_units = self._num_units, output.shape[channels]
        self._num_draws, self._num_units = self._num_draws + 1, first + num_units
        if self.noise == "normal":
            return output.new_empty(self.num_tangents, *shape).normal_(generator=generator), None
        if self.noise == "rademacher" or self.num_tangents == 1:  # the only direction has every unit
            return _signs([self.num_tangents, *shape], generator, output), None
        units = torch.arange(first, first + num_units, device=output.device)
        owner = torch.arange(self.num_tangents, device=output.device).unsqueeze(1)
        pattern = (units % self.num_tangents == owner).to(output.dtype) * self.num_tangents**0.5
        return _signs(shape, generator, output), pattern

    def _has_called(self, name: str | None) -> bool:
        return any(call.name == name for call in self.calls)

    def _with_unit_directions(self, name: str, primal: Tensor, tangent: Tensor, channels: int) -> Tensor:
        layer = name.removesuffix(".weight")
        if channels % primal.dim() != primal.dim() - 1 or primal.dim() == 1:
            raise UnsupportedOperation(
                f"the exact gradient of the last layer needs outputs (.., C), but {layer} gives {tuple(primal.shape)}; "
                f"{WITHOUT_HEAD}"
            )
        if not primal.numel():
            raise LossError(
                f"the exact gradient of the last layer needs a row, but {layer} gives {tuple(primal.shape)}"
            )
        if self._has_called(name):
            raise UnsupportedOperation(f"{layer}, the last layer, is called twice; {WITHOUT_HEAD}")
        *leading, size = primal.shape
        units = torch.eye(size, dtype=primal.dtype, device=primal.device).view(size, *[1] * len(leading), size)
        of_rows = marks(math.prod(leading), primal).view(-1, *leading, 1)
        moved = torch.cat([tangent, *(directions.expand(-1, *primal.shape) for directions in (units, of_rows))])
        widen(len(moved))  # earlier duals that are combined with its output get these directions too
        return moved


def _signs(shape: list[int], generator: torch.Generator, like: Tensor) -> Tensor:
    count = torch.Size(shape).numel()
    rows = torch.empty(1, count + -count % 16, dtype=like.dtype, device=like.device)
    Rademacher().fill(rows, count, generator)
    return rows[0, :count].view(shape)


def _add_noise(tangent: Tensor | None, noise: Tensor, pattern: Tensor | None, output: Tensor, channels: int) -> Tensor:
    if pattern is None:
        if tangent is None:
            return noise.expand(-1, *output.shape).clone()  # the tangent may change in place, the noise must not
        return tangent.add_(noise)
    shape = [1] * (output.dim() + 1)
    shape[0], shape[channels if channels < 0 else channels + 1] = pattern.shape
    factors = pattern.view(shape)
    if tangent is None:
        return (factors * noise).expand(-1, *output.shape).contiguous()
    return tangent.addcmul_(factors, noise)


class PerturbingPass(Protocol):
    """A pass that may replace the outputs of layers."""

    @property
    def num_tangents(self) -> int:
        """K, the number of directions."""
        ...

    def perturb(self, name: str, inputs: Tensor, output: Tensor, local_grads: LocalGrads, channels: int) -> Tensor:
        """The replacement of the layer's output without noise."""
        ...


class LayerNoise(OutputTangent):
    """The tangent of a weight whose layer is perturbed at its output.

    Args:
        name: name of the weight.
        of_pass: the pass.
    """

    def __init__(self, name: str, of_pass: PerturbingPass) -> None:
        self.name = name
        self.of_pass = of_pass

    @property
    def num(self) -> int:
        """K, the number of directions."""
        return self.of_pass.num_tangents

    def dense(self) -> Tensor:
        raise UsedElsewhere(self.name)

    def perturb(self, inputs: Tensor, output: Tensor, local_grads: LocalGrads, channels: int) -> Tensor:
        return self.of_pass.perturb(self.name, inputs, output, local_grads, channels)

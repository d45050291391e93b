"""Noise on the outputs of layers: the pass of activity perturbation.

A layer that is linear in its weight W has, for one example with input x and output z, the weight gradient g_z x^T. So
it is enough to perturb z, which is far smaller than W.

The tangent of a weight is a `LayerNoise`, whose layer's rule passes the output to a `PerturbedPass`. The pass draws the
noise u_k, adds it to the tangents of the output, and records the call of the layer in a `LayerCall`, from which the
gradients follow after the pass.

Shapes: K directions, B examples, q channels of a layer's output z (B, .., q), or (B, q, ..) of a convolution.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from fgtrain._torch import is_inside_transform
from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.forward_ad.dual import primal_of, tangent_of
from fgtrain.forward_ad.output_tangent import LocalGrads, OutputTangent
from fgtrain.forward_ad.passes import UnsupportedByEngine
from fgtrain.forward_ad.row_losses import marks
from fgtrain.forward_ad.running import widen
from fgtrain.layer_noise.layer_call import LayerCall, PerturbedDual, as_input
from fgtrain.random import fold_in
from fgtrain.tangents import Rademacher

Noise = Literal["balanced", "rademacher", "normal"]

WITHOUT_HEAD = "train without it: exact_head=False, or ActivityPerturbation instead of FDFA"


class UsedElsewhere(UnsupportedOperation):
    """A weight is used outside its layer, so noise on the layer's output is not enough to estimate its gradient."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} is used outside its layer, which it was not in the first step; instead of a penalty on weights "
            "that begins later, use weight_decay, or train with ForwardGradient"
        )
        self.name = name


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

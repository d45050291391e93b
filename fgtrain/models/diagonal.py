"""Recurrent networks of independent units: every unit's next state depends on its own state and on the input.

Shapes: B sequences, T time steps, I inputs, N units.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgtrain._torch import is_inside_transform
from fgtrain.errors import DataError
from fgtrain.network.repeated_steps import in_segments, is_checkpointed


class DiagonalRecurrence(nn.Module):
    """N units h_t = a h_{t-1} + gamma W x_t, complex or real.

    a = exp(-exp(log_rate) + i phase), so |a| < 1 whatever the parameters. gamma = sqrt(1 - |a|^2) gives every unit
    about the variance of W x, if the inputs are independent. The time constants 1 / exp(log_rate) start log-uniform
    between 1 and `memory` steps.

    Args:
        inputs: I.
        units: N.
        memory: the longest initial time constant, in steps.
        max_phase: initial phases are uniform in [0, max_phase); 0 makes the units real.

    Attributes:
        weight: W, (N, I); if the units are complex, (2 N, I), with a real and an imaginary row for each of them.

    Source: Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu, De 2023, arXiv:2303.06349, section 3. There gamma is a
    parameter of its own, which has this value at the start.
    """

    def __init__(self, inputs: int, units: int, memory: float, max_phase: float) -> None:
        super().__init__()
        self.is_complex = max_phase > 0
        self.log_rate = nn.Parameter(-math.log(memory) * torch.rand(units))
        self.phase = nn.Parameter(max_phase * torch.rand(units)) if self.is_complex else None
        rows = 2 * units if self.is_complex else units
        self.weight = nn.Parameter(torch.randn(rows, inputs) / math.sqrt(inputs * rows / units))

    def factors(self) -> Tensor:
        """a, (N,)."""
        size = torch.exp(-torch.exp(self.log_rate))
        return size if self.phase is None else torch.polar(size, self.phase)

    def input_weight(self) -> Tensor:
        """gamma W, shaped like `weight`."""
        gamma = torch.sqrt(-torch.expm1(-2 * torch.exp(self.log_rate)))
        return (self.weight.unflatten(0, (len(gamma), -1)) * gamma[:, None, None]).flatten(0, 1)

    def run(self, x: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, N or 2 N) on inputs (B, T, I), and the last state (B, N).

        Args:
            x: inputs.
            start: state before the first input, (B, N); None for zeros.
        """
        refuse_no_sequences(x)
        a = self.factors()
        driven = as_units(F.linear(x, self.input_weight()).to(self.weight.dtype), a)
        # The function stores the states alone, but has no derivative for forward mode, and Dynamo cannot trace it.
        in_one = not torch.compiler.is_compiling() and type(driven) is Tensor and driven.requires_grad
        in_one = in_one and not is_inside_transform(driven)
        states = _Scan.apply(a, driven, start) if in_one else scan(a, driven, start)
        return as_rows(states), states[:, -1]

    def forward(self, x: Tensor) -> Tensor:
        """The states h_t, (B, T, N), or (B, T, 2 N) if they are complex, on inputs (B, T, I), from the state 0."""
        return self.run(x)[0]


def refuse_no_sequences(x: Tensor) -> None:
    """Raise DataError unless x are sequences (B, T, I) of at least one time step."""
    if x.dim() != 3 or not x.shape[1] or x.is_complex():
        got = f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
        raise DataError(
            f"a recurrence takes real numbers (sequences, time steps, inputs) of one time step or more, got {got}"
        )


def scan(a: Tensor, driven: Tensor, start: Tensor | None = None, *, backwards: bool = False) -> Tensor:
    """The states h_t = a h_{t-1} + driven_t, (B, T, N), in a loop over T.

    Args:
        a: factors, (N,).
        driven: (B, T, N).
        start: h_0, (B, N); None for zeros.
        backwards: from the last step to the first: h_t = a h_{t+1} + driven_t.
    """
    first, *others = driven.unbind(1)[:: -1 if backwards else 1]
    state = first if start is None else torch.addcmul(first, a, start)
    states = [state]
    for each in others:
        state = torch.addcmul(each, a, state)
        states.append(state)
    return torch.stack(states[:: -1 if backwards else 1], 1)


class _Scan(torch.autograd.Function):
    """`scan`, which stores its result for the backward pass and nothing for each step."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, driven: Tensor, start: Tensor | None) -> Tensor:
        states = scan(a, driven, start)
        ctx.save_for_backward(a, start, states)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        a, start, states = ctx.saved_tensors
        for_driven, for_a = scan_gradients(a, states, start, grads[0])
        return for_a, for_driven, None if start is None else a.conj() * for_driven[:, 0]


def scan_gradients(a: Tensor, states: Tensor, start: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by `driven` and by `a` of a function of scan(a, driven, start), whose gradient by it is `grad`."""
    for_driven = scan(a.conj().resolve_conj(), grad, backwards=True)
    for_a = (for_driven[:, 1:] * states[:, :-1].conj()).sum((0, 1))
    if start is not None:
        for_a = for_a + (for_driven[:, 0] * start.conj()).sum(0)
    return for_driven, for_a


def as_units(rows: Tensor, a: Tensor) -> Tensor:
    """Numbers (..., 2 N) as complex ones (..., N), if the factors `a` are complex."""
    return torch.view_as_complex(rows.unflatten(-1, (-1, 2))) if a.is_complex() else rows


def as_rows(units: Tensor) -> Tensor:
    """The inverse of `as_units`."""
    return torch.view_as_real(units).flatten(-2) if units.is_complex() else units


class DiagonalRNN(nn.Module):
    """A stack of diagonal recurrences over tokens, each with a gated read-out.

    The first layer reads the tokens as unit vectors, so that no parameter stands before its recurrence. Later layers
    add their read-out to their input.

    Args:
        vocab_size: number of tokens.
        width: units of a layer, and width of what it passes on.
        depth: number of layers.
        memory: the longest initial time constant, in steps.
        max_phase: the largest initial phase of a unit; 0 makes the units real.
        silent: a token whose vector is 0, such as the blank between rare events, so that it does not fill the states;
            None for none.

    Source: Zucchet, Meier, Schug, Mujika, Sacramento 2023, arXiv:2305.15947.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 64,
        depth: int = 1,
        memory: float = 100.0,
        max_phase: float = 0.3,
        silent: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("depth", depth), ("memory", memory)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if max_phase < 0:
            raise ValueError(f"max_phase must be at least 0, got {max_phase}")
        if silent is not None and not 0 <= silent < vocab_size:
            raise ValueError(f"silent must be a token below vocab_size={vocab_size} or None, got {silent}")
        self.vocab_size = vocab_size
        self.silent = silent
        self.layers = nn.ModuleList(_Layer(width if i else vocab_size, width, memory, max_phase) for i in range(depth))
        self.head = nn.Linear(width, vocab_size)

    def run(self, tokens: Tensor, starts: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, T, vocab_size) of the token after each of `tokens` (B, T), and the last state of every layer.

        Args:
            tokens: integers below vocab_size.
            starts: the states before the first token, as another call returned them; None for zeros.
        """
        x, ends = self._unit_vectors(tokens), []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            out, end = layer.recurrence.run(x, None if starts is None else starts[i])
            x = layer.read_out(x, out)
            ends.append(end)
        return self.head(x), ends

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of the token after each of `tokens` (B, T), from the states 0."""
        if is_checkpointed():
            return in_segments(self.run, tokens)
        x = self._unit_vectors(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def _unit_vectors(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dim() != 2:
            got = f"{str(tokens.dtype).removeprefix('torch.')} of shape {tuple(tokens.shape)}"
            raise DataError(f"tokens must be integers of shape (sequences, time steps), got {got}")
        tokens = tokens.long()
        try:
            x = F.one_hot(tokens, self.vocab_size).to(self.head.weight.dtype)
        except RuntimeError as error:
            lowest, highest = int(tokens.min()), int(tokens.max())
            if 0 <= lowest <= highest < self.vocab_size:
                raise
            raise DataError(
                f"tokens run from {lowest} to {highest}; they must be from 0 to {self.vocab_size - 1}, for "
                f"vocab_size={self.vocab_size}"
            ) from error
        return x if self.silent is None else x * (tokens != self.silent)[..., None]


class _Layer(nn.Module):
    def __init__(self, inputs: int, width: int, memory: float, max_phase: float) -> None:
        super().__init__()
        self.recurrence = DiagonalRecurrence(inputs, width, memory, max_phase)
        self.gated = nn.Linear(2 * width if max_phase else width, 2 * width)
        self.skips = inputs == width

    def read_out(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output (B, T, width), from its input and the output of its recurrence."""
        value, gate = self.gated(out).chunk(2, -1)
        y = value * gate.sigmoid()
        return x + y if self.skips else y

    def forward(self, x: Tensor) -> Tensor:
        return self.read_out(x, self.recurrence(x))

"""Functions of sequence models as compositions of others: attention, recurrent layers, packed sequences.

The fused kernels that PyTorch would choose have no forward-mode derivative.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fgtrain._torch import outside_transforms, pack_padded_sequence, pad_packed_sequence, safe_softmax
from fgtrain.forward_ad.rules.compositions import COMPOSITIONS, composition_of


@composition_of("scaled_dot_product_attention")
def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        length, width = scores.shape[-2:]
        attn_mask = torch.ones(length, width, dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        is_choice = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_choice else scores + attn_mask
        weights = safe_softmax(scores, -1)
    else:
        weights = torch.softmax(scores, -1)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, True)
    return weights @ value


@composition_of("_safe_softmax")
def _safe_softmax(scores: Any, dim: int, dtype: Any = None) -> Any:
    """Softmax; a fully masked row gives 0."""
    masked = (scores == -torch.inf).all(dim, keepdim=True)
    return torch.softmax(scores.masked_fill(masked, 0), dim, dtype=dtype).masked_fill(masked, 0)


# --- recurrent layers ---------------------------------------------------------------------------------------------


def _lstm_cell(gates: Any, state: tuple[Any, Any], weight: Any, bias: Any) -> tuple[Any, Any]:
    hidden, cell = state
    i, f, g, o = (gates + F.linear(hidden, weight, bias)).chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru_cell(gates: Any, state: tuple[Any], weight: Any, bias: Any) -> tuple[Any]:
    (hidden,) = state
    reset, update, new = gates.chunk(3, -1)
    h_reset, h_update, h_new = F.linear(hidden, weight, bias).chunk(3, -1)
    update = torch.sigmoid(update + h_update)
    new = torch.tanh(new + torch.sigmoid(reset + h_reset) * h_new)
    return (new + update * (hidden - new),)


def _simple_cell(activation: Any) -> Any:
    def cell(gates: Any, state: tuple[Any], weight: Any, bias: Any) -> tuple[Any]:
        return (activation(gates + F.linear(state[0], weight, bias)),)

    return cell


def _recurrent(cell: Any, num_states: int) -> Any:
    """A function such as torch.lstm: layers and directions of a cell, with the input gates of all steps in one product.

    Args:
        cell: (gates, state, weight, bias) -> state, whose first part is the output.
        num_states: number of parts of a state.
    """

    def over_sequence(x: Any, states: Any, weights: Any, has_biases: bool, *options: Any) -> Any:
        batch_first = options[-1]
        x = x.transpose(0, 1) if batch_first else x
        sizes = [x.shape[1]] * x.shape[0]
        rows, *finals = over_rows(x.flatten(0, 1), sizes, states, weights, has_biases, *options[:-1])
        x = rows.unflatten(0, x.shape[:2])
        return x.transpose(0, 1) if batch_first else x, *finals

    def over_rows(
        rows: Any,
        sizes: list[int],
        states: Any,
        weights: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> Any:
        """Run on `rows`: `sizes[t]` of them belong to time step t, those of the longest sequences first."""
        states = (states,) if num_states == 1 else tuple(states)
        directions = 2 if bidirectional else 1
        per_cell = len(weights) // (num_layers * directions)
        finals: list[tuple[Any, ...]] = []
        for layer in range(num_layers):
            outputs = []
            for reverse in range(directions):
                at = layer * directions + reverse
                w_ih, w_hh, *others = weights[at * per_cell : (at + 1) * per_cell]
                b_ih, b_hh = others[:2] if has_biases else (None, None)
                projection = others[-1] if len(others) % 2 else None
                steps, final = _steps(
                    cell,
                    F.linear(rows, w_ih, b_ih).split(sizes),
                    tuple(s[at] for s in states),
                    (w_hh, b_hh, projection),
                    reverse=bool(reverse),
                )
                outputs.append(torch.cat(steps))
                finals.append(final)
            rows = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if dropout and train and layer + 1 < num_layers:
                rows = torch.dropout(rows, dropout, True)
        return rows, *(torch.stack(parts) for parts in zip(*finals, strict=True))

    def body(x: Any, *args: Any) -> Any:
        if isinstance(args[2], bool):  # (x, states, weights, has_biases, ..)
            return over_sequence(x, *args)
        return over_rows(x, args[0].tolist(), *args[1:])  # a packed sequence: (rows, batch_sizes, states, weights, ..)

    return body


def _steps(
    cell: Any, gates: Any, state: tuple[Any, ...], parameters: tuple[Any, Any, Any], *, reverse: bool
) -> tuple[list[Any], tuple[Any, ...]]:
    """Outputs of one direction of one layer, in temporal order, and its final state.

    In a forward pass, a sequence leaves the state at its end. In a reverse pass, it enters the state at its end.
    """
    weight, bias, projection = parameters
    initial, ended, outputs = state, [], []
    if reverse:
        state = tuple(s[: len(gates[-1])] for s in initial)
    for gate in reversed(gates) if reverse else gates:
        size, active = len(gate), len(state[0])
        if size < active:
            ended.append(tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        elif size > active:
            state = tuple(torch.cat([s, first[active:size]]) for s, first in zip(state, initial, strict=True))
        hidden, *others = cell(gate, state, weight, bias)
        hidden = hidden if projection is None else F.linear(hidden, projection)
        state = (hidden, *others)
        outputs.append(hidden)
    if ended:
        state = tuple(torch.cat(parts) for parts in zip(*[state, *reversed(ended)], strict=True))
    return outputs[::-1] if reverse else outputs, state


COMPOSITIONS[torch.lstm] = _recurrent(_lstm_cell, 2)
COMPOSITIONS[torch.gru] = _recurrent(_gru_cell, 1)
COMPOSITIONS[torch.rnn_tanh] = _recurrent(_simple_cell(torch.tanh), 1)
COMPOSITIONS[torch.rnn_relu] = _recurrent(_simple_cell(torch.relu), 1)


# --- packed sequences: packing the row indices gives the source of each row ------------------------------------------


@composition_of("_pack_padded_sequence")
def _pack_padded_sequence(x: Any, lengths: Tensor, batch_first: bool) -> Any:
    with outside_transforms():  # these read memory
        numbers = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(*x.shape[:2])
        rows, sizes = pack_padded_sequence(numbers, lengths, batch_first)
    return x.flatten(0, 1)[rows], sizes


@composition_of("_pad_packed_sequence")
def _pad_packed_sequence(data: Any, sizes: Tensor, batch_first: bool, value: float, total_length: int) -> Any:
    with outside_transforms():
        numbers = torch.arange(len(data), device=data.device)
        rows, lengths = pad_packed_sequence(numbers, sizes, batch_first, -1, total_length)
    padding = (rows < 0).view(*rows.shape, *[1] * (data.dim() - 1))
    return data[rows.clamp(min=0)].masked_fill(padding, value), lengths

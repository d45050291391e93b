"""Rules for what sequence models add: embeddings, attention, recurrent layers.

Attention and recurrence are written out in operations that have rules of their own, because the fused kernels PyTorch
would choose have no forward-mode derivative.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fgtrain.directions import LowRankTangent
from fgtrain.forward_ad import kernels
from fgtrain.forward_ad.dual import COMPOSITES, FALLBACKS, Dual, dual, per_direction, primal_of
from fgtrain.forward_ad.rules import register, register_composite


@register("embedding")
def _embedding(
    weight: Any, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    if not isinstance(weight, Dual):
        return NotImplemented
    primal = torch.embedding(primal_of(weight), indices)
    tangent = weight.tangent
    if isinstance(tangent, LowRankTangent):
        left, right = tangent.factors
        moved = torch.einsum("k...a,kan->k...n", left.mT[:, indices], right)
    else:
        moved = tangent[:, indices]
    if padding_idx >= 0:  # the padding row is not trained
        moved = moved.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    return dual(primal, moved)


@register_composite("scaled_dot_product_attention")
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
    weights = torch.softmax(scores, -1)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, True)
    return weights @ value


# --- recurrent layers ---------------------------------------------------------------------------------------------


def _lstm_cell(gates: Any, state: tuple[Any, Any], weight: Any, bias: Any) -> tuple[Any, tuple[Any, Any]]:
    hidden, cell = state
    i, f, g, o = (gates + F.linear(hidden, weight, bias)).chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    hidden = torch.sigmoid(o) * torch.tanh(cell)
    return hidden, (hidden, cell)


def _gru_cell(gates: Any, state: tuple[Any], weight: Any, bias: Any) -> tuple[Any, tuple[Any]]:
    (hidden,) = state
    reset, update, new = gates.chunk(3, -1)
    h_reset, h_update, h_new = F.linear(hidden, weight, bias).chunk(3, -1)
    update = torch.sigmoid(update + h_update)
    new = torch.tanh(new + torch.sigmoid(reset + h_reset) * h_new)
    hidden = new + update * (hidden - new)
    return hidden, (hidden,)


def _simple_cell(activation: Any) -> Any:
    def cell(gates: Any, state: tuple[Any], weight: Any, bias: Any) -> tuple[Any, tuple[Any]]:
        hidden = activation(gates + F.linear(state[0], weight, bias))
        return hidden, (hidden,)

    return cell


def _recurrent(cell: Any, num_states: int) -> Any:
    """A rule for torch.lstm and its like: layers and directions of a cell, all time steps' input gates at once."""

    def rule(x: Any, states: Any, weights: Any, has_biases: Any, *options: Any) -> Any:
        if not isinstance(has_biases, bool):  # a packed sequence: (data, batch_sizes, states, ..)
            return NotImplemented
        num_layers, dropout, train, bidirectional, batch_first = options
        states = (states,) if num_states == 1 else tuple(states)
        directions = 2 if bidirectional else 1
        per_cell = len(weights) // (num_layers * directions)
        if per_cell not in (2, 4):  # a projection
            return NotImplemented
        x = x.transpose(0, 1) if batch_first else x
        finals: list[tuple[Any, ...]] = []
        for layer in range(num_layers):
            outputs = []
            for reverse in range(directions):
                at = layer * directions + reverse
                held: tuple[Any, ...] = (*weights[at * per_cell : (at + 1) * per_cell], None, None)
                w_ih, w_hh, b_ih, b_hh = held[:4]
                gates = F.linear(x, w_ih, b_ih).unbind(0)
                state, steps = tuple(s[at] for s in states), []
                for gate in reversed(gates) if reverse else gates:
                    hidden, state = cell(gate, state, w_hh, b_hh)
                    steps.append(hidden)
                outputs.append(torch.stack(steps[::-1] if reverse else steps))
                finals.append(state)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if dropout and train and layer + 1 < num_layers:
                x = torch.dropout(x, dropout, True)
        x = x.transpose(0, 1) if batch_first else x
        return x, *(torch.stack(parts) for parts in zip(*finals, strict=True))

    return rule


COMPOSITES[torch.lstm] = _recurrent(_lstm_cell, 2)
COMPOSITES[torch.gru] = _recurrent(_gru_cell, 1)
COMPOSITES[torch.rnn_tanh] = _recurrent(_simple_cell(torch.tanh), 1)
COMPOSITES[torch.rnn_relu] = _recurrent(_simple_cell(torch.relu), 1)

# Where the rules above do not answer, PyTorch's forward mode needs other kernels than PyTorch would choose.
FALLBACKS[torch.lstm] = (False, per_direction(kernels.lstm))
FALLBACKS[F.scaled_dot_product_attention] = (False, per_direction(kernels.attention))
FALLBACKS[torch.embedding] = (False, per_direction(kernels.embedding))
FALLBACKS[torch._weight_norm] = (True, kernels.weight_norm)

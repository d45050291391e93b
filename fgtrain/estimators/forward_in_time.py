"""Forward mode through time, for recurrences of independent units: online learning in constant memory.

Shapes: B sequences, T time steps of a chunk, I inputs and N units of a recurrence.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain.errors import DataError, UnsupportedOperation
from fgtrain.estimators.backprop import Backprop
from fgtrain.estimators.base import Estimate, GradientEstimator, Reduce, buffers_in
from fgtrain.forward_ad.passes import LossFn
from fgtrain.models.diagonal import DiagonalRecurrence, as_rows, as_units, refuse_no_sequences, scan, scan_gradients
from fgtrain.network.blocks import forwards_replaced

PARTS = ("state", "by_factor", "by_weight")


class ForwardInTime(GradientEstimator):
    """The gradient of a stream's loss, chunk by chunk, with the past carried forwards as derivatives.

    Successive calls get successive chunks of the same B sequences, of one time step or more. The state of every
    `fgtrain.models.DiagonalRecurrence` goes on from one chunk to the next, and so do its derivatives by the unit's own
    parameters, the traces. A call of the model itself still starts from the state 0. If a chunk makes the state or the
    traces nan or infinite, the next chunk starts from those before it.

    Formula: for units h_t = a h_{t-1} + W x_t, where W includes gamma, the traces are
    p_t = d h_t / d a = a p_{t-1} + h_{t-1} and q_t = d h_t / d W = a q_{t-1} + x_t. The gradients are
    g_a = sum_t delta_t p_t and g_W = sum_t delta_t q_t, where delta_t = d loss_t / d h_t by backpropagation through the
    layers at time t only. Within a chunk the sums are computed in another order, without p_t and q_t at every step:
    with r_t = delta_t + a r_{t+1} they are g_a = sum_t r_t h_{t-1} + a r_1 p_0 and g_W = sum_t r_t x_t + a r_1 q_0.

    Bias: with one recurrence, and no parameter before it, the sum over the chunks of a stream is the gradient of the
    summed loss, exactly, if the parameters stay the same. An optimizer step between chunks makes the traces those of
    older parameters. A layer before a recurrence gets no gradient from the losses of later time steps: with stacked
    recurrences, the sum is the gradient of a network in which each recurrence's earlier inputs are constants.

    Cost: one forward pass and, for every layer, the backward pass within a time step; memory for the activations of a
    chunk and for B N (I + 2) numbers of every recurrence, whatever the length of the stream. It runs in one process.

    Raises:
        UnsupportedOperation: the model has no `DiagonalRecurrence`, it is called twice in one pass or from a state
            that the model gives, or there are several processes.
        DataError: a chunk has no time step, or another number of sequences than the one before.

    Source: Zucchet, Meier, Schug, Mujika, Sacramento 2023, arXiv:2305.15947; one layer: Mozer 1989.

    >>> from fgtrain.models import DiagonalRNN
    >>> model, tokens = DiagonalRNN(2, width=3), torch.tensor([[0, 1, 1, 0]])
    >>> whole = Backprop()(model, lambda m: m(tokens)[..., 0].sum())
    >>> online = ForwardInTime()
    >>> first, last = (online(model, lambda m: m(part)[..., 0].sum()) for part in tokens.split(2, dim=1))
    >>> all(torch.allclose(g, first.grads[name] + last.grads[name]) for name, g in whole.grads.items())
    True
    """

    scalar_reducible = False
    backpropagates = True
    gives_derivatives = False
    backward_pass = "whole"
    state_of_model = "the state and the traces"
    loss_at_parameters = False  # it is that of the stream; a plain pass starts from the state 0

    def __init__(self) -> None:
        super().__init__()
        self.traces = nn.Module()

    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        found = {name: module for name, module in model.named_modules() if isinstance(module, DiagonalRecurrence)}
        if not found:
            raise UnsupportedOperation(
                f"{type(model).__name__} has no DiagonalRecurrence, whose past forward-in-time learning carries "
                "forwards; use fgtrain.models.DiagonalRNN, or train with another method"
            )
        if reduce is not None:
            raise UnsupportedOperation(
                "forward-in-time learning runs in one process, because a checkpoint would hold the state of the first "
                "process's sequences only; use one process"
            )
        ends: dict[str, list[Tensor]] = {}
        with forwards_replaced({m: partial(self._chunk, name, m, ends) for name, m in found.items()}, "run"):
            estimate = Backprop()(model, loss_fn)
        for name, values in ends.items():
            for part, value in zip(PARTS, values, strict=True):
                self.traces.register_buffer(_key(name, part), value)
        return estimate

    def _chunk(
        self,
        name: str,
        layer: DiagonalRecurrence,
        ends: dict[str, list[Tensor]],
        x: Tensor,
        start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`layer.run` on a chunk, from the stored state; its last state and traces go to `ends`."""
        if start is not None:
            raise UnsupportedOperation(
                f"the model or its loss gives {name or 'the recurrence'} a state to start from, but this method "
                "carries the state forwards; leave it out, or train with another method"
            )
        if name in ends:
            raise UnsupportedOperation(
                f"the model or its loss calls {name or 'the recurrence'} twice, so that it has no single state to "
                "carry forwards; call it once, or train with another method"
            )
        refuse_no_sequences(x)
        a = layer.factors()
        before = self._start(name, x, a)
        states, *after = _Chunk.apply(x, layer.input_weight(), a, *before)
        finite = torch.stack([value.isfinite().all() for value in after]).all()
        ends[name] = [torch.where(finite, new, old) for new, old in zip(after, before, strict=True)]
        return states, ends[name][0]

    def _start(self, name: str, x: Tensor, a: Tensor) -> list[Tensor]:
        """State (B, N) and traces (B, N) and (B, N, I) before a chunk; zeros before the first."""
        held = dict(self.traces.named_buffers())
        if _key(name, "state") not in held:
            shapes = ((len(x), len(a)), (len(x), len(a)), (len(x), len(a), x.shape[-1]))
            return [a.new_zeros(shape) for shape in shapes]
        start = [held[_key(name, part)] for part in PARTS]
        if len(start[0]) != len(x):
            raise DataError(
                f"a chunk has {len(x)} sequences, but the stream so far has {len(start[0])}: every chunk must go on "
                "with the same sequences, as those of fgtrain.data.Recall and TextStream do"
            )
        return start

    def make_room(self, state: Mapping[str, Tensor]) -> None:
        self.traces = buffers_in(state, "traces")


def _key(name: str, part: str) -> str:
    """The name of a buffer; it must hold no dot."""
    return f"{name}.{part}".replace(".", "/")


class _Chunk(torch.autograd.Function):
    """The states of a chunk and the traces after it; backwards, the gradients that the class above states."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, start: Tensor, by_factor: Tensor, by_weight: Tensor
    ) -> tuple[Tensor, ...]:
        x = x.to(weight.dtype)
        states = scan(a, as_units((x @ weight.T).to(x.dtype), a), start)  # autocast would lower it
        ctx.save_for_backward(x, weight, a, start, states, by_factor, by_weight)
        powers = a ** torch.arange(x.shape[1] - 1, -1, -1, device=x.device)[:, None]  # (T, N)
        carried = powers[0] * a
        by_factor = carried * by_factor + powers[0] * start + (powers[1:] * states[:, :-1]).sum(1)
        by_weight = carried[:, None] * by_weight + as_units((x.mT @ as_rows(powers)).to(x.dtype), a).mT
        ends = states[:, -1].clone(), by_factor, by_weight
        ctx.mark_non_differentiable(*ends)
        return as_rows(states), *ends

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, a, start, states, by_factor, by_weight = ctx.saved_tensors
        delta = grads[0]
        later, for_a = scan_gradients(a, states, start, as_units(delta.contiguous(), a))
        rows = as_rows(later).flatten(0, 1)
        into_chunk = a.conj() * later[:, 0]  # the derivative by the state before the chunk
        for_a = for_a + (into_chunk * by_factor.conj()).sum(0)
        from_past = as_rows((into_chunk[..., None] * by_weight.conj()).sum(0).T.contiguous()).T
        for_weight = rows.T @ x.flatten(0, 1) + from_past
        for_x = delta @ weight if ctx.needs_input_grad[0] else None
        return for_x, for_weight, for_a, None, None, None

"""Learning on a stream: what each way to learn through time recalls, and what it costs.

Ways that carry something from one chunk to the next get the same time steps of one stream and do an update at the end
of every chunk. Ways that go back over a whole sequence start each sequence from the state 0. A sequence is two periods
of the stream, so that it holds a symbol and its question.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from fgtrain.data import Recall
from fgtrain.estimators import Backprop, CheckpointedBackprop, Estimate, ForwardInTime, write_grads
from fgtrain.figures import COLOURS, house_style
from fgtrain.memory import peak_mib
from fgtrain.models import DiagonalRecurrence, DiagonalRNN
from fgtrain.models.diagonal import as_rows, as_units, scan
from fgtrain.studies.timing import cpu_seconds
from fgtrain.tasks import Recall as RecallTask

Batch = tuple[Tensor, Tensor]
Learner = Callable[[DiagonalRNN, Batch], Estimate]
"""The gradients of a batch; if it carries a state, successive calls get successive chunks."""


def forward_in_time() -> Learner:
    """Traces carried forwards."""
    estimator = ForwardInTime()
    return lambda model, batch: estimator(model, lambda m: RecallTask().losses(m, batch))


def whole_sequences() -> Learner:
    """Backpropagation through all steps of the batch, from the state 0."""
    return lambda model, batch: Backprop()(model, lambda m: RecallTask().losses(m, batch))


def checkpointed() -> Learner:
    """The same from the states between segments; the activations of a segment are computed again."""
    return lambda model, batch: CheckpointedBackprop()(model, lambda m: RecallTask().losses(m, batch))


def truncated() -> Learner:
    """Backpropagation through the steps of the chunk, from the last state of the one before."""
    states: list[Tensor] | None = None

    def learn(model: DiagonalRNN, batch: Batch) -> Estimate:
        ends: list[Tensor] = []

        def from_states(tokens: Tensor) -> Tensor:
            logits, found = model.run(tokens, states)
            ends.extend(end.detach() for end in found)
            return logits

        nonlocal states
        estimate = Backprop()(model, lambda _: RecallTask().losses(_Net(from_states), batch))
        states = ends
        return estimate

    return learn


def immediate() -> Learner:
    """Backpropagation within each time step: truncated after one step, with the sum over the chunk as the gradient."""
    carry_on = truncated()

    def learn(model: DiagonalRNN, batch: Batch) -> Estimate:
        for module in model.modules():
            if isinstance(module, DiagonalRecurrence):
                module.__class__ = _Immediate
        return carry_on(model, batch)

    return learn


class _Immediate(DiagonalRecurrence):
    """The same states, with no derivative by the state before."""

    def run(self, x: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a = self.factors()
        driven = as_units(F.linear(x, self.input_weight()), a)
        states = scan(a.detach(), driven.detach(), start)
        first = torch.zeros_like(states[:, 0]) if start is None else start
        return as_rows(a * torch.cat([first[:, None], states[:, :-1]], 1) + driven), states[:, -1]


class _Net(torch.nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, tokens: Tensor) -> Tensor:
        return self.function(tokens)


class Way(NamedTuple):
    """A way to learn through time.

    Args:
        make: makes the learner.
        chunk: time steps of a batch; None for whole sequences.
    """

    make: Callable[[], Learner]
    chunk: int | None


WAYS = {
    "forward in time": Way(forward_in_time, 100),
    "full BPTT": Way(whole_sequences, None),
    "full BPTT, checkpoints": Way(checkpointed, None),
    "truncated BPTT, 100": Way(truncated, 100),
    "truncated BPTT, 20": Way(truncated, 20),
    "immediate derivatives": Way(immediate, 100),
}

SAME_GRADIENTS = {"full BPTT, checkpoints": "full BPTT"}
"""What need not be trained, since another way has the same gradients."""


class Recalled(NamedTuple):
    """The result of learning at one lag.

    Args:
        way: its name.
        lag: steps from a symbol to its question.
        lr: the learning rate.
        accuracy: share of the test questions answered right.
        loss: mean over the questions of the validation.
        seconds: CPU time of learning.
    """

    way: str
    lag: int
    lr: float
    accuracy: float
    loss: float
    seconds: float


RATES = (0.003, 0.01, 0.03)
"""The learning rates of the search, the same for every way."""
FEWEST = 200
"""The fewest updates with whole sequences."""


def learn(
    way: str, data: Recall, model: DiagonalRNN, optimizer: Optimizer, updates: int, clip: float | None
) -> Recalled:
    """Train on 100 time steps of the stream for each of `updates`; then test on new sequences.

    A batch without a question does not update the parameters.

    Args:
        way: a key of `WAYS`.
        data: the stream; its own chunk length is not used.
        model: trained in place.
        optimizer: of its parameters.
        updates: their number, with chunks of 100 steps. Shorter chunks have more, and whole sequences as many as make
            the same number of time steps, or `FEWEST`, if that is more.
        clip: largest norm of the gradient; None for none.
    """
    learner, began = WAYS[way].make(), time.process_time()
    for batch in _batches(way, data, updates):
        write_grads(model, learner(model, batch).grads)
        if not (batch[1] >= 0).any():
            continue
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    seconds = time.process_time() - began
    lr = optimizer.param_groups[0]["lr"]
    accuracy, loss = _mean("acc", model, data.test_dataloader()), _mean("loss", model, data.val_dataloader())
    return Recalled(way, data.lag, lr, accuracy, loss, seconds)


def _mean(name: str, model: DiagonalRNN, batches: Iterable[Batch]) -> float:
    with torch.no_grad():
        return torch.cat([RecallTask().metrics(model, batch)[name] for batch in batches]).mean().item()


def _batches(way: str, data: Recall, updates: int) -> Iterator[Batch]:
    chunk, steps = WAYS[way].chunk, 100 * updates
    size = 2 * data.period if chunk is None else chunk
    if chunk is None:
        steps = max(steps, min(FEWEST, updates) * size)
    for start in range(0, steps, size):
        yield data.steps(start, start + size, since=start if chunk is None else 0)


class Cost(NamedTuple):
    """The cost of the gradient of a stream's loss, without updates.

    Args:
        way: its name.
        length: time steps of the stream.
        peak_mib: peak size of the tensors, or above 1,000 steps the growth of the process.
        forward_passes: CPU time over that of a forward pass, in chunks of the same length.
    """

    way: str
    length: int
    peak_mib: float
    forward_passes: float


def cost(way: str, data: Recall, model: DiagonalRNN, length: int) -> Cost:
    """Measure a way on one stream of `length` steps; whole sequences are as long as the stream."""
    size = min(length, WAYS[way].chunk or length)
    places = [(start, min(length, start + size)) for start in range(0, length, size)]

    def gradients() -> None:
        learner = WAYS[way].make()
        for place in places:
            learner(model, data.steps(*place))

    def forwards() -> None:
        states = None
        with torch.no_grad():
            for place in places:
                tokens, targets = data.steps(*place)
                logits, states = model.run(tokens, states)
                RecallTask().losses(_Net(lambda _, logits=logits: logits), (tokens, targets))

    times = [[cpu_seconds(run) for run in (forwards, gradients)] for _ in range(3)]
    forward, gradient = (min(column) for column in zip(*times, strict=True))
    return Cost(way, length, peak_mib(gradients, torch.device("cpu"), is_long=length > 1000), gradient / forward)


def table_of(recalled: Sequence[Recalled], costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """One row for each way."""
    rows = []
    for way in dict.fromkeys([*(r.way for r in recalled), *(c.way for c in costs)]):
        row: dict[str, Any] = {"way": way}
        trained = SAME_GRADIENTS.get(way, way)
        row |= {f"recall at {r.lag}": f"{r.accuracy:.0%}" for r in recalled if r.way == trained}
        row |= {f"MiB at {c.length:,}": f"{c.peak_mib:.3g}" for c in costs if c.way == way}
        row |= {f"passes at {c.length:,}": f"{c.forward_passes:.1f}" for c in costs if c.way == way}
        rows.append(row)
    return rows


@house_style
def draw(recalled: Sequence[Recalled], costs: Sequence[Cost]) -> Figure:
    """Accuracy against lag, memory against length, and time against length."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for i, way in enumerate(WAYS):
        look: dict[str, Any] = {"color": COLOURS[i], "marker": "o", "markersize": 3}
        look["linestyle"] = "--" if way in SAME_GRADIENTS else "-"
        own = [r for r in recalled if r.way == way]
        left.plot([r.lag for r in own], [100 * r.accuracy for r in own], **look)
        measured = [c for c in costs if c.way == way]
        middle.plot([c.length for c in measured], [c.peak_mib for c in measured], label=way, **look)
        right.plot([c.length for c in measured], [c.forward_passes for c in measured], **look)
    left.set(xscale="log", xlabel="lag in steps", ylabel="symbols recalled in %", ylim=(0, 103))
    middle.set(xscale="log", yscale="log", xlabel="length of the stream in steps", ylabel="peak memory in MiB")
    right.set(xscale="log", xlabel="length of the stream in steps", ylabel="time in forward passes")
    right.set_ylim(bottom=0)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure

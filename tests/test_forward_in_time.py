"""Online learning: the sum over the chunks of a stream is the gradient of the whole stream."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fgtrain import Backprop, ForwardExact, ForwardInTime, write_grads
from fgtrain.errors import DataError, UnsupportedOperation
from fgtrain.models import DiagonalRecurrence, DiagonalRNN

pytestmark = pytest.mark.usefixtures("float64")

B, T, VOCAB = 3, 60, 5
STREAM = torch.randint(VOCAB, (B, T + 1), generator=torch.Generator().manual_seed(0))
KINDS = pytest.mark.parametrize("max_phase", [0.0, 0.5], ids=["real", "complex"])


def network(depth, max_phase, memory=200.0):
    torch.manual_seed(0)
    return DiagonalRNN(VOCAB, 4, depth, memory, max_phase)


def summed(tokens, following):
    return lambda model: F.cross_entropy(model(tokens).flatten(0, 1), following.flatten(), reduction="sum")


def over_the_stream(estimator, model, length):
    """The sum of the estimates of all chunks, and of their losses."""
    total, loss = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, torch.zeros(())
    for tokens, following in zip(STREAM[:, :-1].split(length, 1), STREAM[:, 1:].split(length, 1), strict=True):
        estimate = estimator(model, summed(tokens, following))
        loss = loss + estimate.loss
        total = {name: g + estimate.grads[name] for name, g in total.items()}
    return total, loss


@KINDS
@pytest.mark.parametrize("length", [1, 7, T])
def test_one_layer_has_the_gradient_of_the_whole_stream(length, max_phase):
    model = network(1, max_phase)
    exact = Backprop()(model, summed(STREAM[:, :-1], STREAM[:, 1:]))
    found, loss = over_the_stream(ForwardInTime(), model, length)
    torch.testing.assert_close(loss, exact.loss)
    torch.testing.assert_close(found, exact.grads, rtol=1e-10, atol=1e-10)


class Doubled(DiagonalRecurrence):
    def forward(self, x):
        return 2 * super().forward(x)


class Run(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrence = DiagonalRecurrence(VOCAB, 4, 200.0, 0.5)

    def forward(self, x):
        return self.recurrence.run(x)[0]


class Own(nn.Module):
    """A model of the user's."""

    def __init__(self, recurrence):
        super().__init__()
        self.recurrence, self.head = recurrence, nn.Linear(8, VOCAB)

    def forward(self, tokens):
        return self.head(self.recurrence(F.one_hot(tokens, VOCAB).double()))


@pytest.mark.parametrize("make", [lambda: Doubled(VOCAB, 4, 200.0, 0.5), Run], ids=["own forward", "calls run"])
def test_a_recurrence_may_be_called_in_any_way(make):
    torch.manual_seed(0)
    model = Own(make())
    exact = Backprop()(model, summed(STREAM[:, :-1], STREAM[:, 1:])).grads
    torch.testing.assert_close(over_the_stream(ForwardInTime(), model, 7)[0], exact, rtol=1e-10, atol=1e-10)
    assert all("run" not in module.__dict__ for module in model.modules())


def test_a_chunk_that_is_not_finite_does_not_end_the_stream():
    torch.manual_seed(0)
    model, estimator = nn.Sequential(DiagonalRecurrence(2, 3, 20.0, 0.5)), ForwardInTime()
    chunks = torch.randn(3, B, 4, 2).unbind()
    estimator(model, lambda m: m(chunks[0]).sum())
    skipped = copy.deepcopy(estimator)
    assert not skipped(model, lambda m: m(chunks[1] / 0).sum()).loss.isfinite()
    found, expected = (e(model, lambda m: m(chunks[2]).sum()) for e in (skipped, estimator))
    torch.testing.assert_close(found.grads, expected.grads)


def test_the_far_past_matters_for_that():
    """Without it, truncated backpropagation would pass the test above."""
    model = network(1, 0.5)
    exact = Backprop()(model, summed(STREAM[:, :-1], STREAM[:, 1:])).grads
    states, total = None, {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for tokens, following in zip(STREAM[:, :-1].split(20, 1), STREAM[:, 1:].split(20, 1), strict=True):
        logits, ends = model.run(tokens, states)
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")
        total = {
            name: total[name] + g
            for name, g in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True)
        }
        states = [end.detach() for end in ends]
    for name in ("layers.0.recurrence.log_rate", "layers.0.recurrence.phase", "layers.0.recurrence.weight"):
        assert (total[name] - exact[name]).norm() > 0.01 * exact[name].norm(), name


class PresentInputs(DiagonalRecurrence):
    """The layer below gets its gradient from the present input alone."""

    def forward(self, x):
        present = nn.functional.linear(x - x.detach(), self.input_weight().detach())
        return super().forward(x.detach()) + present


@KINDS
@pytest.mark.parametrize("depth", [2, 3])
def test_stacked_layers_have_the_stated_bias(depth, max_phase):
    model = network(depth, max_phase)
    exact = Backprop()(model, summed(STREAM[:, :-1], STREAM[:, 1:])).grads
    cut = copy.deepcopy(model)
    for layer in cut.layers:
        layer.recurrence.__class__ = PresentInputs
    expected = Backprop()(cut, summed(STREAM[:, :-1], STREAM[:, 1:])).grads
    for length in (1, 7, T):
        found, _ = over_the_stream(ForwardInTime(), model, length)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    last, first = f"layers.{depth - 1}.recurrence.weight", "layers.0.recurrence.weight"
    torch.testing.assert_close(expected[last], exact[last])
    assert (expected[first] - exact[first]).norm() > 0.01 * exact[first].norm()


@pytest.mark.slow
@KINDS
def test_a_compiled_model_has_the_same_gradient(max_phase):
    model = network(1, max_phase)
    compiled = torch.compile(model, backend="eager")
    expected = Backprop()(model, summed(STREAM[:, :6], STREAM[:, 1:7])).grads
    for estimator in (Backprop(), ForwardInTime()):
        found = estimator(compiled, summed(STREAM[:, :6], STREAM[:, 1:7])).grads
        torch.testing.assert_close({name.removeprefix("_orig_mod."): g for name, g in found.items()}, expected)


def test_the_model_alone_starts_from_nothing_whatever_the_stream_so_far():
    model, estimator = network(2, 0.5), ForwardInTime()
    before = model(STREAM)
    over_the_stream(estimator, model, 20)
    assert torch.equal(model(STREAM), before)
    assert not list(model.buffers())


def test_forward_mode_takes_the_model_too():
    model = network(2, 0.5)
    exact, found = (e(model, summed(STREAM[:, :6], STREAM[:, 1:7])).grads for e in (Backprop(), ForwardExact()))
    torch.testing.assert_close(found, exact)


def test_under_autocast_states_and_traces_stay_in_single_precision():
    model, estimator = network(2, 0.5).float(), ForwardInTime()
    with torch.autocast("cpu", torch.bfloat16):
        grads = over_the_stream(estimator, model, 20)[0]
    exact = over_the_stream(ForwardInTime(), model, 20)[0]
    assert {buffer.dtype for buffer in estimator.buffers()} == {torch.complex64}
    for name, g in exact.items():
        assert (grads[name] - g).norm() <= 0.1 * g.norm(), name


def test_what_is_carried_does_not_grow_with_the_stream():
    model, estimator = network(2, 0.5), ForwardInTime()
    sizes = []
    for tokens, following in zip(STREAM[:, :-1].split(6, 1), STREAM[:, 1:].split(6, 1), strict=True):
        estimator(model, summed(tokens, following))
        sizes.append(sum(buffer.numel() for buffer in estimator.buffers()))
    assert set(sizes) == {B * 4 * (VOCAB + 2) + B * 4 * (4 + 2)}
    assert not any(buffer.requires_grad for buffer in estimator.buffers())


def trained(model, estimator, optimizer, chunks):
    for tokens, following in chunks:
        write_grads(model, estimator(model, summed(tokens, following)).grads)
        optimizer.step()


def test_state_and_traces_are_in_the_state_dict():
    """Training goes on from saved states bit for bit."""
    chunks = list(zip(STREAM[:, :-1].split(6, 1), STREAM[:, 1:].split(6, 1), strict=True))
    model, estimator = network(2, 0.5), ForwardInTime()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trained(model, estimator, optimizer, chunks[:4])
    saved = copy.deepcopy([part.state_dict() for part in (model, estimator, optimizer)])
    trained(model, estimator, optimizer, chunks[4:])

    again = network(2, 0.5)
    parts = again, ForwardInTime(), torch.optim.SGD(again.parameters(), lr=0.01, momentum=0.9)
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    trained(*parts, chunks[4:])
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("make", "run", "error", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            lambda estimator, model: estimator(model, lambda m: m(torch.ones(2)).sum()),
            UnsupportedOperation,
            "Linear has no DiagonalRecurrence, .* use fgtrain.models.DiagonalRNN, or train with another method",
        ),
        (
            lambda: network(1, 0.5),
            lambda estimator, model: estimator(model, lambda m: (m(STREAM) - m(STREAM[:, :3])[:, :1]).sum()),
            UnsupportedOperation,
            "calls layers.0.recurrence twice",
        ),
        (
            lambda: network(1, 0.5),
            lambda estimator, model: [estimator(model, lambda m, rows=rows: m(STREAM[:rows]).sum()) for rows in (3, 2)],
            DataError,
            "a chunk has 2 sequences, but the stream so far has 3: every chunk must go on with the same",
        ),
        (
            lambda: network(1, 0.5),
            lambda estimator, model: estimator(model, lambda m: m(STREAM).sum(), reduce=lambda x: x),
            UnsupportedOperation,
            "one process, because .* use one process",
        ),
        (
            lambda: network(1, 0.5),
            lambda estimator, model: estimator(model, lambda m: m.run(STREAM, m.run(STREAM)[1])[0].sum()),
            UnsupportedOperation,
            "gives layers.0.recurrence a state to start from, .* leave it out",
        ),
    ],
    ids=["no recurrence", "called twice", "other sequences", "several processes", "given state"],
)
def test_what_it_cannot_train_is_one_line(make, run, error, message):
    with pytest.raises(error, match=message) as refusal:
        run(ForwardInTime(), make())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("option", "value"), [("width", 0), ("depth", 0), ("memory", 0.5), ("max_phase", -1.0)])
def test_bad_sizes_are_named(option, value):
    with pytest.raises(ValueError, match=f"{option} must be at least [01], got {value}"):
        DiagonalRNN(VOCAB, **{option: value})


@KINDS
def test_the_gradient_of_a_recurrence_is_that_of_central_differences(max_phase):
    torch.manual_seed(0)
    layer = DiagonalRecurrence(2, 3, 20.0, max_phase)
    dtype = layer.factors().dtype
    x, start = torch.randn(2, 5, 2, requires_grad=True), torch.randn(2, 3, dtype=dtype, requires_grad=True)

    def run(x, start, *params):
        outputs, end = functional_run(layer, dict(zip(dict(layer.named_parameters()), params, strict=True)), x, start)
        return outputs, torch.view_as_real(end) if end.is_complex() else end

    assert torch.autograd.gradcheck(run, (x, start, *layer.parameters()))


def functional_run(layer, params, x, start):
    layer = copy.deepcopy(layer)
    for name, p in params.items():
        delattr(layer, name)
        setattr(layer, name, p)
    return layer.run(x, start)


def test_a_silent_token_leaves_the_states_to_decay():
    torch.manual_seed(0)
    model = DiagonalRNN(VOCAB, 4, 1, 20.0, 0.5, silent=2)
    _, (before,) = model.run(torch.tensor([[0, 1]]))
    _, (after,) = model.run(torch.tensor([[0, 1, 2, 2, 2]]))
    (recurrence,) = [module for module in model.modules() if isinstance(module, DiagonalRecurrence)]
    torch.testing.assert_close(after, before * recurrence.factors() ** 3)


def test_a_silent_token_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="silent must be a token below vocab_size=5 or None, got 5"):
        DiagonalRNN(5, silent=5)


@pytest.mark.parametrize("estimator", [ForwardInTime(), Backprop()], ids=["online", "backprop"])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 3), r"tokens must be integers .* got float32 of shape \(2, 3\)"),
        (torch.zeros(3, dtype=torch.long), r"tokens must be integers .* got int64 of shape \(3,\)"),
        (torch.full((2, 3), 5), "tokens run from 5 to 5; they must be from 0 to 4, for vocab_size=5"),
        (torch.full((2, 3), -1), "tokens run from -1 to -1; they must be from 0 to 4, for vocab_size=5"),
        (torch.zeros(2, 0, dtype=torch.long), "one time step or more"),
    ],
)
def test_tokens_that_are_none_are_one_line(estimator, tokens, message):
    with pytest.raises(DataError, match=message):
        estimator(DiagonalRNN(5, width=3), lambda m: m(tokens).square().sum())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_tokens_may_be_integers_of_any_size(dtype):
    model, tokens = DiagonalRNN(5, width=3), torch.tensor([[0, 4, 1]])
    assert torch.equal(model(tokens.to(dtype)), model(tokens))

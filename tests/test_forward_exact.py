"""The exact gradient by forward mode, beyond what tests/test_methods.py holds of every exact method."""

import copy
import logging
from collections import OrderedDict, defaultdict, deque

import pytest
import torch
from torch import nn

from fgtrain import Backprop, ForwardExact, write_grads
from fgtrain.errors import LossError
from fgtrain.estimators import forward_exact
from fgtrain.tangents.directions import LowRankTangent, dense, num_of
from tests import properties
from tests.cases import CASES, INPUTS, LABELS, Case
from tests.properties import estimated_grads, exact_grads


@pytest.mark.parametrize("chunk_size", [1, 5, 64, None])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_in_any_chunks(case, chunk_size):
    properties.assert_is(estimated_grads(ForwardExact(chunk_size), case), exact_grads(case))


def passes_of(estimator, model, loss, monkeypatch):
    """The directions of each pass."""
    seen = []

    def jvp(model, loss_fn, tangents):
        seen.append(tangents)
        return forward_exact_jvp(model, loss_fn, tangents)

    forward_exact_jvp = forward_exact.jvp
    monkeypatch.setattr(forward_exact, "jvp", jvp)
    estimator(model, loss)
    return seen


def test_a_unit_matrix_is_two_unit_vectors(monkeypatch):
    """So a chunk of c directions of an m x n matrix holds c (m + n) numbers, not c m n."""
    seen = passes_of(ForwardExact(5), CASES[2].build(), CASES[2].loss, monkeypatch)
    for tangents in seen:
        for tangent in tangents.values():
            assert isinstance(tangent, LowRankTangent) or tangent[0].dim() == 1
        entries = torch.cat([dense(tangent).flatten(1) for tangent in tangents.values()], dim=1)
        assert torch.equal(entries.square().sum(1), torch.ones(len(entries), dtype=entries.dtype))
        assert torch.equal(entries.sum(1), torch.ones(len(entries), dtype=entries.dtype))
    assert [num_of(tangents) for tangents in seen] == [5] * 19 + [1]  # 54 + 3 + 36 + 3 = 96 numbers


def test_parameters_of_a_few_numbers_share_a_pass(monkeypatch):
    model = nn.ParameterDict({name: torch.randn(()) for name in "abcd"})
    loss = lambda m: (m["a"] * m["b"] + m["c"].sin()) ** 2 + m["d"].exp()
    assert [set(tangents) for tangents in passes_of(ForwardExact(), model, loss, monkeypatch)] == [set("abcd")]


class Branches(nn.Module):
    """A branch for even and one for odd steps, after a layer whose derivatives are 0 at first."""

    def __init__(self):
        super().__init__()
        self.first, self.even, self.odd, self.last = (nn.Linear(3, 3) for _ in range(4))
        nn.init.zeros_(self.last.weight)

    def loss(self, step):
        branch = self.odd if step % 2 else self.even
        return lambda m: m.last(branch(m.first(INPUTS)).tanh()).square().mean()


@pytest.mark.parametrize("chunk_size", [1, 64])
def test_what_a_step_does_not_use_has_no_gradient(chunk_size, caplog):
    """So Adam moves it as under backpropagation; a parameter with the gradient zero is moved by its momentum."""
    model = Branches().double()
    again = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, again)]
    for step in (0, 0, 1, 0):
        estimate = ForwardExact(chunk_size)(model, model.loss(step))
        grads = [estimate.grads, Backprop()(again, again.loss(step)).grads]
        assert grads[0].keys() == grads[1].keys()
        assert estimate.replayed is not None
        replayed = ForwardExact(chunk_size).replay(model, estimate.replayed, torch.Generator())
        properties.assert_is(replayed, estimate.grads)
        for m, found, optimizer in zip((model, again), grads, optimizers, strict=True):
            write_grads(m, found)
            optimizer.step()
    properties.assert_is(model.state_dict(), again.state_dict())
    assert not caplog.records


def test_what_only_another_rank_uses_has_a_gradient():
    model, sent = Branches().double(), list[torch.Tensor]()
    ForwardExact()(model, model.loss(1), reduce=lambda x: sent.append(x) or x)
    found = ForwardExact()(model, model.loss(0), reduce=lambda x: (x + sent.pop(0)) / 2)
    assert not sent
    assert found.grads.keys() == dict(model.named_parameters()).keys()


IN_PLACE = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)),
    "one position": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 3)
    ),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_bias_that_moves_alone_before_an_activation_in_place(name, rows):
    """Its derivatives are those of no other row, and stay what they were."""
    case = Case(name, IN_PLACE[name], lambda m: nn.functional.cross_entropy(m(INPUTS[:rows]), LABELS[:rows]))
    properties.assert_is(estimated_grads(ForwardExact(), case), exact_grads(case))


def test_a_loss_without_the_model_is_refused():
    with pytest.raises(LossError, match="the loss carries no tangent"):
        ForwardExact()(nn.Linear(3, 2), lambda m: INPUTS.float().sum(1))


def test_many_parameters_are_told_once(caplog):
    model = nn.Linear(5000, 2)
    estimator = ForwardExact(2500)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            estimator(model, lambda m: m(torch.ones(1, 5000)).sum(1))
    (record,) = caplog.records
    assert record.getMessage() == "ForwardExact takes 10002 derivatives a step, one for every parameter"


class Counting(nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.layer, self.kept = nn.Linear(3, 2), kept

    def forward(self, x):
        number = len(self.kept) + 1
        if isinstance(self.kept, dict):
            self.kept[number] = number
        else:
            (self.kept.add if isinstance(self.kept, set) else self.kept.append)(number)
        return number * self.layer(x)


@pytest.mark.parametrize("kept", [[], deque(maxlen=9), set(), defaultdict(int), OrderedDict()], ids=type)
def test_what_a_pass_adds_to_a_container_is_added_once_a_step(kept):
    for step in (1, 2):
        grads = ForwardExact(1)(Counting(kept), lambda m: m(torch.ones(1, 3)).sum(1)).grads
        assert list(kept) == list(range(1, step + 1))
        assert grads["layer.bias"].tolist() == [step, step]


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5])
def test_bad_arguments(chunk_size):
    with pytest.raises(ValueError, match="chunk_size must be an integer of at least 1, got"):
        ForwardExact(chunk_size)


def test_parameters_without_elements():
    model = nn.ParameterDict(
        {"a": torch.ones(2), "none": torch.empty(0), "nothing": torch.empty(0, 3), "b": torch.ones(2)}
    )
    found = ForwardExact(3)(model, lambda m: m["a"].exp().sum() + m["none"].sum() + m["b"].sin().sum()).grads
    assert {name: tuple(g.shape) for name, g in found.items()} == {"a": (2,), "none": (0,), "b": (2,)}
    torch.testing.assert_close([found["a"], found["b"]], [model["a"].exp().detach(), model["b"].cos().detach()])

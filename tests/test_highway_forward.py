"""Highway without a backward pass: closed forms and estimates against backpropagation."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fgtrain import ActivityPerturbation, Backprop, ForwardExact, Highway
from fgtrain.estimators import highway_forward
from fgtrain.forward_ad import jvp
from fgtrain.layer_noise.closed_forms import Dependence, closed_forms
from fgtrain.layer_noise.rows import rows_of_examples
from fgtrain.models import TransformerLM
from fgtrain.network.parameters import slots_of
from tests.residual import MODELS, Residual, assert_same, built, stopped, tokens

EXACT = {
    "MLP": {"0", *(f"{i}.branch.2" for i in (2, 3, 4)), "5"},
    "rectified MLP": {"0", *(f"{i}.branch.2" for i in (2, 3, 4)), "5"},
    "MLP with batch norms": {"4"},
    "transformer": {"tokens", "positions", *(f"blocks.{i}.contract" for i in (0, 1, 2)), "head"},
    "transformer, tied": {"positions", *(f"blocks.{i}.contract" for i in (0, 1))},
    "convolutions": {"0", "2.branch.2", "4"},
}
"""The layers with a closed form: the last of every branch, what the first block takes, and the last of all."""


def convolutions():
    torch.manual_seed(0)
    branch = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)]
    block = Residual(*branch, rectified=True)
    model, x = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), block, nn.Flatten(), nn.Linear(12, 3)),
        torch.randn(3, 2, 4, 4),
    )
    return model, lambda m: m(x).square().sum(1), ["2"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", EXACT)
def test_layers_with_a_closed_form_are_exact(name):
    model, loss, blocks = built(name) if name in MODELS else convolutions()
    exact = Backprop()(stopped(model, blocks), loss).grads
    found = Highway(ActivityPerturbation(2))(model, loss).grads
    assert found.keys() == exact.keys()
    modules = {p.rpartition(".")[0] for p in exact}
    same = {
        m
        for m in modules
        if all((found[p] - g).norm() <= 1e-10 * g.norm() for p, g in exact.items() if p.rpartition(".")[0] == m)
    }
    assert same >= EXACT[name]
    assert same < modules


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_estimates_are_unbiased():
    """The mean of the estimates is within five standard errors of the gradient along the skips, entry by entry."""
    torch.manual_seed(0)
    model, x = TransformerLM(7, 6, 8, 1, 2), tokens(3, 6)

    def loss(net):
        losses = nn.functional.cross_entropy(net(x).flatten(0, 1), x.roll(-1, 1).flatten(), reduction="none")
        return losses.view(3, 6).mean(1)

    exact = Backprop()(stopped(model, ["blocks.0"]), loss).grads
    highway, generator = Highway(ActivityPerturbation(4)), torch.Generator().manual_seed(0)
    draws = [highway(model, loss, generator=generator).grads for _ in range(40)]
    for name, g in exact.items():
        values = torch.stack([draw[name] for draw in draws])
        error = values.std(0) / len(draws) ** 0.5
        assert bool(((values.mean(0) - g).abs() <= 5 * error + 1e-8 * g.norm()).all()), name


@pytest.mark.usefixtures("float64")
def test_a_dropout_mask_is_part_of_the_closed_form():
    torch.manual_seed(0)
    branch = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Dropout(0.5)]
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), Residual(*branch), nn.Linear(6, 3)), torch.randn(5, 4)
    loss = lambda m: m(x).square().sum(1)
    torch.manual_seed(1)
    exact = Backprop()(stopped(model, ["2"]), loss).grads
    for _ in range(2):  # the layers are found at the first call
        torch.manual_seed(1)
        found = Highway(ActivityPerturbation())(model, loss).grads
        for layer in ("0", "2.branch.2", "3"):
            for key in (f"{layer}.weight", f"{layer}.bias"):
                torch.testing.assert_close(found[key], exact[key], rtol=1e-10, atol=1e-14)


class PassedBy(nn.Module):
    """The stem reaches the loss on a second path; one layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.beside, self.head = (nn.Linear(n, 6) for n in (4, 6, 6, 6))
        self.blocks = nn.ModuleList(Residual(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        x = self.blocks[0](self.twice(stem))
        x = self.blocks[1](x + self.twice(x) + self.beside(stem).tanh())
        return self.head(x) * stem


class Exact(Backprop):
    """Stands for an estimator that is exact without a backward pass."""

    backpropagates = False


@pytest.mark.usefixtures("float64")
def test_layers_on_several_paths_are_left_to_the_estimator():
    torch.manual_seed(0)
    model, x = PassedBy(), torch.randn(5, 4)
    loss = lambda m: m(x).square().sum(1)
    expected = Backprop()(stopped(model, ["blocks.0", "blocks.1"]), loss)
    assert_same(Highway(Exact())(model, loss), expected)
    found = Highway(ActivityPerturbation())(model, loss).grads
    same = {name.rpartition(".")[0] for name, g in expected.grads.items() if torch.allclose(found[name], g)}
    assert same == {"beside", "blocks.0.branch.0", "blocks.1.branch.0", "head"}


class WithUnused(nn.Module):
    """A residual block with a layer and a scale that no pass uses."""

    def __init__(self, scales: bool) -> None:
        super().__init__()
        self.first, self.last, self.unused = (nn.Linear(6, 6) for _ in range(3))
        self.scales, self.scale = scales, nn.Parameter(torch.full((6,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return x + self.last(hidden * self.scale if self.scales else hidden)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scales", [False, True])
def test_what_a_block_does_not_use_takes_no_gradient_from_the_rest(scales):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 6), *(WithUnused(scales) for _ in range(2)), nn.Linear(6, 3)),
        torch.randn(5, 4),
    )
    loss = lambda m: m(x).square().sum(1)
    expected = Backprop()(stopped(model, ["1", "2"]), loss)
    assert_same(Highway(ForwardExact())(model, loss), expected)
    found = Highway(ActivityPerturbation())(model, loss).grads
    assert found.keys() >= expected.grads.keys()
    torch.testing.assert_close(found["1.last.weight"], expected.grads["1.last.weight"])


class Switched(nn.Module):
    """A residual block that mixes its channels behind the layer, or does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.mixes = nn.Linear(6, 6), False

    def forward(self, x: Tensor) -> Tensor:
        branch = self.layer(x)
        return x + (branch.cumsum(1) if self.mixes else branch)


@pytest.mark.usefixtures("float64")
def test_a_layer_that_stops_being_diagonal_is_estimated():
    torch.manual_seed(0)
    block = Switched()
    model, x = nn.Sequential(nn.Linear(4, 6), block, nn.Linear(6, 3)), torch.randn(5, 4)
    loss = lambda m: m(x).square().sum(1)
    for block.mixes in (False, True):
        assert_same(Highway(Exact())(model, loss), Backprop()(stopped(model, ["1"]), loss))
        assert closed_forms(block, lambda b: b(x[:, :1].expand(5, 6)).flatten(), torch.ones(5, 6))[0].keys() == (
            set() if block.mixes else {"layer.weight", "layer.bias"}
        )


def test_tokens_are_told_from_sequences():
    torch.manual_seed(0)
    block, x = TransformerLM(7, 6, 8, 1, 2).blocks[0], torch.randn(3, 6, 8)
    _, dependence = closed_forms(block, lambda b: b(x).flatten(), torch.randn(3, 6, 8))
    assert isinstance(dependence, Dependence)
    assert dependence.diagonal == {"contract.weight"}
    assert dependence.by_rows == {"project.weight", "expand.weight", "contract.weight"}


class OfTokens(nn.Module):
    """Tokens (B, T, 2) that a sum over those before them mixes between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Linear(2, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.before(x).tanh().cumsum(1)).tanh()


@pytest.mark.usefixtures("float64")
def test_the_losses_of_tokens_serve_the_layers_that_do_not_mix_them():
    """With a direction for every unit, a layer whose rows are known has the exact gradient."""
    torch.manual_seed(0)
    model, x = OfTokens(), torch.randn(2, 5, 2)
    model.before.requires_grad_(False)
    loss = lambda m: m(x).square().sum(2).flatten()
    assert_same(ActivityPerturbation(4)(model, loss), Backprop()(copy.deepcopy(model), loss))
    model.before.requires_grad_(True)
    ActivityPerturbation(4)(model, loss)
    *_, found = slots_of(model).cached(rows_of_examples, dict).values()
    assert found.keys() == {"behind.weight"}


def test_rounding_does_not_mix_the_examples_of_a_trained_network():
    """At large logits, the derivatives of a loss written by hand are differences of nearly equal numbers."""
    torch.manual_seed(0)
    last = nn.Linear(6, 3)
    model = nn.Sequential(nn.Linear(5, 6), Residual(nn.Linear(6, 6), nn.Tanh()), nn.LayerNorm(6), last)
    x = torch.randn(2, 5)
    with torch.no_grad():
        last.weight.mul_(70)
        targets = model(x).argmax(1, keepdim=True)
    loss = lambda m: -m(x).log_softmax(1).gather(1, targets)[:, 0]
    assert Highway(ActivityPerturbation(2))(model, loss).grads.keys() == dict(model.named_parameters()).keys()


def test_the_rows_of_delta_are_tried_once(monkeypatch):
    model, loss, _ = built("mixer")
    counts = []

    def counted(probed, loss_fn, tangents):
        counts.append(tangents["probe"].shape[1:])
        return jvp(probed, loss_fn, tangents)

    monkeypatch.setattr(highway_forward, "jvp", counted)
    highway = Highway(ActivityPerturbation(), chunk_size=None)
    numbers = []
    for _ in range(2):
        counts.clear()
        highway(model, loss)
        numbers.append(len(counts))
    assert numbers == [2, 1]


class OnGraph(nn.Module):
    """x + sum of the neighbours; node 0 has none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        edges = torch.tensor([[1, 2, 3, 4, 1], [2, 3, 4, 1, 3]])
        z = self.inner(x)
        return x + self.outer(z.index_add(1, edges[1], z[:, edges[0]]).tanh())


def test_nodes_of_a_graph_are_not_separate_rows():
    x, delta = torch.randn(3, 5, 6), torch.randn(3, 5, 6)
    _, dependence = closed_forms(OnGraph(), lambda m: m(x).flatten(), delta)
    assert dependence.by_rows == {"outer.weight"}

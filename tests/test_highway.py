"""Highway against its definition: a network whose blocks compute x + f(stop(x)) has its gradient by backpropagation."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fgtrain import Backprop, ForwardGradient, Highway, LocalLosses, MeZO
from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.estimators import highway_forward
from fgtrain.forward_ad import jvp
from fgtrain.forward_ad.row_losses import num_marks
from fgtrain.memory import peak_mib
from fgtrain.network.parameters import slots_of
from tests.residual import (
    EVERY_MODEL,
    Residual,
    assert_leaves_the_trace_of_one_pass,
    assert_same,
    built,
    mlp,
    stopped,
)


class WithoutABackwardPass(Backprop):
    """Stands for an estimator that is exact without one."""

    backpropagates = False


@pytest.mark.usefixtures("float64")
@EVERY_MODEL
def test_gradient_along_the_skips(name):
    model, loss, blocks = built(name)
    expected = Backprop()(stopped(model, blocks), loss)
    assert_same(Highway(iterations=0)(copy.deepcopy(model), loss), expected)
    assert_same(Highway(blocks=blocks, iterations=0)(model, loss), expected)


@pytest.mark.usefixtures("float64")
@EVERY_MODEL
def test_with_as_many_iterations_as_blocks_the_gradient_is_exact(name):
    model, loss, blocks = built(name)
    expected = Backprop()(copy.deepcopy(model), loss)
    assert_same(Highway(iterations=len(blocks))(model, loss), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_iterations_are_paths_through_branches(iterations):
    """With branches of slope t, the gradient is a polynomial in t; k iterations give its terms up to t^k at t = 1."""
    model, loss, blocks = built("MLP")
    slopes = torch.arange(5.0)
    found = [Backprop()(stopped(model, blocks, float(t)), loss).grads for t in slopes]
    powers = torch.linalg.inv(slopes[:, None] ** torch.arange(5))[: iterations + 1].sum(0)
    estimate = Highway(iterations=iterations)(model, loss)
    for name, g in estimate.grads.items():
        torch.testing.assert_close(g, sum(c * grads[name] for c, grads in zip(powers, found, strict=True)), msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@EVERY_MODEL
def test_delta_by_forward_mode(name):
    model, loss, blocks = built(name)
    estimator, mixes = Highway(WithoutABackwardPass(), chunk_size=40), name == "ResNet"
    if mixes:
        with pytest.raises(UnsupportedOperation, match="examples are mixed after a residual block"):
            estimator(model, loss)
        model.eval()
    expected = Backprop()(stopped(model, blocks), loss)
    assert_same(estimator(model, loss), expected)


@pytest.mark.usefixtures("float64")
@EVERY_MODEL
def test_leaves_the_trace_of_one_pass(name):
    assert_leaves_the_trace_of_one_pass(Highway(iterations=0), name)
    assert_leaves_the_trace_of_one_pass(Highway(iterations=2), name)


@pytest.mark.usefixtures("float64")
def test_dropout_masks_of_a_block_are_those_of_one_pass():
    """The gradient of a block is that of the function which the block computed, so a dropped branch has none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Residual(nn.Linear(6, 6), nn.Dropout(0.5)), nn.Linear(6, 3))
    x = torch.randn(1, 4)
    seen = []
    model.get_submodule("1.branch.1").register_forward_hook(lambda _, inputs, out: seen.append((out == 0).flatten()))
    estimate = Highway(iterations=0)(model, lambda m: m(x).square().sum(1))
    dropped = seen[-1]
    assert dropped.any()
    assert not dropped.all()
    assert torch.equal(estimate.grads["1.branch.0.bias"] == 0, dropped)
    assert all(torch.equal(mask, dropped) for mask in seen[-2:])


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("estimator", [ForwardGradient(num_tangents=3), MeZO(num_tangents=2)], ids=["jvp", "mezo"])
def test_noisy_estimators_within_blocks_are_unbiased(estimator):
    """The mean of the estimates is within five standard errors of the gradient along the skips, entry by entry."""
    model, loss, blocks = built("MLP")
    exact = Backprop()(stopped(model, blocks), loss).grads
    highway, generator = Highway(estimator), torch.Generator().manual_seed(0)
    draws = [highway(model, loss, generator=generator).grads for _ in range(100)]
    for name, g in exact.items():
        values = torch.stack([draw[name] for draw in draws])
        error = values.std(0) / len(draws) ** 0.5
        bias = 1e-8 * g.norm() if isinstance(estimator, ForwardGradient) else 1e-4 * (1 + g.norm())
        assert bool(((values.mean(0) - g).abs() <= 5 * error + bias).all()), name


def test_frozen_blocks_pass_the_gradient_on():
    model, loss, blocks = built("MLP")
    model[3].requires_grad_(False)
    expected = Backprop()(stopped(model, blocks), loss)
    assert "3.branch.0.weight" not in expected.grads
    assert_same(Highway(iterations=0)(model, loss), expected)
    for p in model.parameters():
        p.requires_grad_(False)
    model[2].requires_grad_(True)
    assert Highway(iterations=0)(model, loss).grads.keys() == dict(model[2].named_parameters("2")).keys()


def test_a_block_that_is_called_twice():
    torch.manual_seed(0)
    block = Residual(nn.Linear(6, 6), nn.Tanh())
    model, x = nn.Sequential(nn.Linear(4, 6), block, nn.Tanh(), block, nn.Linear(6, 3)), torch.randn(5, 4)
    found = Highway(iterations=0)(model, lambda m: m(x).square().sum(1))
    apart = nn.Sequential(model[0], block, model[2], copy.deepcopy(block), model[4])
    expected = Backprop()(stopped(apart, ["1", "3"]), lambda m: m(x).square().sum(1)).grads
    torch.testing.assert_close(
        found.grads["1.branch.0.weight"], expected["1.branch.0.weight"] + expected["3.branch.0.weight"]
    )


class Pair(nn.Module):
    """A block as in many transformers: it takes a mask by name and returns its hidden state and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.branch(x).tanh() * mask, mask


class OfPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList(Pair() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, mask = self.stem(x), torch.ones(6)
        for layer in self.layers:
            x, mask = layer(x, mask=mask)
        return self.head(x)


@pytest.mark.usefixtures("float64")
def test_blocks_that_return_several_values():
    torch.manual_seed(0)
    model, x = OfPairs(), torch.randn(5, 4)
    other = copy.deepcopy(model)
    for layer in other.layers:

        def forward(x, mask, _forward=layer.forward):
            y, mask = _forward(x.detach(), mask)
            return x + y - x.detach(), mask

        layer.forward = forward
    expected = Backprop()(other, lambda m: m(x).square().sum(1))
    assert_same(Highway(iterations=0)(model, lambda m: m(x).square().sum(1)), expected)


@pytest.mark.usefixtures("float64")
def test_a_penalty_on_weights_of_blocks():
    model, loss, blocks = built("MLP")

    def penalised(m):
        return loss(m) + sum(p.square().sum() for p in m.parameters())

    expected = Backprop()(copy.deepcopy(model), penalised)
    assert_same(Highway(iterations=len(blocks))(model, penalised), expected)


def test_a_penalty_on_weights_of_blocks_needs_a_backward_pass():
    model, loss, _ = built("MLP")
    with pytest.raises(UnsupportedOperation, match="the loss uses weights of residual blocks, as a penalty does"):
        Highway(ForwardGradient())(model, lambda m: loss(m) + m[3].branch[0].weight.square().sum())
    Highway(ForwardGradient())(model, lambda m: loss(m) + m[0].weight.square().sum())


class WithLoss(Pair):
    """A block whose second output the loss uses; it depends on the block's parameters or is a constant."""

    def __init__(self, learnt: bool) -> None:
        super().__init__()
        self.learnt = learnt

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, mask)[0], self.branch(x).mean() + mask if self.learnt else 2 * mask


class Skipping(nn.Module):
    """A model that leaves blocks out at random."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Residual(nn.Linear(6, 6), nn.Tanh()) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if torch.rand(()) < 0.5:
                x = block(x)
        return self.head(x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("seed", range(4))
def test_models_that_leave_blocks_out(seed):
    torch.manual_seed(seed)
    model, x = Skipping(), torch.randn(5, 4)
    estimates = []
    for estimator in (Backprop(), Highway(iterations=8)):
        torch.manual_seed(seed)
        estimates.append(estimator(model, lambda m: m(x).square().sum(1)))
    used = {name: g for name, g in estimates[0].grads.items() if g.any()}
    assert used.keys() == {name for name, g in estimates[1].grads.items() if g.any()}
    for name, g in used.items():
        torch.testing.assert_close(estimates[1].grads[name], g, msg=name)


@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient()], ids=["backprop", "jvp"])
def test_another_output_of_a_block_in_the_loss(estimator):
    x = torch.randn(5, 4)

    def loss(m):
        hidden, mask = m.stem(x), torch.ones(6)
        for layer in m.layers:
            hidden, mask = layer(hidden, mask)
        return m.head(hidden).square().sum(1) + mask.sum()

    model = OfPairs()
    model.layers = nn.ModuleList(WithLoss(learnt=False) for _ in range(2))
    Highway(estimator)(model, loss)
    model.layers = nn.ModuleList(WithLoss(learnt=True) for _ in range(2))
    with pytest.raises(UnsupportedOperation, match="the loss uses another output of a residual block than its hidden"):
        Highway(estimator)(model, loss)


class Dropped(Residual):
    """A block that leaves its branch out at random, as LayerDrop does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.rand(()) < 0.5 else x


@pytest.mark.usefixtures("float64")
def test_blocks_without_their_branch():
    blocks = [Dropped(nn.Linear(6, 6), nn.Tanh()) for _ in range(6)]
    model, x = nn.Sequential(nn.Linear(4, 6), *blocks, nn.Linear(6, 3)), torch.randn(5, 4)
    estimates = []
    for estimator in (Backprop(), Highway(iterations=6)):
        estimator(model, lambda m: m(x).square().sum(1))  # the blocks are found
        torch.manual_seed(0)
        estimates.append(estimator(model, lambda m: m(x).square().sum(1)))
    assert_same(*estimates[::-1])
    assert 4 < len(estimates[0].grads) < 16


class EarlyExits(nn.Module):
    """A model whose output uses the hidden state after every block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList(Residual(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, out = self.stem(x), torch.zeros(3)
        for layer in self.layers:
            x = layer(x)
            out = out + self.head(x)
        return out


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_hidden_states_that_the_head_uses_too():
    torch.manual_seed(0)
    model, x = EarlyExits(), torch.randn(5, 4)
    blocks = ["layers.0", "layers.1", "layers.2"]
    expected = Backprop()(stopped(model, blocks), lambda m: m(x).square().sum(1))
    assert_same(Highway(iterations=0)(model, lambda m: m(x).square().sum(1)), expected)
    assert_same(Highway(WithoutABackwardPass())(model, lambda m: m(x).square().sum(1)), expected)
    exact = Backprop()(copy.deepcopy(model), lambda m: m(x).square().sum(1))
    assert_same(Highway(iterations=3)(model, lambda m: m(x).square().sum(1)), exact)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("estimator", [Backprop(), WithoutABackwardPass()], ids=["backward", "forward"])
def test_a_weight_of_a_block_that_the_stem_uses_too(estimator):
    torch.manual_seed(0)
    shared, x = nn.Linear(6, 6), torch.randn(5, 4)
    blocks = [Residual(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)]
    blocks[1].get_submodule("branch.0").weight = shared.weight
    model = nn.Sequential(nn.Linear(4, 6), shared, *blocks, nn.Linear(6, 3))
    expected = Backprop()(stopped(model, ["2", "3"]), lambda m: m(x).square().sum(1))
    expected.grads["1.weight"] += expected.grads.pop("3.branch.0.weight", 0)
    assert_same(Highway(estimator, iterations=0)(model, lambda m: m(x).square().sum(1)), expected)


class Timed(nn.Module):
    """A block as in a diffusion model: it takes an integer, a mask, its hidden state and the embedding of a time."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(6, 6)

    def forward(self, depth: Tensor, mask: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return x + (depth + 1) * mask * self.branch(x + time).tanh()


class OfTimed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.time = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(1, 6)
        self.layers = nn.ModuleList(Timed() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, time = self.stem(x), self.time(x[:, :1])
        for i, layer in enumerate(self.layers):
            x = layer(torch.tensor(i), torch.arange(6) < 5, x=x, time=time)
        return self.head(x)


@pytest.mark.usefixtures("float64")
def test_other_arguments_of_a_block():
    torch.manual_seed(0)
    model, x = OfTimed(), torch.randn(5, 4)
    for estimator in (Highway(iterations=0), Highway(ForwardGradient())):
        with pytest.raises(UnsupportedOperation, match="such as the embedding of a time step, and these layers would"):
            estimator(model, lambda m: m(x).square().sum(1))
    model.time.requires_grad_(False)
    expected = Backprop()(copy.deepcopy(model), lambda m: m(x).square().sum(1))
    assert_same(Highway(iterations=2)(model, lambda m: m(x).square().sum(1)), expected)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), {}, "Sequential has no residual block: no member"),
        (mlp(), {"blocks": ["2", "nine"]}, "Sequential has no module nine"),
        (mlp(), {"blocks": ["0", "2"]}, "0 cannot be a block: it does not return its input where its parameters are 0"),
    ],
    ids=["plain", "unknown name", "no skip"],
)
def test_refusals(model, options, message):
    x = torch.randn(5, 4)
    with pytest.raises(UnsupportedOperation, match=message):
        Highway(**options)(model, lambda m: m(x).square().sum(1))
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_tokens_need_the_directions_of_one(monkeypatch):
    model, loss, _ = built("transformer")
    counts = []

    def counted(probed, loss_fn, tangents):
        counts.append(len(tangents["probe"]))
        return jvp(probed, loss_fn, tangents)

    monkeypatch.setattr(highway_forward, "jvp", counted)
    Highway(ForwardGradient())(model, loss)
    assert counts == [8 + num_marks(3 * 6)]  # the hidden state of a token, and the test of rows


def test_forward_mode_needs_losses_per_example():
    model, loss, _ = built("MLP")
    with pytest.raises(
        LossError, match="one loss for each of the 5 examples in the hidden state, got losses of shape "
    ):
        Highway(ForwardGradient())(model, lambda m: loss(m).square().mean())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_memory_does_not_grow_with_depth():
    """Backpropagation holds every block's activations, Highway those of one; parameters do not count."""
    x = torch.randn(2048, 4)
    peaks = {}
    for depth in (4, 16):
        torch.manual_seed(0)
        blocks = [Residual(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(depth)]
        model = nn.Sequential(nn.Linear(4, 16), *blocks, nn.Linear(16, 3))
        for name, estimator in (
            ("Backprop", Backprop()),
            ("Highway", Highway(iterations=0)),
            ("iterations", Highway(iterations=2)),
        ):
            estimator(model, lambda m: m(x).square().sum(1))
            peaks[name, depth] = peak_mib(
                lambda model=model, estimator=estimator: estimator(model, lambda m: m(x).square().sum(1)),
                torch.device("cpu"),
            )
    activation = 2048 * 64 * 4 / 2**20
    assert peaks["Backprop", 16] - peaks["Backprop", 4] >= 12 * activation
    assert peaks["Highway", 16] - peaks["Highway", 4] <= activation
    assert peaks["iterations", 16] - peaks["iterations", 4] <= activation


def test_blocks_are_looked_for_once():
    model, loss, _ = built("MLP")
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    estimator = Highway(iterations=0)
    estimator(model, loss)
    first = len(calls)
    estimator(model, loss)
    assert len(calls) - first == first - 3  # a pass that finds them, and two that test what uses their outputs
    assert slots_of(model).cached(estimator, list) == ["2", "3", "4"]


def test_one_iteration_is_the_default_with_backpropagation():
    assert (Highway().iterations, Highway(ForwardGradient()).iterations) == (1, 0)


def test_estimators_that_cannot_train_blocks():
    with pytest.raises(ValueError, match="LocalLosses cannot train residual blocks: use Backprop"):
        Highway(LocalLosses(Backprop()))


def test_iterations_need_backpropagation():
    with pytest.raises(ValueError, match="iterations=2 takes the gradient back through the branches, and ForwardGradi"):
        Highway(ForwardGradient(), iterations=2)


@pytest.mark.usefixtures("float64")
def test_blocks_chosen_by_the_hidden_state():
    torch.manual_seed(0)
    blocks = nn.ModuleList(Residual(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def loss(blocks):
        h = torch.ones(5, 4)
        for block in blocks:
            h = block(h) if h.mean() > 0 else block(block(h))
        return h.square().sum(1)

    assert_same(Highway(iterations=6)(blocks, loss), Backprop()(blocks, loss))


def test_checkpointed_blocks_are_refused():
    model, x = nn.ModuleList(Residual(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)), torch.randn(5, 4)

    def loss(blocks):
        h = x
        for block in blocks:
            h = checkpoint(block, h, use_reentrant=False)
        return h.square().sum(1)

    for estimator in (Highway(iterations=0), Highway(iterations=1)):
        with pytest.raises(UnsupportedOperation, match="switch off activation checkpointing around them"):
            estimator(model, loss)


class Refusing(ForwardGradient):
    def forward(self, *_, **__):
        raise LossError("no such loss")


def test_a_refusal_within_a_block_is_raised():
    model, loss, _ = built("MLP")
    with pytest.raises(LossError, match="no such loss"):
        Highway(Refusing())(model, loss)


class ScaledInPlace(nn.Module):
    """What is between its blocks, and after them, works in place."""

    def __init__(self, frozen):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6).requires_grad_(not frozen), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(mlp()[2:4])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).mul_(0.9)
        return self.head(x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("frozen", [False, True])
def test_what_stands_between_blocks_may_work_in_place(frozen):
    torch.manual_seed(0)
    model, x = ScaledInPlace(frozen), torch.randn(5, 4)
    loss = lambda net: net(x).square().sum(1)
    expected = Backprop()(copy.deepcopy(model), loss)
    assert_same(Highway(iterations=2)(copy.deepcopy(model), loss), expected)
    along_skips = Backprop()(stopped(copy.deepcopy(model), ["blocks.0", "blocks.1"]), loss)
    assert_same(Highway(WithoutABackwardPass())(model, loss), along_skips)


def test_a_copy_of_the_model_within_the_loss():
    """Its blocks would run those of the model, so their calls are not the model's alone."""
    model, x = mlp(), torch.randn(5, 4)
    with pytest.raises(UnsupportedOperation, match="blocks that the model calls once each"):
        LocalLosses(Backprop(), head="tail")(model, lambda m: (m(x) - copy.deepcopy(m)(x).detach()).square().sum(1))


class OfTwoNames(nn.Module):
    """Each block is an attribute and a member of a list."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second, self.head = nn.Linear(4, 6), *mlp()[2:4], nn.Linear(6, 3)
        self.blocks = nn.ModuleList([self.first, self.second])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("blocks", [None, ["first", "second"], ["blocks.0", "blocks.1"]])
def test_blocks_of_two_names(blocks):
    torch.manual_seed(0)
    model, x = OfTwoNames(), torch.randn(5, 4)
    loss = lambda net: net(x).square().sum(1)
    expected = Backprop()(copy.deepcopy(model), loss)
    assert_same(Highway(iterations=2, blocks=blocks)(model, loss), expected)
    tail = LocalLosses(Backprop(), head="tail", blocks=blocks)(model, loss)
    assert torch.equal(tail.grads["second.branch.0.weight"], expected.grads["second.branch.0.weight"])

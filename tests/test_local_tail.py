"""Local losses through the network's own tail, against each of them by backpropagation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fgtrain import ActivityPerturbation, Backprop, ForwardGradient, LocalLosses
from fgtrain.errors import UnsupportedOperation
from fgtrain.estimators import SPSA
from fgtrain.models import LSTMLM
from tests.residual import EVERY_MODEL, Residual, assert_leaves_the_trace_of_one_pass, assert_same, built

BETWEEN = {"layer1.0": 0, "layer2.0": 1}
"""{prefix of parameters that are neither stem nor block: the block they are trained with}, but for the last."""


def local_losses(model, loss, blocks):
    """For every block a copy of the model that has its local loss."""
    for i in range(len(blocks)):
        local = copy.deepcopy(model)
        for j, name in enumerate(blocks):
            block = local.get_submodule(name)

            def constant(*args, _forward=block.forward):
                with torch.no_grad():
                    return _forward(*args)

            if j != i:
                block.forward = constant if j < i else lambda x: x
        yield Backprop()(local, loss).grads


def trained_with(name, blocks, stem):
    """The numbers of the blocks that a parameter is trained with."""
    prefixes = {block: i for i, block in enumerate(blocks)} | {p: i for p, i in BETWEEN.items() if p not in blocks}
    for prefix, i in prefixes.items():
        if name.startswith(f"{prefix}."):
            return {i}
    return {0} if name.split(".")[0] in stem else {len(blocks) - 1}


STEMS = {"0", "1", "tokens", "positions", "conv1", "bn1", "conv_proj", "class_token", "pos_embedding"}


@pytest.mark.usefixtures("float64")
@EVERY_MODEL
def test_every_block_has_the_gradient_of_its_local_loss(name):
    model, loss, blocks = built(name)
    expected: dict[str, torch.Tensor] = {}
    tied = {"tokens.weight"} if name == "transformer, tied" else set()
    for i, grads in enumerate(local_losses(model, loss, blocks)):
        for at, g in grads.items():
            where = trained_with(at.removeprefix("encoder.") if "pos_embedding" in at else at, blocks, STEMS)
            if i in where | ({len(blocks) - 1} if at in tied else set()):
                expected[at] = expected[at] + g if at in expected else g
    exact = Backprop()(copy.deepcopy(model), loss)
    assert_same(LocalLosses(Backprop(), head="tail")(copy.deepcopy(model), loss), exact._replace(grads=expected))
    assert_same(LocalLosses(Backprop(), head="tail", blocks=blocks)(model, loss), exact._replace(grads=expected))


@pytest.mark.usefixtures("float64")
@EVERY_MODEL
def test_leaves_the_trace_of_one_pass(name):
    assert_leaves_the_trace_of_one_pass(LocalLosses(ForwardGradient(), head="tail"), name)


@pytest.mark.usefixtures("float64")
def test_a_block_by_name_that_returns_several_values():
    """One block is all there is: its local loss is the model's."""
    torch.manual_seed(0)
    model, x = LSTMLM(7, 6, 2), torch.randint(7, (3, 5))

    def loss(net):
        return F.cross_entropy(net(x).flatten(0, 1), x.flatten(), reduction="none").view(3, 5).mean(1)

    expected = Backprop()(model, loss)
    assert_same(LocalLosses(Backprop(), head="tail")(model, loss), expected)
    assert_same(LocalLosses(Backprop(), head="tail", blocks=["lstm"])(model, loss), expected)


@pytest.mark.usefixtures("float64")
def test_a_plain_network_of_equal_widths():
    """In the middle of three equal layers; the ReLU between them belongs to the tail."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), *(m for _ in range(3) for m in (nn.Linear(6, 6), nn.ReLU())))
    model.append(nn.Linear(6, 2))
    x = torch.randn(5, 4)
    found = LocalLosses(Backprop(), head="tail")(model, lambda m: m(x).square().sum(1)).grads
    with torch.no_grad():
        hidden = model[:4](x)
    loss = model[8](model[4](hidden).relu()).square().sum(1).mean()
    torch.testing.assert_close(found["4.weight"], torch.autograd.grad(loss, model.get_parameter("4.weight"))[0])


class Halved(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place

    def forward(self, x):
        return x.mul_(0.5) if self.in_place else x * 0.5


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("estimator", [Backprop(), ActivityPerturbation(2), ActivityPerturbation(2, exact_head=True)])
def test_what_stands_between_blocks_may_work_in_place(estimator):
    def grads(in_place):
        torch.manual_seed(0)
        x, y = torch.randn(6, 4), torch.arange(6) % 3
        layers = [nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)]
        between = [(layer, Halved(in_place), nn.ReLU(inplace=in_place)) for layer in layers]
        net = nn.Sequential(*(module for part in between for module in part), nn.Linear(5, 3))
        estimate = LocalLosses(copy.deepcopy(estimator), head="tail")
        generator = torch.Generator().manual_seed(2)
        return estimate(net, lambda m: F.cross_entropy(m(x), y, reduction="none"), generator=generator)

    assert_same(grads(in_place=True), grads(in_place=False))


@pytest.mark.parametrize(
    "estimator", [ActivityPerturbation(num_tangents=8), SPSA(num_tangents=4)], ids=["activity", "spsa"]
)
def test_blocks_see_what_the_network_computes(estimator):
    """Also where the estimator runs it with perturbed parameters."""
    model, loss, blocks = built("MLP")
    expected, seen = [], []
    hooks = [model.get_submodule(name).register_forward_hook(lambda *a: expected.append(a[1][0])) for name in blocks]
    loss(model)
    for hook in hooks:
        hook.remove()
    for name in blocks:
        model.get_submodule(f"{name}.branch.0").register_forward_hook(lambda _, args, out: seen.append(args[0]))
    local = LocalLosses(estimator, head="tail")
    local(model, loss)
    seen.clear()
    local(model, loss)
    for hidden in expected:
        assert any(isinstance(x, torch.Tensor) and type(x) is torch.Tensor and torch.equal(x, hidden) for x in seen)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), {}, UnsupportedOperation, "has no block: no member"),
        (nn.Sequential(nn.Linear(4, 5)), {"blocks": ["1"]}, UnsupportedOperation, "Sequential has no module 1"),
        (nn.Sequential(nn.Linear(4, 5)), {"blocks": ["0"]}, UnsupportedOperation, "0 cannot be a block: it changes"),
    ],
    ids=["none", "unknown", "another shape"],
)
def test_refusals(model, options, error, message):
    x = torch.randn(5, 4)
    with pytest.raises(error, match=message):
        LocalLosses(Backprop(), head="tail", **options)(model, lambda m: m(x).square().sum(1))


def test_a_block_that_is_called_twice_is_refused():
    block, x = Residual(nn.Linear(4, 4)), torch.randn(5, 4)
    model = nn.Sequential(block, nn.Tanh(), block, nn.Linear(4, 2))
    with pytest.raises(UnsupportedOperation, match="once each"):
        LocalLosses(Backprop(), head="tail")(model, lambda m: m(x).square().sum(1))


def test_arguments():
    with pytest.raises(ValueError, match="head must be linear or tail, got 'none'"):
        LocalLosses(head="none")  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match="blocks are named for head='tail'"):
        LocalLosses(blocks=["0"])

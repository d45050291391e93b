"""The self-check reports a model that breaks an assumption, and changes nothing."""

import os
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fgtrain import SPSA, Backprop, ForwardGradient, MeZO
from fgtrain.data import Digits
from fgtrain.errors import AssumptionError
from fgtrain.lightning.callbacks import SelfCheck
from fgtrain.models import torchvision_model
from fgtrain.self_check import self_check
from tests.cases import INPUTS
from tests.commands import train
from tests.every_method import make as make_estimator
from tests.every_method import table
from tests.small import Small, assert_equal_weights, make, trainer


def of(layer, model=nn.Linear):
    torch.manual_seed(0)
    return nn.Sequential(model(3, 3), layer, nn.Linear(3, 3)).double()


def loss(net):
    return net(INPUTS).square().mean(1)


@table()
def test_sound_models_pass_untouched(method, case):
    model, estimator = case.build(), make_estimator(method)
    state, random = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    assert self_check(model, case.loss, estimator) == []
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


class OwnNoise(nn.Module):
    def forward(self, x):
        return x * (1 + int.from_bytes(os.urandom(2), "big") / 2**16)


class ChangesItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        self.weight.data.mul_(1.5)
        return x * self.weight


class Counting(nn.Module):
    calls: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Hidden(nn.Module):
    def forward(self, x):
        return x * (1 + x.sum() ** 2).item()


class Rounded(nn.Module):
    def forward(self, x):
        return x + (x.round() - x).detach()


class WrongJvp(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        return grads

    @staticmethod
    def jvp(ctx, *tangents):
        return 2 * tangents[0]


class Custom(nn.Module):
    def forward(self, x):
        return WrongJvp.apply(x)


@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient()], ids=str)
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (OwnNoise(), r"two evaluations with the same seed differ .*module '1' \(OwnNoise\) draws random numbers"),
        (ChangesItself(), r"the model changes its own parameter '1.weight' in its forward pass"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_broken_assumptions_are_named(layer, message, estimator):
    with pytest.raises(AssumptionError, match=message):
        self_check(of(layer), loss, estimator)


def test_derivative_that_is_not_that_of_backpropagation_is_named():
    with pytest.raises(
        AssumptionError, match=r"by forward mode and .* with the largest difference for parameter '0\.\w+'; a custom"
    ):
        self_check(of(Custom()), loss, ForwardGradient())


class LeavesOut(Backprop):
    """Trains the model without its second module."""

    def forward(self, model, loss_fn, **options):
        without = nn.ModuleDict({"0": model[0], "2": model[2]})
        return super().forward(without, lambda m: loss_fn(lambda x: m["2"](m["0"](x))), **options)


class Halves(Backprop):
    def forward(self, model, loss_fn, **options):
        found = super().forward(model, loss_fn, **options)
        return found._replace(grads=found.grads | {"2.bias": found.grads["2.bias"] / 2})


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (LeavesOut(), r"the loss is [\d.]+ by LeavesOut and [\d.]+ by a plain pass: the method runs another network"),
        (
            Halves(),
            r"Halves claims to be exact, but its gradient for parameter '2.bias' differs from backpropagation's",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_method_that_trains_another_function_is_named(estimator, message):
    with pytest.raises(AssumptionError, match=message) as caught:
        self_check(of(nn.Tanh()), loss, estimator)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Counting(), r"the loss depends on state that the model changes in its forward pass \(buffers 1.calls\)"),
        (Hidden(), r"with the largest difference for parameter '0\.\w+': something between it and the loss is hidden"),
        (Rounded(), r"is hidden from differentiation"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient()], ids=str)
def test_what_may_be_meant_is_reported(layer, message, estimator):
    model = of(layer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noticed = self_check(model, loss, estimator)
    assert any(re.search(message, sentence) for sentence in noticed), noticed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Cut(nn.Module):
    def forward(self, x):
        return x.detach()


class Adapter(nn.Module):
    """A low-rank addition that is 0 at first, as LoRA begins: its first factor has no gradient yet."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 1))
        self.b = nn.Parameter(torch.zeros(1, 3))

    def forward(self, x):
        return x + x @ self.a @ self.b


@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient()], ids=str)
def test_parameters_without_a_gradient_are_named(estimator):
    (noticed,) = self_check(of(Cut()), loss, estimator)
    assert re.match(r"no gradient reaches '0.weight', '0.bias': .*\.detach\(\)", noticed)
    assert self_check(of(Adapter()), loss, estimator) == []


class Length(nn.Module):
    """x plus the length of its parameter, which is 0 and has the gradient nan there."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x + self.weight.square().sum().sqrt()


@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient()], ids=str)
def test_a_gradient_that_is_not_finite_is_left_to_training(estimator):
    assert self_check(of(Length()), loss, estimator) == []


@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_curvature_is_no_accusation(name):
    torch.manual_seed(0)
    model = torchvision_model(name, 10)
    data = Digits(16)
    data.setup("fit")
    inputs, labels = next(iter(data.train_dataloader()))
    noticed = self_check(model, lambda net: F.cross_entropy(net(inputs), labels, reduction="none"), Backprop())
    assert [sentence for sentence in noticed if "hidden from" in sentence] == []


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_changes_nothing_of_a_run(precision, tmp_path):
    checked, alone = make(ForwardGradient()), make(ForwardGradient())
    trainer(tmp_path, SelfCheck(), max_steps=8, precision=precision).fit(checked, Small())
    trainer(tmp_path, max_steps=8, precision=precision).fit(alone, Small())
    assert_equal_weights(checked.state_dict(), alone.state_dict())


def test_through_the_script(tmp_path):
    status, out, err = train(tmp_path, "+model.p=1", "model._target_=tests.test_self_check.noisy", "~model.hidden")
    assert (status, out) == (2, ""), err
    assert "module '2' (OwnNoise) draws random numbers" in err.splitlines()[-1]


def noisy(p: int, input_shape: tuple[int, ...], num_classes: int):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes), OwnNoise())


@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient(), SPSA(), MeZO()], ids=lambda e: type(e).__name__)
def test_a_loss_that_takes_derivatives_in_its_input(estimator):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), torch.randn(5, 3).double()

    def loss(m):
        at = x.clone().requires_grad_()
        return torch.autograd.grad(m(at).sum(), at, create_graph=True)[0].square().sum(1)

    (noticed,) = self_check(model, loss, estimator)
    assert noticed.startswith("no gradient reaches '2.bias': the loss does not depend on it")
    found = estimator(model, loss).loss
    torch.testing.assert_close(found, loss(model).mean().detach(), rtol=1e-4, atol=0)

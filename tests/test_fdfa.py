"""Learnt feedback compared with the Jacobians that it approximates, in float64."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fgtrain import FDFA, Backprop, write_grads
from fgtrain.errors import UnsupportedOperation
from fgtrain.random import keyed_generator
from tests import properties
from tests.basis import Basis, complete_noise, sizes_of
from tests.cases import IMAGES, INPUTS, LABELS, Case
from tests.properties import flat

LABELS_OF_64 = torch.arange(64) % 3
INPUTS_OF_64 = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(*between, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), *between, nn.Linear(5, 3)).to(dtype)


def losses(model):
    return F.cross_entropy(model(INPUTS_OF_64), LABELS_OF_64, reduction="none")


def with_complete_noise(model, losses, **options):
    """FDFA with a direction for every number of noise and of the norms; its estimate."""
    sizes = sizes_of(Case("", lambda: model, losses))
    estimator = FDFA(sum(sizes), **options)
    law = mock.patch("fgtrain.estimators.fdfa.Rademacher", return_value=Basis(sizes.noise))
    with complete_noise(sizes), law:
        return estimator, estimator(model, losses)


@pytest.mark.parametrize("between", [[], [nn.ReLU()]], ids=str)
def test_feedback_of_complete_noise_is_the_jacobian(between):
    """Of one hidden layer it is the last weight, and the first step takes the plain mean: the gradient is exact."""
    model = network(*between)
    estimator, estimate = with_complete_noise(model, losses)
    torch.testing.assert_close(
        estimator.feedback.get_buffer("0/weight"), model[-1].weight.detach(), rtol=1e-12, atol=1e-14
    )
    properties.assert_is(estimate.grads, Backprop()(model, losses).grads)


def test_feedback_is_a_running_mean():
    """The first 1 / beta steps count the same, later ones are forgotten as 1 - beta."""
    model, expected = network(nn.ReLU()), torch.zeros(3, 5, dtype=torch.float64)
    sizes = sizes_of(Case("", lambda: model, losses))
    estimator = FDFA(sum(sizes), feedback_lr=0.25)
    for rate in (1, 1 / 2, 1 / 3, 1 / 4, 1 / 4, 1 / 4):
        with torch.no_grad():
            model[-1].weight.mul_(-1.5)
        with complete_noise(sizes):
            estimator(model, losses)
        expected += rate * (model[-1].weight.detach() - expected)
        torch.testing.assert_close(estimator.feedback.get_buffer("0/weight"), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("between", [[], [nn.ReLU()]], ids=str)
def test_feedback_of_signs_is_off_by_those_of_the_other_units(between):
    """The variance of entry (c, j) is sum_m J_cm^2 / (B K) over the other units m; signs have no other error."""
    model, num = network(*between), 256
    estimator = FDFA(num)
    estimator(model, losses, generator=keyed_generator(0))
    jacobian = model[-1].weight.detach()
    others = jacobian.square().sum(1, keepdim=True) - jacobian.square()
    passed = (model[0](INPUTS_OF_64) > 0).sum(0) if between else torch.full((5,), 64)
    bound = 5 * (others / (num * passed)).sqrt()
    assert bound.norm() < 0.25 * jacobian.norm()
    assert ((estimator.feedback.get_buffer("0/weight") - jacobian).abs() <= bound).all()


@pytest.mark.parametrize("between", [[], [nn.ReLU()]], ids=str)
def test_gradient_is_exact_with_the_jacobian_as_feedback(between):
    model, estimator = network(*between), FDFA(feedback_lr=1e-12)
    estimator(model, losses, generator=keyed_generator(0))
    estimator.feedback.get_buffer("0/weight").copy_(model[-1].weight.detach())
    estimator.num_updates.fill_(10**13)
    grads = estimator(model, losses, generator=keyed_generator(1)).grads
    torch.testing.assert_close(flat(grads), flat(Backprop()(model, losses).grads), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("between", [[nn.Tanh()], [nn.ReLU()], [nn.ReLU(inplace=True)]], ids=str)
def test_calls_between_updates_use_the_feedback_as_it_is(between):
    """The gradient is that of the same feedback when it is learnt in every call, with a rate that changes nothing."""
    model, often, seldom = network(*between), FDFA(feedback_lr=1e-12), FDFA(feedback_lr=1e-12, feedback_every=3)
    for step in range(4):
        for estimator in (often, seldom):
            estimator.num_updates.fill_(10**13 if step else 0)
        grads, expected = (e(model, losses, generator=keyed_generator(step)).grads for e in (seldom, often))
        torch.testing.assert_close(flat(grads), flat(expected), rtol=1e-9, atol=1e-12)
    assert int(seldom.num_calls) == 4


def test_feedback_is_learnt_in_every_third_call():
    model, estimator = network(nn.ReLU(), nn.LayerNorm(5, dtype=torch.float64)), FDFA(feedback_every=3)
    changes, derivatives, norms = [], [], []
    for step in range(7):
        before = int(estimator.num_updates)
        estimate = estimator(model, losses, generator=keyed_generator(step))
        changes.append(int(estimator.num_updates) - before)
        derivatives.append(estimate.directional_derivatives is not None)
        norms.append("2.weight" in estimate.grads)
    assert changes == [1, 0, 0, 1, 0, 0, 1]
    assert derivatives == norms == [bool(change) for change in changes]


def test_last_layer_is_exact_whatever_the_feedback():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
    loss_fn = lambda m: F.cross_entropy(m(IMAGES), LABELS, reduction="none")
    grads, exact = FDFA()(model, loss_fn).grads, Backprop()(model, loss_fn).grads
    for name in ("3.weight", "3.bias"):
        torch.testing.assert_close(grads[name], exact[name])
    assert grads["0.weight"].shape == exact["0.weight"].shape


def test_units_that_pass_nothing_learn_nothing():
    model = network(nn.ReLU())
    with torch.no_grad():
        model[0].bias[2] = -1e3
    estimator = FDFA()
    grads = estimator(model, losses).grads
    assert not grads["0.weight"][2].any()
    assert not estimator.feedback.get_buffer("0/weight")[:, 2].any()
    assert grads["0.weight"][0].any()


@pytest.mark.parametrize("feedback_every", [1, 2])
def test_state_goes_on_where_it_was(feedback_every):
    straight, model = FDFA(feedback_every=feedback_every), network(nn.ReLU())
    for step in range(3):
        straight(model, losses, generator=keyed_generator(step))
    resumed = FDFA(feedback_every=feedback_every)
    resumed.load_state_dict(straight.state_dict())
    first, again = (e(model, losses, generator=keyed_generator(3)).grads for e in (straight, resumed))
    assert torch.equal(flat(first), flat(again))


def test_feedback_brings_the_error_down():
    """As far as the gradient does that its fixed point is, but for the steps it takes to learn."""
    fallen = []
    for estimator in (Backprop(), FDFA()):
        model = network(nn.ReLU())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = losses(model).mean().item()
        for step in range(100):
            write_grads(model, estimator(model, losses, generator=keyed_generator(step)).grads)
            optimizer.step()
        fallen.append(before - losses(model).mean().item())
    exact, ours = fallen
    assert exact > 0
    assert ours > 0.8 * exact


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.ParameterDict({"x": torch.ones(4, 3)}), INPUTS, r"has no trained Linear or convolution"),
        (
            nn.Sequential(*[nn.Linear(3, 3)] * 2, nn.Linear(3, 3)),
            INPUTS,
            r"feedback matrix per layer, but \S+ is called",
        ),
    ],
    ids=["no layer", "a layer used twice"],
)
def test_what_it_refuses(model, inputs, message):
    with pytest.raises(UnsupportedOperation, match=message):
        FDFA()(model.double(), lambda m: F.cross_entropy(m(inputs) if callable(m) else m["x"], LABELS))


def test_norms_get_directions_of_their_own():
    """The gradient but for a known length: noise on 5 units, 10 numbers of the norm, 64 examples."""
    model = network(nn.LayerNorm(5, dtype=torch.float64))
    estimator, estimate = with_complete_noise(model, losses)
    length = 1 / (1 + (5 + 10 - 1) / estimator.num_tangents / 8)
    exact = Backprop()(model, losses).grads
    for name in ("1.weight", "1.bias"):
        torch.testing.assert_close(estimate.grads[name], length * exact[name], rtol=1e-11, atol=1e-14)


def test_refuses_outputs_of_another_size():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3)).double()
    estimator = FDFA()
    for length in (6, 7):
        inputs = torch.ones(4, 1, length, dtype=torch.float64)
        step = lambda inputs=inputs: estimator(model, lambda m: F.cross_entropy(m(inputs), LABELS, reduction="none"))
        if length == 6:
            step()
    with pytest.raises(UnsupportedOperation, match=r"0 has shape \(2, 5\) per example but had \(2, 4\)"):
        step()


@pytest.mark.parametrize("batch_first", [True, False])
def test_refuses_examples_elsewhere_than_first(batch_first):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first)
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            return self.out(self.layer(x if batch_first else x.transpose(0, 1)).mean(1 if batch_first else 0))

    inputs = torch.ones(4, 3, 6)
    with pytest.raises(UnsupportedOperation, match=r"the 4 examples, but layer.self_attn.out_proj gives \(12, 6\)"):
        FDFA()(Encoder(), lambda m: F.cross_entropy(m(inputs), LABELS, reduction="none"))


class Square(nn.Module):
    """Four time steps of four examples, in an order that the shape does not tell."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(x)).mean(0))


def test_refuses_as_many_time_steps_as_examples_in_their_place():
    with pytest.raises(UnsupportedOperation, match=r"the 4 examples, but hidden gives \(4, 4, 5\)"):
        FDFA()(Square(), lambda m: F.cross_entropy(m(torch.ones(4, 4, 6)), LABELS, reduction="none"))


@pytest.mark.parametrize("options", [{"num_tangents": 0}, {"feedback_lr": 0.0}, {"feedback_lr": 1.5}], ids=str)
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        FDFA(**options)

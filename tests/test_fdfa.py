"""Learnt feedback against the Jacobians it stands for, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fgtrain import FDFA, Backprop
from fgtrain.errors import UnsupportedOperation
from fgtrain.random import keyed_generator
from tests.cases import IMAGES, INPUTS, LABELS
from tests.properties import flat

LABELS_OF_64 = torch.arange(64) % 3
INPUTS_OF_64 = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(*between, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), *between, nn.Linear(5, 3)).to(dtype)


def losses(model):
    return F.cross_entropy(model(INPUTS_OF_64), LABELS_OF_64, reduction="none")


@pytest.mark.parametrize("between", [[], [nn.ReLU()]], ids=str)
def test_feedback_converges_to_the_jacobian(between):
    """Of one hidden layer it is the last weight; noise on the other units is what entry (c, j) misses it by."""
    model, estimator, steps = network(*between), FDFA(num_tangents=4, feedback_lr=1e-3), 500
    for step in range(steps):
        estimator(model, losses, generator=keyed_generator(step))
    jacobian = model[-1].weight.detach()
    others = jacobian.square().sum(1, keepdim=True) - jacobian.square()
    passed = (model[0](INPUTS_OF_64) > 0).sum(0) if between else torch.full((5,), 64)
    error = (estimator.feedback.get_buffer("0/weight") - jacobian).abs()
    assert (error <= 5 * (others / (4 * steps * passed)).sqrt()).all()


@pytest.mark.parametrize("between", [[], [nn.ReLU()]], ids=str)
def test_gradient_is_exact_with_the_jacobian_as_feedback(between):
    model, estimator = network(*between), FDFA(feedback_lr=1e-12)
    estimator(model, losses, generator=keyed_generator(0))
    estimator.feedback.get_buffer("0/weight").copy_(model[-1].weight.detach())
    estimator.num_updates.fill_(10**13)
    grads = estimator(model, losses, generator=keyed_generator(1)).grads
    torch.testing.assert_close(flat(grads), flat(Backprop()(model, losses).grads), rtol=1e-9, atol=1e-9)


def test_last_layer_is_exact_whatever_the_feedback():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
    loss_fn = lambda m: F.cross_entropy(m(IMAGES), LABELS, reduction="none")  # noqa: E731
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


def test_state_goes_on_where_it_was():
    straight, model = FDFA(), network(nn.ReLU())
    for step in range(3):
        straight(model, losses, generator=keyed_generator(step))
    resumed = FDFA()
    resumed.load_state_dict(straight.state_dict())
    first, again = (e(model, losses, generator=keyed_generator(3)).grads for e in (straight, resumed))
    assert torch.equal(flat(first), flat(again))


def test_feedback_brings_the_error_down():
    model = network(nn.ReLU(), dtype=torch.float64)
    estimator, optimizer = FDFA(), torch.optim.SGD(model.parameters(), lr=0.1)
    before = losses(model).mean().item()
    for step in range(100):
        for name, g in estimator(model, losses, generator=keyed_generator(step)).grads.items():
            model.get_parameter(name).grad = g
        optimizer.step()
    assert math.isfinite(before)
    assert losses(model).mean().item() < before


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.ParameterDict({"x": torch.ones(4, 3)}), INPUTS, r"has no trained Linear or convolution"),
        (nn.Sequential(*[nn.Linear(3, 3)] * 2, nn.Linear(3, 3)), INPUTS, r"feedback matrix for a layer; \S+ is called"),
    ],
    ids=["no layer", "a layer used twice"],
)
def test_what_it_refuses(model, inputs, message):
    with pytest.raises(UnsupportedOperation, match=message):
        FDFA()(model.double(), lambda m: F.cross_entropy(m(inputs) if callable(m) else m["x"], LABELS))


def test_norms_get_directions_of_their_own():
    """Unbiased but for a known length: noise on 5 units, 10 numbers of the norm, 64 examples."""
    model, draws = network(nn.LayerNorm(5, dtype=torch.float64)), 400
    exact = Backprop()(model, losses).grads
    length = 1 / (1 + (5 + 10 - 1) / 8)
    found = [FDFA()(model, losses, generator=keyed_generator(draw)).grads for draw in range(draws)]
    for name in ("1.weight", "1.bias"):
        estimates = torch.stack([grads[name] for grads in found]) / length
        error = estimates.mean(0) - exact[name]
        assert (error.abs() <= 5 * estimates.std(0) / math.sqrt(draws)).all()


def test_refuses_outputs_of_another_size():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3)).double()
    estimator = FDFA()
    for length in (6, 7):
        inputs = torch.ones(4, 1, length, dtype=torch.float64)
        step = lambda inputs=inputs: estimator(model, lambda m: F.cross_entropy(m(inputs), LABELS, reduction="none"))  # noqa: E731
        if length == 6:
            step()
    with pytest.raises(UnsupportedOperation, match=r"0 is of shape \(2, 5\) per example and was \(2, 4\)"):
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
    with pytest.raises(UnsupportedOperation, match=r"the 4 examples, layer.self_attn.out_proj gives \(12, 6\)"):
        FDFA()(Encoder(), lambda m: F.cross_entropy(m(inputs), LABELS, reduction="none"))


class Square(nn.Module):
    """Four time steps of four examples, in an order that the shape does not tell."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(x)).mean(0))


def test_refuses_as_many_time_steps_as_examples_in_their_place():
    with pytest.raises(UnsupportedOperation, match=r"the 4 examples, hidden gives \(4, 4, 5\)"):
        FDFA()(Square(), lambda m: F.cross_entropy(m(torch.ones(4, 4, 6)), LABELS, reduction="none"))


@pytest.mark.parametrize("options", [{"num_tangents": 0}, {"feedback_lr": 0.0}, {"feedback_lr": 1.5}], ids=str)
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        FDFA(**options)

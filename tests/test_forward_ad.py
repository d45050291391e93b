from typing import Any

import pytest
import torch
from torch import nn

from fgtrain import LowRank, Normal, directional_derivatives
from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.forward_ad import jvp
from fgtrain.tangents.directions import dense
from tests.cases import CASES, INPUTS, Custom
from tests.properties import exact_grads


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("law", [Normal(), LowRank(1)], ids=repr)
@pytest.mark.parametrize("num_tangents", [1, 3])
def test_derivative_is_the_inner_product_with_the_gradient(case, law, num_tangents):
    model = case.build()
    tangents = law.sample(dict(model.named_parameters()), range(num_tangents))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        losses, derivatives = directional_derivatives(model, case.loss, tangents)
        torch.manual_seed(3)
        plain = case.loss(case.build())
    grads = exact_grads(case, seed=3)
    expected = sum((dense(tangents[name]) * g).flatten(1).sum(1) for name, g in grads.items())
    torch.testing.assert_close(losses, plain.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(derivatives, expected, rtol=1e-12, atol=1e-12)


def test_derivative_of_every_example():
    model = CASES[0].build()
    tangents = Normal().sample(dict(model.named_parameters()), [0, 1])
    _, derivatives = jvp(model, CASES[0].loss, tangents)
    for i in range(4):
        _, alone = directional_derivatives(model, lambda m, i=i: CASES[0].loss(m)[i], tangents)
        torch.testing.assert_close(derivatives[:, i], alone)


def test_nothing_is_stored_for_a_backward_pass():
    model = CASES[0].build()
    losses, derivatives = jvp(model, CASES[0].loss, Normal().sample(dict(model.named_parameters()), [0]))
    assert losses.grad_fn is None
    assert derivatives.grad_fn is None


def test_inference_mode_keeps_the_tangents():
    model = CASES[0].build()
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    _, expected = directional_derivatives(model, CASES[0].loss, tangents)
    with torch.inference_mode():
        _, found = directional_derivatives(model, CASES[0].loss, tangents)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_compiled_functions_keep_their_tangents():
    model = CASES[0].build()
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    _, expected = directional_derivatives(model, CASES[0].loss, tangents)
    compiled: Any = torch.compile(model, backend="eager")
    compiled(INPUTS)  # what is compiled for plain tensors would drop the tangent of a dual one
    _, found = directional_derivatives(compiled, CASES[0].loss, {f"_orig_mod.{n}": t for n, t in tangents.items()})
    torch.testing.assert_close(found, expected)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def jvp(ctx, *tangents):
        return 2 * tangents[0]


class _TakesAnotherPath(nn.Sequential):
    """In its second pass, random numbers and a buffer come before what the fast engine cannot follow."""

    usual = True

    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, input):  # noqa: A002 - as the base names it
        x = super().forward(input)
        return 2 * x if self.usual else _Doubled.apply(x)


@pytest.mark.usefixtures("float64")
def test_change_of_engine_leaves_the_trace_of_one_pass(caplog):
    def state_after(run):
        torch.manual_seed(0)
        model = _TakesAnotherPath()
        for model.usual in (True, False):
            result = run(model)
        return result, {n: b.clone() for n, b in model.named_buffers()}, torch.get_rng_state()

    def estimate(model):
        tangents = {name: torch.ones(2, *p.shape) for name, p in model.named_parameters()}
        return jvp(model, loss, tangents)[0]

    def loss(model):
        return model(INPUTS).square().mean(1)

    found, expected = state_after(estimate), state_after(lambda model: loss(model).detach())
    assert "runs through the slower reference engine" in caplog.text
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class _Segments(nn.Module):
    def forward(self, x):
        return vars(torch)["segment_reduce"](x, "max", lengths=torch.tensor([len(x)]), axis=0, initial=0).sum(1)


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (
            nn.Sequential(nn.Linear(3, 3), nn.Sequential(Custom())),
            lambda m: m(INPUTS).sum(),
            r"^module '1\.0' \(Custom\) uses a custom autograd.Function without jvp, which has no forward-mode",
        ),
        (
            nn.Sequential(nn.Linear(3, 3), _Segments()),
            lambda m: m(INPUTS),
            r"^module '1' \(_Segments\) uses \S*segment_reduce\S*, which has no forward-mode derivative; use torch",
        ),
    ],
    ids=["custom function", "segments"],
)
def test_operations_without_derivative_are_named(model, loss, message):
    model = model.double()
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    with pytest.raises(UnsupportedOperation, match=message):
        directional_derivatives(model, loss, tangents)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m: m(INPUTS), r"losses of shape \(B,\) or a scalar \(\), got shape \(4, 3\); reduce it"),
        (lambda m: m(INPUTS).sum().item(), r"got a float"),
        (lambda m: m(INPUTS).argmax(1), r"of a floating dtype, got torch.int64"),
        (lambda m: m(INPUTS[:0]).sum(1), r"got shape \(0,\); the batch is empty$"),
        (lambda m: INPUTS.sum(), r"the loss carries no tangent: it depends on no trainable parameter"),
        (lambda m: m(INPUTS).detach().sum(), r"the loss carries no tangent"),
    ],
)
def test_losses_that_cannot_be_differentiated(loss, message):
    model = CASES[0].build()
    with pytest.raises(LossError, match=message):
        directional_derivatives(model, loss, Normal().sample(dict(model.named_parameters()), [0]))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"tangents for nope, which the model's named_parameters\(\) do not list"):
        directional_derivatives(CASES[0].build(), CASES[0].loss, {"nope": torch.zeros(1, 2)})


@pytest.mark.parametrize(
    ("weight", "bias"), [((2, 4, 3), (3, 4)), ((4, 3), (4,)), ((1, 4, 3), (1, 1)), ((1, 3, 4), (1, 4)), ((), (1, 4))]
)
def test_tangents_of_another_shape_are_refused(weight, bias):
    tangents = {"0.weight": torch.ones(weight), "0.bias": torch.ones(bias)}
    with pytest.raises(ValueError, match=r"^the tangents of 0\.\w+ have the shape .*; give \(K, \*p\.shape\)"):
        directional_derivatives(CASES[0].build(), CASES[0].loss, tangents)


def test_parameters_left_out_have_the_direction_zero():
    model = CASES[0].build()
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    some = {name: tangents[name] for name in ("0.weight",)}
    zeros = {name: t if name in some else torch.zeros_like(dense(t)) for name, t in tangents.items()}
    _, found = directional_derivatives(model, CASES[0].loss, some)
    _, expected = directional_derivatives(model, CASES[0].loss, zeros)
    torch.testing.assert_close(found, expected)


BEFORE_AN_ACTIVATION = {
    "batch norm": (lambda: nn.BatchNorm1d(3).eval(), torch.zeros(1, 3), "0.bias"),
    "embedding": (lambda: nn.Embedding(2, 3), torch.tensor(1), "0.weight"),
}


@pytest.mark.parametrize("name", BEFORE_AN_ACTIVATION)
def test_an_activation_in_place_leaves_the_directions(name):
    """The tangents of one example have the shape of directions, but not their memory."""
    layer, x, moved = BEFORE_AN_ACTIVATION[name]
    model = nn.Sequential(layer(), nn.ReLU(inplace=True))
    p = model.get_parameter(moved)
    nn.init.constant_(p, -1)
    tangents = torch.randn(2, *p.shape)
    before = tangents.clone()
    _, found = directional_derivatives(model, lambda m: m(x).sum(), {moved: tangents})
    assert not found.any()
    assert tangents.equal(before)

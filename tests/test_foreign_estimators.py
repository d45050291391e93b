"""Estimators on models and losses as public repositories have them: right, or refused in one line."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fgtrain import (
    FDFA,
    SPSA,
    ActivityPerturbation,
    Backprop,
    CheckpointedBackprop,
    ForwardExact,
    ForwardGradient,
    GaussNewton,
    Highway,
    LocalGuess,
    LocalLosses,
    MeZO,
    SecondOrder,
)
from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.models import Residual
from fgtrain.self_check import self_check
from tests.basis import Basis, complete_noise, sizes_of
from tests.cases import INPUTS, LABELS, Case
from tests.properties import assert_is

pytestmark = pytest.mark.usefixtures("float64")


def chain(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


def residual():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Residual(nn.Linear(4, 4)), nn.Linear(4, 3))


def losses(m, x=INPUTS):
    return F.cross_entropy(m(x), LABELS, reduction="none")


# --- outputs --------------------------------------------------------------------------------------------------------


class WithNone(nn.Module):
    """Returns None beside its output, as language models do for the loss that they were not asked for."""

    def __init__(self):
        super().__init__()
        self.net = chain()

    def forward(self, x):
        return self.net(x), None


def test_gauss_newton_on_a_model_that_also_returns_none():
    def loss(out):
        return out.square().square().sum(1) + out.exp().sum(1)

    estimates = [
        GaussNewton(num_tangents=None)(model, run)
        for model, run in ((WithNone(), lambda m: loss(m(INPUTS)[0])), (chain(), lambda m: loss(m(INPUTS))))
    ]
    first, second = ({name.removeprefix("net."): g for name, g in found.grads.items()} for found in estimates)
    assert_is(first, second)


def test_a_loss_of_no_row_beside_others():
    def loss(m):
        return F.cross_entropy(m(INPUTS[:0]), LABELS[:0], reduction="sum") + m(INPUTS).square().sum()

    model = chain()
    found = GaussNewton(num_tangents=None)(model, loss).directional_derivatives
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in Backprop()(model, loss).grads.values()]))


@pytest.mark.parametrize("estimator", [ForwardGradient(exact_head=True), ActivityPerturbation(exact_head=True), FDFA()])
def test_an_empty_batch_has_no_exact_head(estimator):
    with pytest.raises(LossError, match=r"needs a row, but 4 gives \(0, 3\)"):
        estimator(chain(), lambda m: F.cross_entropy(m(INPUTS[:0]), LABELS[:0], reduction="sum"))


# --- experts --------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Each row goes to one of four experts, which are called also if they get no row."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])

    def forward(self, x):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = LABELS.eq(i).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]))
        return out


@pytest.mark.parametrize("memory", ["keep", "replay"])
def test_activity_perturbation_with_an_expert_that_gets_no_row(memory):
    case = Case("experts", Experts, losses)
    sizes = sizes_of(case)
    with complete_noise(sizes):
        found = ActivityPerturbation(sum(sizes), tangents=Basis(sizes.noise), memory=memory)(case.build(), losses).grads
    exact = Backprop()(case.build(), losses).grads
    assert_is({name: found[name] for name in exact}, exact)


# --- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: ActivityPerturbation(2),
        lambda: ActivityPerturbation(2, memory="replay"),
        lambda: ForwardGradient(exact_head=True),
        lambda: FDFA(),
        lambda: FDFA(feedback_every=2),
        lambda: LocalLosses(),
    ],
)
def test_features_made_in_inference_mode(make):
    with torch.inference_mode():
        features = INPUTS.clone()
    found, expected = (
        make()(chain(), lambda m, x=x: losses(m, x), generator=torch.Generator().manual_seed(0)).grads
        for x in (features, INPUTS)
    )
    assert_is(found, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ForwardGradient(num_tangents=2),
        lambda: ForwardGradient(exact_head=True),
        lambda: ActivityPerturbation(2),
        lambda: ActivityPerturbation(2, memory="replay"),
        lambda: FDFA(),
        lambda: LocalLosses(),
        lambda: Highway(ActivityPerturbation(2)),
    ],
)
@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.exp()], ids=["leaf", "result"])
def test_inputs_that_require_a_gradient(make, change, caplog):
    inputs = INPUTS.clone().requires_grad_(), INPUTS
    found, expected = (
        make()(residual(), lambda m, x=x: losses(m, change(x)), generator=torch.Generator().manual_seed(0)).grads
        for x in inputs
    )
    assert_is(found, expected)
    assert "slower reference engine" not in caplog.text


class FromFirstBatch(nn.Module):
    """Sets its parameters from the first batch, as activation normalization does."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("is_set", torch.tensor(False))

    def forward(self, x):
        if not self.is_set:
            with torch.no_grad():
                self.scale.data = 1 / x.std(0)
            self.shift.data = -x.detach().mean(0)
            self.is_set = torch.tensor(True)
        return (x + self.shift) * self.scale


def with_initialisation():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), FromFirstBatch(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    "make",
    [ForwardExact, ForwardGradient, ActivityPerturbation, SPSA, MeZO, SecondOrder],
    ids=lambda make: make.__name__,
)
def test_parameters_set_from_the_first_batch(make):
    model, expected = with_initialisation(), with_initialisation()
    exact = Backprop()(expected, lambda m: losses(m, INPUTS)).grads
    found = make()(model, lambda m: losses(m, INPUTS)).grads
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    if make is ForwardExact:
        torch.testing.assert_close(found, exact)


class SetOnce(nn.Module):
    """As `FromFirstBatch`, in other words, and without a buffer."""

    def __init__(self, write):
        super().__init__()
        self.scale, self.is_set, self.write = nn.Parameter(torch.ones(4)), False, write

    def forward(self, x):
        if not self.is_set:
            self.write(self.scale, 1 / x.detach().std(0))
            self.is_set = True
        return x * self.scale


def written_in_place(p, value):
    with torch.no_grad():
        p.copy_(value)


WRITES = {
    "in place": lambda: nn.Sequential(nn.Linear(3, 4), SetOnce(written_in_place)),
    "its data": lambda: nn.Sequential(nn.Linear(3, 4), SetOnce(lambda p, value: setattr(p, "data", value))),
    "into its data": lambda: nn.Sequential(nn.Linear(3, 4), SetOnce(lambda p, value: p.data.copy_(value))),
    "largest norm": lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Flatten()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize(
    "make", [SPSA, lambda: SPSA(num_tangents=2), MeZO, ForwardGradient], ids=["spsa", "two", "mezo", "forward"]
)
def test_what_a_pass_writes_into_parameters_stays(make, write):
    torch.manual_seed(0)
    model = write()
    expected, x = copy.deepcopy(model), torch.arange(4)[:, None] if isinstance(model[0], nn.Embedding) else INPUTS
    with torch.no_grad():
        expected(x)
    make()(model, lambda m: m(x).square().sum(1))
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-12, atol=0)


def test_other_data_of_another_shape_are_refused():
    def loss(m):
        m.bias.data = torch.zeros(1, 3)
        return losses(m, INPUTS)

    with pytest.raises(UnsupportedOperation, match="gives a parameter other data"):
        ForwardGradient()(nn.Linear(3, 3), loss)


# --- losses that take derivatives -------------------------------------------------------------------------------------


def penalty(m):
    x = INPUTS.clone().requires_grad_()
    out = m(x).sum(1)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out + (slope.norm(dim=1) - 1).square()


def equation(m):
    slope: Any = torch.func.grad(lambda x: m(x[None]).square().sum())
    slopes = torch.vmap(slope)(INPUTS)
    return (slopes + INPUTS).square().sum(1)


@pytest.mark.parametrize("loss", [penalty, equation])
@pytest.mark.parametrize(
    ("estimator", "build"),
    [
        (LocalLosses(Backprop()), chain),
        (LocalLosses(Backprop(), head="tail"), residual),
        (LocalGuess(), chain),
        (Highway(), residual),
    ],
    ids=["local", "tail", "guess", "highway"],
)
def test_derivatives_across_blocks_are_refused(estimator, build, loss):
    with pytest.raises(
        UnsupportedOperation, match=r"(takes derivatives itself|inside torch.vmap).*train with another method"
    ):
        estimator(build(), loss)


def test_checkpointing_refuses_derivatives_by_torch_func():
    with pytest.raises(UnsupportedOperation, match=r"takes derivatives by torch.func.*train with Backprop"):
        CheckpointedBackprop()(chain(), equation)


def test_mezo_inside_vmap():
    found, expected = (
        MeZO(num_tangents=3)(chain(), run, generator=torch.Generator().manual_seed(0)).grads
        for run in (lambda m: F.cross_entropy(torch.vmap(m)(INPUTS), LABELS, reduction="none"), losses)
    )
    assert_is(found, expected, rounding=1e-9)


def test_gauss_newton_inside_vmap():
    model = chain()
    found = GaussNewton(num_tangents=None)(model, equation)
    exact = Backprop()(model, equation).grads
    torch.testing.assert_close(found.directional_derivatives, torch.cat([g.flatten() for g in exact.values()]))
    assert sum((g * found.grads[name]).sum() for name, g in exact.items()) > 0


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [SPSA(epsilon=0.1), MeZO(epsilon=0.1), SecondOrder()])
def test_a_block_passes_on_the_output_of_its_own_parameters(estimator):
    """What the last block gets is what a plain pass computes, though the estimator has moved the parameters."""
    model, seen = chain(), []
    model[4].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    LocalLosses(estimator)(model, losses)
    torch.testing.assert_close(seen[-1], model[:4](INPUTS))


@pytest.mark.parametrize("estimator", [LocalLosses(Backprop()), LocalLosses(), LocalGuess(), FDFA(feedback_every=2)])
def test_an_estimator_for_a_model_of_another_size(estimator):
    estimator(chain(), losses)
    with pytest.raises(UnsupportedOperation, match=r"but its head was made for 4|but had \(4,\)"):
        estimator(chain(5), losses)


class Coupling(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, x):
        scale = self.net(x).tanh()
        return x * scale.exp(), scale.sum(1)


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([Coupling(), Coupling()])

    def forward(self, x):
        total = torch.zeros(len(x))
        for part in self.parts:
            x, volume = part(x)
            total = total + volume
        return x.square().sum(1) - total


def test_blocks_that_return_more_than_a_hidden_state_cannot_be_skipped():
    with pytest.raises(UnsupportedOperation, match="uses more of a block's output than its hidden state"):
        LocalLosses(Backprop(), head="tail")(Flow(), lambda m: m(INPUTS))


@pytest.mark.parametrize("second", [["2"], ["1"]])
def test_two_methods_with_one_estimator_and_other_blocks(second):
    torch.manual_seed(0)
    model, inner = nn.Sequential(nn.Linear(3, 3), *(Residual(nn.Linear(3, 3)) for _ in range(3))), Backprop()
    LocalLosses(inner, head="tail", blocks=["1", "2", "3"])(model, losses)
    found = LocalLosses(inner, head="tail", blocks=second)(model, losses).grads
    assert_is(found, LocalLosses(Backprop(), head="tail", blocks=second)(model, losses).grads)


def test_checkpointing_refuses_blocks_inside_vmap():
    with pytest.raises(UnsupportedOperation, match=r"runs inside torch.vmap, .*; train with Backprop"):
        CheckpointedBackprop()(chain(), lambda m: torch.vmap(m)(INPUTS).square().sum(1))


@pytest.mark.parametrize("num_tangents", [1, 2])
def test_an_exact_head_before_other_layers(num_tangents):
    def loss(m, x=INPUTS):
        for _ in range(2):
            x = m(x)
        return x.square().sum(1)

    with pytest.raises(UnsupportedOperation, match=r"4, the last layer, is called before 0; train without it"):
        ActivityPerturbation(num_tangents, exact_head=True)(chain(), loss)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_perturbed_nested_tensors_are_refused():
    rows = torch.nested.as_nested_tensor([INPUTS[:2], INPUTS[2:]])
    with pytest.raises(UnsupportedOperation, match="output is a nested tensor; use ForwardGradient"):
        ActivityPerturbation()(chain(), lambda m: torch.stack([x.sum() for x in m(rows).unbind()]))


@pytest.mark.parametrize("estimator", [ActivityPerturbation(2), ActivityPerturbation(exact_head=True), FDFA()], ids=str)
def test_perturbed_layers_inside_vmap_are_refused(estimator):
    with pytest.raises(
        UnsupportedOperation, match=r"a layer is called inside torch.vmap or another transform; use Forw"
    ):
        estimator(chain(), lambda m: torch.vmap(torch.func.jacfwd(m))(INPUTS).square().sum((1, 2)))


@pytest.mark.parametrize("estimator", [LocalLosses(Backprop()), LocalGuess()], ids=lambda e: type(e).__name__)
def test_local_losses_of_a_model_that_is_called_twice(estimator):
    with pytest.raises(UnsupportedOperation, match=r"calls the model once: .*; join the inputs with torch.cat"):
        estimator(chain(), lambda m: F.cosine_similarity(m(INPUTS), m(INPUTS + 1)))


# --- self-check -------------------------------------------------------------------------------------------------------


def test_self_check_of_second_derivatives_with_dropout():
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True, norm_first=True) for _ in range(2)]
    x = torch.randn(2, 3, 4)
    assert self_check(nn.Sequential(*layers), lambda m: m(x).sin().sum((1, 2)), SecondOrder()) == []


@pytest.mark.parametrize("estimator", [LocalLosses(head="tail"), LocalLosses(SPSA(), head="tail")])
def test_self_check_of_local_tails_with_dropout(estimator):
    torch.manual_seed(0)
    blocks = [Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.3))) for _ in range(3)]
    assert self_check(nn.Sequential(nn.Linear(3, 4), *blocks, nn.Linear(4, 3)), losses, estimator) == []

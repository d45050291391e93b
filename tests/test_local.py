"""Local losses compared with separate losses and manual backpropagation, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fgtrain import FDFA, ActivityPerturbation, Backprop, ForwardExact, LocalGuess, LocalLosses
from fgtrain.errors import UnsupportedOperation
from fgtrain.models import LocalMixer
from fgtrain.network.chains import SideBySide
from fgtrain.random import keyed_generator
from tests import properties
from tests.cases import IMAGES, INPUTS, LABELS
from tests.properties import flat

BLOCKS = ("0.", "2.", "4.")


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def losses(model):
    return F.cross_entropy(model(INPUTS), LABELS, reduction="none")


def taught(estimator, model, calls=5):
    """The estimator with heads that have learnt a little, from exact gradients so that they are always the same."""
    teacher = LocalLosses(Backprop())
    for _ in range(calls):
        teacher(model, losses)
    learnt = {name: value for name, value in teacher.state_dict().items() if name.startswith("heads.")}
    estimator.load_state_dict(estimator.state_dict() | learnt)
    return estimator


def local_gradients(model, heads):
    """Every block's gradient of its own loss, with what enters it detached."""
    x, found = INPUTS, {}
    for i, block in enumerate((model[:2], model[2:4], model[4:])):
        y = block(x)
        logits = heads[str(i)](y) if i < 2 else y
        params = [(f"{2 * i}.{name}", p) for name, p in model[2 * i].named_parameters()]
        slopes = torch.autograd.grad(F.cross_entropy(logits, LABELS), [p for _, p in params])
        found |= {name: slope for (name, _), slope in zip(params, slopes, strict=True)}
        x = y.detach()
    return found


def test_with_backprop_it_is_the_gradient_of_every_blocks_own_loss():
    model = mlp()
    estimator = taught(LocalLosses(Backprop()), model)
    expected = local_gradients(model, estimator.heads)
    grads = estimator(model, losses).grads
    assert grads.keys() == expected.keys()
    torch.testing.assert_close(flat(grads), flat(expected), rtol=1e-12, atol=1e-12)
    exact = Backprop()(model, losses).grads
    for name in ("4.weight", "4.bias"):  # the last block's own loss is the model's
        torch.testing.assert_close(grads[name], exact[name])
    assert not torch.allclose(grads["0.weight"], exact["0.weight"])  # the bias


@pytest.mark.parametrize("estimator", [LocalLosses(Backprop()), LocalGuess()], ids=str)
def test_a_module_called_twice_is_run_twice(estimator):
    """With a second instance of the activation it is the same network."""
    torch.manual_seed(0)
    layers, act = [nn.Linear(3, 3).double() for _ in range(3)], nn.ReLU()
    shared = nn.Sequential(layers[0], act, layers[1], act, layers[2])
    apart = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    state = {name: value.clone() for name, value in taught(estimator, apart).state_dict().items()}
    expected = estimator(apart, losses)
    estimator.load_state_dict(state)
    found = estimator(shared, losses)
    assert torch.equal(found.loss, losses(shared).mean())
    assert found.grads.keys() == expected.grads.keys()
    assert torch.equal(flat(found.grads), flat(expected.grads))


@pytest.mark.parametrize("frozen", [0, 2, 4])
@pytest.mark.parametrize("make", [lambda: LocalLosses(Backprop()), LocalLosses, LocalGuess])
def test_frozen_blocks_are_not_trained(make, frozen):
    model, part_frozen = mlp(), mlp()
    part_frozen[frozen].requires_grad_(False)
    free = taught(make(), model)(model, losses)
    found = taught(make(), model)(part_frozen, losses)
    torch.testing.assert_close(found.loss, free.loss)
    assert found.grads.keys() == {name for name, p in part_frozen.named_parameters() if p.requires_grad}
    if make is not LocalLosses:  # whose local gradients are random
        for name, g in found.grads.items():
            torch.testing.assert_close(g, free.grads[name])


def test_with_as_many_directions_as_units_it_is_the_local_gradient():
    """Balanced noise on 4 or 5 units of a block, of which each has a direction: the complete basis."""
    model = mlp()
    estimator = taught(LocalLosses(ActivityPerturbation(5, exact_head=True)), model)
    expected = local_gradients(model, estimator.heads)
    properties.assert_is(estimator(model, losses, generator=keyed_generator(0)).grads, expected)


USES = {
    "a penalty": lambda m: sum(p.square().sum() for p in m.parameters() if p.requires_grad),
    "a penalty on modules": lambda m: sum(layer.weight.norm() for layer in m.modules() if isinstance(layer, nn.Linear)),
    "parameters by name": lambda m: (
        dict(m.named_parameters())["0.weight"].sum() + m.get_parameter("4.bias").exp().sum()
    ),
    "a member": lambda m: m[2].weight.square().sum() * len(m) * isinstance(m, nn.Sequential),
    "a vector of all": lambda m: nn.utils.parameters_to_vector(m.parameters()).norm(),
    "an optimizer": lambda m: torch.optim.SGD(m.parameters()).defaults["lr"] + 0 * m[0].weight.sum(),
}


@pytest.mark.parametrize("name", USES)
def test_what_the_loss_adds_for_parameters_counts_in_their_blocks(name):
    model, add = mlp(), USES[name]
    loss = lambda m: losses(m) + add(m)
    heads = {key: value.clone() for key, value in taught(LocalLosses(Backprop()), model).state_dict().items()}
    added = Backprop()(model, add).grads
    for estimator in (LocalLosses(Backprop()), LocalLosses(ForwardExact())):
        estimator.load_state_dict(heads)
        expected = {key: g + added.get(key, 0) for key, g in local_gradients(model, estimator.heads).items()}
        found = estimator(model, loss)
        properties.assert_is(found.grads, expected)
        torch.testing.assert_close(found.loss, loss(model).detach().mean())


def test_a_functional_call_of_the_model():
    model = mlp()
    estimator = taught(LocalLosses(Backprop()), model)
    expected = local_gradients(model, estimator.heads)
    call = lambda m: torch.func.functional_call(m, dict(m.named_parameters()), (), {"input": INPUTS})
    properties.assert_is(estimator(model, lambda m: F.cross_entropy(call(m), LABELS)).grads, expected)


@pytest.mark.parametrize("make", [LocalLosses, LocalGuess])
def test_a_loss_that_differentiates_in_the_parameters_is_refused(make):
    def loss(m):
        slopes = torch.autograd.grad(losses(m).mean(), list(m.parameters()), create_graph=True)
        return sum(slope.square().sum() for slope in slopes)

    with pytest.raises(UnsupportedOperation, match="the loss function takes derivatives itself"):
        make()(mlp(), loss)


@pytest.mark.parametrize("make", [LocalLosses, LocalGuess])
def test_a_loss_that_calls_the_model_twice_from_a_later_step_on_is_refused(make):
    model, estimator = mlp(), make()
    estimator(model, losses)
    with pytest.raises(UnsupportedOperation, match="calls the model once"):
        estimator(model, lambda m: losses(m) + m(-INPUTS).square().sum(1))


def test_heads_learn_by_gradient_descent():
    model, estimator = mlp(), LocalLosses(Backprop(), head_lr=0.5)
    estimator(model, losses)
    hidden = model[:2](INPUTS).detach()
    zero = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.cross_entropy(hidden @ zero.T, LABELS), zero)
    torch.testing.assert_close(estimator.state_dict()["heads.0.weight"], -0.5 * slope)


@pytest.mark.parametrize("make", [lambda: LocalLosses(Backprop()), LocalGuess])
def test_heads_of_another_dtype_are_named(make):
    model, estimator = mlp(), make()
    estimator(model, losses)
    model.float()
    loss = lambda m: F.cross_entropy(m(INPUTS.float()), LABELS)
    with pytest.raises(UnsupportedOperation, match=r"float32 on cpu, but its head is torch.float64 on cpu: move the"):
        estimator(model, loss)
    estimator.to(torch.float32)
    assert estimator(model, loss).loss.dtype == torch.float32


def test_every_module_side_by_side_has_a_loss_of_its_own():
    torch.manual_seed(0)
    groups = SideBySide([nn.Sequential(nn.Linear(3, 2), nn.Tanh()), nn.Sequential(nn.Linear(3, 3), nn.Tanh())])
    model = nn.Sequential(groups, nn.Linear(5, 3)).double()
    estimator = taught(LocalLosses(Backprop()), model)
    heads, expected = dict(estimator.heads.items()), {}
    assert heads.keys() == {"0-0", "0-1"}
    for i, group in enumerate(groups):
        loss = F.cross_entropy(heads[f"0-{i}"](group(INPUTS)), LABELS)
        slopes = torch.autograd.grad(loss, list(group.parameters()))
        expected |= {f"0.{i}.0.{name}": slope for name, slope in zip(("weight", "bias"), slopes, strict=True)}
    grads = estimator(model, losses).grads
    exact = Backprop()(model, losses).grads
    expected |= {name: exact[name] for name in ("1.weight", "1.bias")}
    assert grads.keys() == expected.keys()
    torch.testing.assert_close(flat(grads), flat(expected), rtol=1e-12, atol=1e-12)


def test_a_head_for_every_group_is_restored():
    model = LocalMixer((2, 6, 6), 3, channels=8, depth=1, groups=2).double()
    estimator = LocalLosses(Backprop())
    loss_fn = lambda m: F.cross_entropy(m(IMAGES), LABELS, reduction="none")
    for _ in range(3):
        estimator(model, loss_fn)
    assert estimator.heads.keys() == {"0", "1-0", "1-1"}
    other = LocalLosses(Backprop())
    other.load_state_dict(estimator.state_dict())
    assert torch.equal(flat(other(model, loss_fn).grads), flat(estimator(model, loss_fn).grads))


@pytest.mark.slow
def test_mixer():
    torch.manual_seed(0)
    model = LocalMixer((2, 6, 6), 3, channels=8).double()
    loss_fn = lambda m: F.cross_entropy(m(IMAGES), LABELS, reduction="none")
    estimator = LocalLosses()
    before = loss_fn(model).mean().item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(60):
        for name, g in estimator(model, loss_fn, generator=keyed_generator(step)).grads.items():
            model.get_parameter(name).grad = g
        optimizer.step()
    assert loss_fn(model).mean().item() < 0.5 * before


def test_mixer_of_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="patch_size must divide the image, got 4 for 6 x 6"):
        LocalMixer((2, 6, 6), 3, patch_size=4)
    with pytest.raises(ValueError, match="groups must divide the channels, got 3 for 64"):
        LocalMixer((2, 6, 6), 3, groups=3)


@pytest.mark.parametrize(
    ("model", "loss_fn", "message"),
    [
        (nn.ParameterDict({"x": torch.ones(2)}), lambda m: m["x"].sum(), "local losses need an nn.Sequential"),
        (mlp(), lambda m: m[2:](m[:2](INPUTS)).sum(1), "not parts of the model"),
    ],
    ids=["no chain", "parts of the model"],
)
def test_what_it_refuses(model, loss_fn, message):
    with pytest.raises(UnsupportedOperation, match=message):
        LocalLosses()(model, loss_fn)


def test_an_estimator_with_a_state_cannot_serve_all_blocks():
    with pytest.raises(ValueError, match="FDFA keeps the feedback of one model and cannot serve several blocks"):
        LocalLosses(FDFA())
    LocalLosses(FDFA(), head="tail")

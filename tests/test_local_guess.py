from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from fgtrain import LocalGuess
from fgtrain.errors import UnsupportedOperation
from tests.cases import CASES, IMAGES, INPUTS, LABELS, Case
from tests.properties import estimated_grads, exact_grads, flat
from tests.small import Small, assert_equal_weights, make, trainer

MLP = Case(
    "mlp",
    lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)
    ),
    lambda m: F.cross_entropy(m(INPUTS), LABELS, reduction="none"),
)
BLOCKS = (("1.weight", "1.bias"), ("3.0.weight", "3.0.bias"), ("4.weight", "4.bias"))


def taught(case=MLP, calls=5):
    """An estimator whose heads have learnt a little, always the same."""
    estimator = LocalGuess()
    for _ in range(calls):
        estimated_grads(estimator, case)
    return estimator


def local_gradients(estimator, model):
    """The gradient of each head's loss in its own block, by hand."""
    x, found = INPUTS, []
    layers = [nn.Sequential(model[0], model[1], model[2]), model[3], model[4]]
    for i, layer in enumerate(layers):
        y = layer(x)
        logits = estimator.heads[str(i)](y) if i < 2 else y
        names = BLOCKS[i]
        slopes = torch.autograd.grad(F.cross_entropy(logits, LABELS), [model.get_parameter(n) for n in names])
        found.append(dict(zip(names, slopes, strict=True)))
        x = y.detach()
    return found


def test_bias_it_is_the_projection_on_the_local_gradients():
    estimator, gradient = taught(), exact_grads(MLP)
    guesses = local_gradients(estimator, MLP.build())
    estimate = estimated_grads(estimator, MLP)
    for names, guess in zip(BLOCKS, guesses, strict=True):
        g, v = (flat({name: tensors[name] for name in names}) for tensors in (gradient, guess))
        ours = flat({name: estimate[name] for name in names})
        torch.testing.assert_close(ours, (g @ v) / (v @ v) * v)
    for name in BLOCKS[-1]:  # nothing to guess
        torch.testing.assert_close(estimate[name], gradient[name])


def test_derivatives_are_true():
    estimator, gradient = taught(), exact_grads(MLP)
    guesses = local_gradients(estimator, MLP.build())
    estimate = estimator(MLP.build(), MLP.loss)
    expected = [sum((gradient[name] * v).sum() for name, v in guess.items()) for guess in guesses]
    torch.testing.assert_close(estimate.directional_derivatives, torch.stack(expected))


def test_heads_start_at_zero_and_learn():
    estimator = LocalGuess()
    first = estimated_grads(estimator, MLP)
    assert not any(first[name].any() for name in BLOCKS[0])
    losses = []
    for _ in range(20):
        model = MLP.build()
        y = model[2](model[1](INPUTS))
        losses.append(F.cross_entropy(estimator.heads["0"](y), LABELS).item())
        estimated_grads(estimator, MLP)
    assert all(b < a for a, b in pairwise(losses))
    second = estimated_grads(estimator, MLP)
    assert all(second[name].any() for name in BLOCKS[0])


def test_images_are_averaged_before_a_head():
    case = Case(
        "images",
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 3)),
        lambda m: F.cross_entropy(m(IMAGES), LABELS, reduction="none"),
    )
    estimator = taught(case)
    assert [head.in_features for head in estimator.heads.values()] == [3 * 2 * 2, 8]


def test_sparse_gradients_of_an_embedding():
    tokens = torch.tensor([[0, 2], [1, 1], [3, 0], [2, 2]])
    case, sparse = (
        Case(
            "tokens",
            lambda sparse=sparse: nn.Sequential(nn.Embedding(4, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 3)),
            lambda m: F.cross_entropy(m(tokens), LABELS, reduction="none"),
        )
        for sparse in (False, True)
    )
    torch.testing.assert_close(estimated_grads(taught(sparse), sparse), estimated_grads(taught(case), case))


def test_state_holds_the_heads():
    estimator, again = taught(), LocalGuess()
    again.load_state_dict(estimator.state_dict())
    assert again.state_dict().keys() == {f"heads.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert_equal_weights(again.state_dict(), estimator.state_dict())
    torch.testing.assert_close(estimated_grads(again, MLP), estimated_grads(estimator, MLP), rtol=0, atol=0)
    again.load_state_dict(LocalGuess().state_dict())  # of before the first call
    assert not again.state_dict()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resumed_equals_straight(tmp_path):
    def saves(folder):
        return ModelCheckpoint(tmp_path / folder, "cut", every_n_train_steps=4, save_top_k=1)

    straight, resumed = make(LocalGuess()), make(LocalGuess())
    trainer(tmp_path, max_steps=9).fit(straight, Small())
    trainer(tmp_path, saves("a"), max_steps=4).fit(make(LocalGuess()), Small())
    trainer(tmp_path, saves("b"), max_steps=9).fit(resumed, Small(), ckpt_path=tmp_path / "a" / "cut.ckpt")
    assert_equal_weights(resumed.state_dict(), straight.state_dict())
    assert any("estimator.heads" in name for name in resumed.state_dict())


def test_ranks_average_guesses_heads_and_derivatives():
    """Half of the batch on each of two ranks is the whole batch on one, if all that is sent is averaged."""
    estimator, seen = taught(), []

    def record(tensor):
        seen.append(tensor.numel())
        return tensor

    estimator(MLP.build(), MLP.loss, reduce=record)
    heads = (4 * 3 + 3, 5 * 3 + 3, 0)
    assert seen == [*(n + h for n, h in zip((16, 25, 18), heads, strict=True)), 3]


REFUSED = [
    (CASES[4], "need an nn.Sequential, got Tied; make the model one or train with another method"),
    (CASES[5], "need an nn.Sequential, got ParameterDict"),
    (CASES[1], r"calls model\(inputs\), not parts of the model"),
    (
        Case("tokens", lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), lambda m: m(INPUTS[None]).sum()),
        r"outputs \(B, classes\), got \(1, 4, 3\)",
    ),
]


@pytest.mark.parametrize(("case", "message"), REFUSED, ids=[case.name for case, _ in REFUSED])
def test_refused(case, message):
    with pytest.raises(UnsupportedOperation, match=message):
        estimated_grads(LocalGuess(), case)


@pytest.mark.parametrize(("arguments", "name"), [({"head_lr": 0.0}, "head_lr"), ({"head_size": 0}, "head_size")])
def test_bad_arguments(arguments, name):
    with pytest.raises(ValueError, match=name):
        LocalGuess(**arguments)

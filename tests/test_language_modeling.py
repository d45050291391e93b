"""Sequence models on a text file: exact derivatives, causal predictions, and the commands of the README."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from fgtrain import Backprop, directional_derivatives
from fgtrain.data import Text
from fgtrain.errors import DataError
from fgtrain.models import LSTMLM, TransformerLM
from fgtrain.tasks import LanguageModeling
from tests.commands import results_under, train

MODELS = {
    "transformer": lambda: TransformerLM(7, 6, width=8, depth=2, heads=2),
    "tied transformer": lambda: TransformerLM(7, 6, width=8, depth=1, heads=2, tie=True),
    "lstm": lambda: LSTMLM(7, width=6, depth=2),
}
TOKENS = torch.randint(7, (3, 7), generator=torch.Generator().manual_seed(0))
BATCH = (TOKENS[:, :-1], TOKENS[:, 1:])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_derivatives_are_exact(make):
    torch.manual_seed(0)
    model, task = make(), LanguageModeling()
    exact = Backprop()(model, lambda net: task.losses(net, BATCH)).grads
    directions = {name: torch.randn(3, *g.shape) for name, g in exact.items()}
    losses, derivatives = directional_derivatives(model, lambda net: task.losses(net, BATCH), directions)
    assert losses.shape == (3,)
    expected = sum((directions[name].flatten(1) @ g.flatten() for name, g in exact.items()), torch.zeros(3))
    torch.testing.assert_close(derivatives, expected)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_prediction_sees_only_what_came_before(make):
    torch.manual_seed(0)
    model = make()
    changed = BATCH[0].clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 7
    torch.testing.assert_close(model(changed)[:, :4], model(BATCH[0])[:, :4])
    assert not torch.allclose(model(changed)[:, 4:], model(BATCH[0])[:, 4:])


def test_the_loss_is_that_of_every_next_token():
    bigram = nn.Embedding(7, 7)
    with torch.no_grad():
        bigram.weight.zero_()
    losses = LanguageModeling().losses(bigram, BATCH)
    torch.testing.assert_close(losses, torch.full((3,), math.log(7)))


def test_windows_are_the_text(tmp_path):
    text = "".join(f"{i:03d}-" for i in range(200)) + "\N{GREEK SMALL LETTER PI}"
    (tmp_path / "text.txt").write_text(text)
    data = Text(4, str(tmp_path / "text.txt"), context=10)
    data.setup("fit")
    assert data.vocab is not None
    assert data.vocab == sorted(set(text))
    parts = data.load()[0]
    read = {name: "".join(data.vocab[i] for i in inputs.flatten()) for name, (inputs, _) in parts.items()}
    assert all(read[name] in text for name in read)
    assert text.startswith(read["train"])
    for inputs, following in parts.values():
        assert torch.equal(inputs.flatten()[1:], following.flatten()[:-1])
    assert Text(4, str(tmp_path / "text.txt"), context=10, tokens="bytes").vocab_size == 256


def entropy_of_characters(text):
    counts = Counter(text)
    return -sum(n / len(text) * math.log(n / len(text)) for n in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", "lstm"])
def test_from_the_command_line(model, tmp_path):
    overrides = ["method=backprop", "optimizer=adam", "lr=1e-2", "trainer.max_steps=60", "model.width=32"]
    status, _, err = train(tmp_path, "task=language_modeling", f"model={model}", *overrides)
    assert status == 0, err
    (results,) = results_under(tmp_path)
    assert (results["data"], results["model"]) == ("text", model)
    verse = Text(1)
    assert verse.vocab is not None
    assert results["metrics"]["train/loss"] < entropy_of_characters([verse.vocab[i] for i in verse._tokens])


@pytest.mark.slow
def test_forward_gradients_learn_the_text(tmp_path):
    overrides = ["method=fwdgrad_lowrank", "lr=3", "model.width=16", "model.depth=1", "data.context=16"]
    overrides += ["trainer.max_steps=100", "trainer.val_check_interval=100"]
    status, _, err = train(tmp_path, "task=language_modeling", *overrides)
    assert status == 0, err
    (results,) = results_under(tmp_path)
    assert results["metrics"]["val/loss"] < math.log(Text(1).vocab_size)  # what knowing nothing costs


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, r"data.path=.*text.txt cannot be read \(No such file or directory\); give a text file"),
        (b"\xff\xfe", {}, r"is not UTF-8 text \(invalid start byte\); use data.tokens=bytes"),
        (b"too short", {"context": 64}, r"has 9 tokens, too few for windows of 64; set a smaller data.context"),
    ],
)
def test_files_that_cannot_be_used(content, options, message, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        Text(4, str(path), **options)

"""Training a part of a network: frozen parameters do not change and cost nothing; trained ones have exact gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fgtrain import Backprop, ForwardGradient, directional_derivatives
from fgtrain.data import Digits
from fgtrain.errors import ConfigError, DataError
from fgtrain.models import CNN, FineTuned, LoRA, TransformerLM, torchvision_model
from tests.commands import results_under, train

pytestmark = pytest.mark.usefixtures("float64")


def cnn(input_shape, num_classes):
    torch.manual_seed(0)
    return CNN(input_shape, num_classes, channels=4, hidden=8)


def normed(num_classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes))


def tuned(network, train, **options):
    return FineTuned(network, train, input_shape=(1, 8, 8), num_classes=3, **options)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


IMAGES, LABELS = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])


def loss(net):
    return F.cross_entropy(net(IMAGES), LABELS, reduction="none")


@pytest.mark.parametrize(
    ("network", "train", "names"),
    [
        (normed, "head", {"network.4.weight", "network.4.bias"}),
        (normed, "norms", {"network.4.weight", "network.4.bias", "network.2.weight", "network.2.bias"}),
        (normed, ["*1.weight", "*.2.*"], {"network.1.weight", "network.2.weight", "network.2.bias"}),
        (normed, "lora", {"network.4.weight", "network.4.bias", "network.1.down.weight", "network.1.up.weight"}),
    ],
    ids=["head", "norms", "patterns", "lora"],
)
def test_what_is_trained(network, train, names):
    model = tuned(network, train)
    assert trained(model) == names
    for estimator in (Backprop(), ForwardGradient()):
        assert set(estimator(model, loss).grads) == names


def test_adapters_start_as_the_network_was():
    plain, adapted = cnn((1, 8, 8), 3), tuned(cnn, "lora", rank=2)
    assert sum(isinstance(m, LoRA) for m in adapted.modules()) == 5  # four convolutions, one Linear
    torch.testing.assert_close(adapted(IMAGES), plain(IMAGES))


def test_an_adapter_adds_its_low_rank_map():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    lora = LoRA(layer, rank=2, alpha=6.0)
    assert isinstance(lora.up, nn.Linear)
    assert isinstance(lora.down, nn.Linear)
    nn.init.normal_(lora.up.weight)
    x = torch.randn(5, 4)
    weight = layer.weight + 3.0 * lora.up.weight @ lora.down.weight
    torch.testing.assert_close(lora(x), F.linear(x, weight, layer.bias))


@pytest.mark.parametrize("train", ["head", "norms", "lora", "all"])
def test_derivatives_of_what_is_trained_are_exact(train):
    model = tuned(cnn if train != "norms" else normed, train)
    for p in model.parameters():  # adapters that are not at their start
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    exact = Backprop()(model, loss).grads
    directions = {name: torch.randn(2, *g.shape) for name, g in exact.items()}
    _, derivatives = directional_derivatives(model, loss, directions)
    expected = sum((directions[name].flatten(1) @ g.flatten() for name, g in exact.items()), torch.zeros(2))
    torch.testing.assert_close(derivatives, expected)


def test_frozen_statistics_stay():
    model = tuned(normed, "head").train()
    before = model.network[2].running_mean.clone()
    ForwardGradient()(model, loss)
    assert torch.equal(model.network[2].running_mean, before)
    model = tuned(normed, "norms").train()
    ForwardGradient()(model, loss)
    assert not torch.equal(model.network[2].running_mean, before)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_networks_of_torchvision(name):
    model = FineTuned(lambda num_classes: torchvision_model(name, num_classes, image_size=32), "lora", num_classes=3)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < numbers < 0.2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train": "tail"}, ConfigError, "train must be all, head, norms, lora or a list of patterns, got 'tail'"),
        ({"train": ["nope*"]}, ConfigError, "leaves no parameter of Sequential to train"),
        ({"train": "lora", "rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"train": "head", "weights": "nope.ckpt"}, DataError, "model.weights=nope.ckpt is not a file"),
    ],
)
def test_mistakes(options, error, message):
    with pytest.raises(error, match=message):
        tuned(normed, **options)


def test_weights_of_another_network(tmp_path):
    torch.save(cnn((1, 8, 8), 3).state_dict(), tmp_path / "cnn.pt")
    with pytest.raises(DataError, match=r"cnn.pt is of another network than Sequential"):
        tuned(normed, "head", weights=str(tmp_path / "cnn.pt"))


def test_some_classes_of_the_digits():
    data = Digits(8, classes=[5, 6, 9])
    data.setup("fit")
    assert data.num_classes == 3
    _, labels = data.load()[0]["train"]
    assert set(labels.tolist()) == {0, 1, 2}


@pytest.mark.slow
def test_from_pretraining_to_finetuning(tmp_path):
    """The two commands of the README, on a network small enough for a test."""
    small = ["trainer.max_steps=3", "trainer.val_check_interval=3", "data.batch_size=16"]
    small += ["model.network.name=shufflenet_v2_x0_5"]
    torch.set_default_dtype(torch.float32)
    status, _, err = train(tmp_path, "experiment=pretrain_digits", "run_dir=pretrained", *small)
    assert status == 0, err
    weights = tmp_path / "pretrained" / "checkpoints" / "last.ckpt"
    status, _, err = train(tmp_path, "experiment=finetune_digits", f"model.weights={weights}", "run_dir=tuned", *small)
    assert status == 0, err
    tuned_run = next(r for r in results_under(tmp_path) if r["method"] != "backprop")
    assert tuned_run["num_trained"] < tuned_run["num_parameters"] / 10
    before = torch.load(weights, weights_only=True)["state_dict"]
    after = torch.load(tmp_path / "tuned" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(
        after["model.network.network.conv1.0.layer.weight"],
        before["model.network.network.conv1.0.weight"],
    )


def test_sequence_models_can_be_adapted():
    model = FineTuned(lambda: TransformerLM(5, 8, width=8, heads=2), "lora", rank=1)
    tokens = torch.randint(5, (2, 8))
    assert model(tokens).shape == (2, 8, 5)

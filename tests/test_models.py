import math
from typing import Any, cast

import pytest
import torch
from torch import nn

from fgtrain.models import CNN, MLP, LocalMixer, Residual, TransformerLM
from fgtrain.models.initialization import LAYERS


def plain_mlp():
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), relu, nn.Linear(6, 6), relu, nn.Linear(6, 3))


def plain_cnn():
    def conv(channels):
        return nn.Sequential(nn.Conv2d(channels, 5, 3, padding=1), nn.ReLU())

    convs = [conv(2), conv(5), nn.MaxPool2d(2), conv(5), conv(5), nn.MaxPool2d(2)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3))


NETWORKS = {
    "mlp": (lambda **options: MLP((2, 2, 2), 3, [6, 6], **options), plain_mlp, (4, 2, 2, 2)),
    "cnn": (lambda **options: CNN((2, 8, 8), 3, 5, 6, **options), plain_cnn, (4, 2, 8, 8)),
}
networks = pytest.mark.parametrize(("make", "plain", "shape"), NETWORKS.values(), ids=NETWORKS)


def made(make, seed=0, **options):
    torch.manual_seed(seed)
    return make(**options)


def layers(network):
    return [module for module in network.modules() if isinstance(module, LAYERS)]


@networks
def test_by_default_the_weights_are_those_of_pytorch(make, plain, shape):
    """Configurations saved before there was a choice rebuild their networks."""
    expected = made(plain)
    state = torch.get_rng_state()
    for network in (made(make), made(make, init="torch", residual=False)):
        assert torch.equal(torch.get_rng_state(), state)
        assert network.state_dict().keys() == expected.state_dict().keys()
        for name, value in expected.state_dict().items():
            assert torch.equal(network.state_dict()[name], value), name


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: MLP((1, 16, 16), 50, [200, 300], **options),
        lambda **options: CNN((3, 8, 8), 50, 40, 200, **options),
        lambda **options: CNN((3, 16), 50, 60, 200, **options),
        lambda **options: MLP((1, 64), 50, [], **options),
    ],
    ids=["mlp", "cnn", "cnn of signals", "logistic"],
)
def test_he_draws_normal_weights_by_the_number_of_inputs(make):
    """The mean and the mean square of N normal numbers, to five standard errors."""
    network = made(make, init="he")
    for layer in layers(network):
        inputs, size = layer.weight[0].numel(), layer.weight.numel()
        variance = (1 if layer is layers(network)[-1] else 2) / inputs
        assert abs(layer.weight.mean()) < 5 * math.sqrt(variance / size)
        assert abs(layer.weight.square().mean() / variance - 1) < 5 * math.sqrt(2 / size)
        assert abs((layer.weight.abs() < math.sqrt(variance)).float().mean() - 0.6827) < 5 * math.sqrt(0.22 / size)
        assert not layer.bias.any()


@networks
def test_he_draws_from_the_global_generator(make, plain, shape):
    one, same, other = (made(make, seed, init="he") for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(layers(one)[0].weight, layers(other)[0].weight)


def test_he_carries_signals_through_many_layers():
    x = torch.randn(64, 1, 100, generator=torch.Generator().manual_seed(0))
    through = {
        init: made(MLP, input_shape=(1, 100), num_classes=10, hidden=[100] * 12, init=init) for init in ("torch", "he")
    }
    spread = {init: network(x).std(0).mean().item() for init, network in through.items()}
    assert spread["torch"] < 1e-3
    assert 0.1 < spread["he"] < 10


@networks
@pytest.mark.parametrize("init", ["torch", "he"])
def test_residual_network_with_blocks_at_zero_is_stem_and_head(make, plain, shape, init):
    network, x = made(make, init=init, residual=True), torch.randn(shape)
    for module in network:
        if isinstance(module, Residual) and init == "torch":
            for p in module.parameters():
                nn.init.zeros_(p)
    rest = nn.Sequential(*(module for module in network if not isinstance(module, Residual)))
    assert torch.equal(network(x), rest(x))


@networks
def test_residual_network_without_its_skips_is_the_plain_one(make, plain, shape):
    network, x = made(make, residual=True), torch.randn(shape)
    without = nn.Sequential(*(module.block if isinstance(module, Residual) else module for module in network))
    torch.testing.assert_close(without(x), made(plain)(x))
    assert not torch.allclose(network(x), without(x))


@networks
@pytest.mark.parametrize("init", ["torch", "he"])
def test_residual_adds_and_every_block_learns_from_the_start(make, plain, shape, init):
    network, x = made(make, init=init, residual=True), torch.randn(shape)
    blocks = [module for module in network if isinstance(module, Residual)]
    assert len(blocks) == len(layers(network)) - (2 if plain is plain_mlp else 3)
    before = x = torch.randn_like(network[0](x))
    torch.testing.assert_close(blocks[0](x), x + blocks[0].block(x))
    assert torch.equal(x, before)
    network(torch.randn(shape)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for block in blocks for p in block.parameters())


def test_only_layers_of_one_width_have_skips():
    network = MLP((4,), 2, [5, 5, 3, 3, 3, 6], residual=True)
    assert [isinstance(module, Residual) for module in network] == [False, True, False, True, True, False, False]
    assert network(torch.randn(7, 4)).shape == (7, 2)


@pytest.mark.parametrize("residual", [False, True])
def test_cnn_takes_signals(residual):
    network, x = (
        made(CNN, input_shape=(2, 13), num_classes=3, channels=4, hidden=5, residual=residual),
        torch.randn(6, 2, 13),
    )
    assert network(x).shape == (6, 3)
    images = made(CNN, input_shape=(2, 4, 13), num_classes=3, channels=4, hidden=5, residual=residual)
    for signal, image in zip(layers(network)[:-2], layers(images)[:-2], strict=True):
        assert signal.weight.shape == image.weight[:, :, 0].shape


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP((4,), 2, [0]), r"^hidden must hold positive widths, got \[0\]"),
        (
            lambda: MLP((4,), 2, [4], residual=True),
            r"^residual needs neighbouring hidden layers of one .* hidden=\[4\]",
        ),
        (lambda: MLP((4,), 2, [], residual=True), r"^residual needs neighbouring hidden layers of one width"),
        (lambda: MLP((4,), 2, init=cast(Any, "xavier")), r"^init must be 'torch' or 'he', got 'xavier'"),
        (lambda: CNN((1, 4, 3), 2), r"^CNN pools twice by 2 and needs images of at least 4 x 4, got 4 x 3"),
        (lambda: CNN((1, 3), 2), r"^CNN pools twice by 2 and needs signals of at least 4, got 3"),
        (lambda: CNN((9,), 2), r"^CNN takes images \(C, H, W\) or signals \(C, T\), got inputs of shape \(9,\)"),
        (lambda: CNN((1, 4, 4), 2, channels=0), r"^channels and hidden must be at least 1, got 0 and 1024"),
        (lambda: TransformerLM(5, 4, depth=0), r"^depth must be at least 1, got 0"),
        (lambda: LocalMixer((1, 8, 8), 10, depth=-1), r"^depth must be at least 1, got -1"),
        (lambda: TransformerLM(5, 4, width=0), r"^width must be a positive multiple of heads, got 0 and 4"),
        (lambda: TransformerLM(5, 4, width=6), r"^width must be a positive multiple of heads, got 6 and 4"),
        (lambda: LocalMixer((1, 40), 2), r"^LocalMixer takes images \(C, H, W\), got inputs of shape \(1, 40\)"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()

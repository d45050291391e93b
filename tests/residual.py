"""Networks of blocks that keep the shape of their input, each with a skip around it."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from fgtrain.models import LocalMixer, TransformerLM


class Residual(nn.Module):
    """x + f(x), or relu(x + f(x))."""

    def __init__(self, *branch: nn.Module, rectified: bool = False) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch(x)
        return x.relu() if self.rectified else x


def mlp(rectified=False):
    blocks = [Residual(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), rectified=rectified) for _ in range(3)]
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), *blocks, nn.Linear(6, 3))


def normalised():
    blocks = [Residual(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), *blocks, nn.Linear(6, 3))


def resnet():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 2, 1, 1], num_classes=3)


def vision_transformer():
    model = torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3)
    nn.init.normal_(model.get_parameter("heads.head.weight"))  # torchvision starts with zeros
    return model


VECTORS, IMAGES, TOKENS = (lambda: torch.randn(5, 4)), (lambda: torch.randn(3, 3, 8, 8)), (lambda: tokens(3, 6))


def tokens(*shape: int) -> Tensor:
    return torch.randint(7, shape)


MODELS = {
    "MLP": (mlp, VECTORS, ["2", "3", "4"]),
    "rectified MLP": (lambda: mlp(rectified=True), VECTORS, ["2", "3", "4"]),
    "MLP with batch norms": (normalised, VECTORS, ["2", "3"]),
    "transformer": (lambda: TransformerLM(7, 6, 8, 3, 2), TOKENS, ["blocks.0", "blocks.1", "blocks.2"]),
    "transformer, tied": (lambda: TransformerLM(7, 6, 8, 2, 2, tie=True), TOKENS, ["blocks.0", "blocks.1"]),
    "mixer": (lambda: LocalMixer((3, 8, 8), 3, 4, 8, 2, 2), IMAGES, ["3", "4"]),
    "vision transformer": (
        vision_transformer,
        IMAGES,
        ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"],
    ),
    "ResNet": (resnet, IMAGES, ["layer1.0", "layer2.1"]),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def built(name):
    torch.manual_seed(0)
    build, inputs, blocks = MODELS[name]
    x = inputs()
    targets = torch.roll(x, -1, 1) if x.dtype == torch.int64 else torch.arange(len(x)) % 3

    def loss(net):
        losses = F.cross_entropy(net(x).flatten(0, -2), targets.flatten(), reduction="none")
        return losses.view(len(x), -1).mean(1)

    return build(), loss, blocks


def stopped(model, blocks, slope=0.0):
    """A copy in which the gradient passes these blocks along their skips, and `slope` times that of their branches."""
    model = copy.deepcopy(model)
    for name in blocks:
        block = model.get_submodule(name)
        still = copy.deepcopy(block).requires_grad_(False)

        def forward(*args, _forward=block.forward, _still=still, **kwargs):
            x = args[0]
            out = x + _forward(x.detach(), *args[1:], **kwargs) - x.detach()
            if not slope:
                return out
            branch = _still(*args, **kwargs) - x
            return out + slope * (branch - branch.detach())

        block.forward = forward
    return model


def assert_same(estimate, expected):
    torch.testing.assert_close(estimate.loss, expected.loss)
    assert estimate.grads.keys() == expected.grads.keys()
    for name, g in expected.grads.items():
        torch.testing.assert_close(estimate.grads[name], g, msg=name)


def assert_leaves_the_trace_of_one_pass(estimator, name):
    """Two estimates leave the buffers and the random state of two plain passes, and no replaced method or hook."""
    model, loss, _ = built(name)
    plain = copy.deepcopy(model)
    for _ in range(2):
        torch.manual_seed(1)
        loss(plain)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        estimator(model, loss)
        assert torch.equal(torch.get_rng_state(), state)
    for (key, buffer), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, other), key
    assert all("forward" not in module.__dict__ and not module._forward_pre_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

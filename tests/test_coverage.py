"""The derivatives of common building blocks of networks equal those of backpropagation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from fgtrain import ForwardGradient, LowRank, Normal
from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.forward_ad import directional_derivatives
from fgtrain.forward_ad.registry import without_rules
from fgtrain.tangents.directions import dense
from tests.cases import Case, Custom
from tests.coverage_layers import IMAGES, PENALTIES, ROWS, SEQUENCES, probe
from tests.derivatives import COVERAGE, InTurn, assert_derivatives, assert_equal, reference
from tests.small import Small, make, trainer

SLOW = {case.name for case in PENALTIES}
"""Cases that the fast engine leaves to the reference engine."""

# Rounding of float64, 2e-16, over the thousands of sums in a case.


@pytest.mark.parametrize("case", COVERAGE, ids=lambda case: case.name)
def test_coverage(case, caplog):
    laws = [(Normal(), 1), (Normal(), 3), (LowRank(1), 1), (LowRank(1), 3), (LowRank(2), 3)]
    assert_derivatives(case, [*laws, (InTurn(in_order=True), 3), (InTurn(in_order=False), 2)])
    assert ("slower reference engine" in caplog.text) == (case.name in SLOW), caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("case", COVERAGE, ids=lambda case: case.name)
def test_reference_engine(case):
    assert_derivatives(case, [(Normal(), 3), (InTurn(in_order=True), 2)], reference)


@pytest.mark.slow
@pytest.mark.parametrize("case", COVERAGE, ids=lambda case: case.name)
def test_without_rules(case):
    with without_rules():
        assert_derivatives(case, [(LowRank(1), 3), (InTurn(in_order=False), 3)])


# --- whole models -------------------------------------------------------------------------------------------------


def _vision(name, build, size=32):
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(4)
    return Case(name, build, lambda m: F.cross_entropy(m(x), labels, reduction="none"))


def _vgg():
    """VGG-11 with batch norm, but with 64 hidden units for 4,096: nine tenths of its parameters are there."""
    features = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        _vision("resnet18", lambda: models.resnet18(num_classes=5)),
        _vision("vit", lambda: models.VisionTransformer(16, 8, 2, 2, 16, 32, dropout=0.1, num_classes=5), 16),
        _vision("vgg11_bn", _vgg),
        *(
            _vision(name, lambda name=name: models.get_model(name, num_classes=5))
            for name in ("mobilenet_v3_small", "convnext_tiny", "swin_t")
        ),
    ],
    ids=lambda case: case.name,
)
def test_torchvision(case, caplog):
    assert_derivatives(case, [(Normal(), 1), (LowRank(1), 3), (InTurn(in_order=True), 3)])
    assert "slower reference engine" not in caplog.text


# --- precision ----------------------------------------------------------------------------------------------------

NETS = {
    "linear, layer norm": (
        ROWS,
        lambda: nn.Sequential(nn.Linear(5, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4)),
    ),
    "conv, batch norm, conv": (
        IMAGES,
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3)),
    ),
    "conv, group norm, conv": (
        IMAGES,
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)),
    ),
    "channels last": (
        IMAGES.to(memory_format=torch.channels_last),
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(
            memory_format=torch.channels_last
        ),
    ),
    "attention": (SEQUENCES, lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)),
    "residual": (ROWS, lambda: nn.Sequential(nn.Linear(5, 8), Residual(), nn.Linear(8, 4))),
}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU())

    def forward(self, x):
        return x + self.inner(x)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("law", [Normal(), LowRank(1)], ids=repr)
@pytest.mark.parametrize(
    ("params", "autocast"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)], ids=str
)
def test_precision(net, law, params, autocast, caplog):
    """The root mean square error over 32 directions is at most twice backpropagation's, or twice the rounding."""
    x, build = NETS[net]
    torch.manual_seed(0)
    model = build().to(params)
    exact = build().double()
    exact.load_state_dict(model.state_dict())

    def loss(m):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = m(x.to(next(m.parameters()).dtype) if m is model else x)
        return probe(out.to(torch.promote_types(out.dtype, torch.float32)))

    def gradient_of(m, loss):
        grads = torch.autograd.grad(loss(m).mean(), list(m.parameters()))
        return torch.cat([g.flatten().double() for g in grads])

    tangents = law.sample(dict(model.named_parameters()), range(32))
    directions = torch.cat([dense(tangents[name]).flatten(1).double() for name, _ in model.named_parameters()], 1)
    expected = directions @ gradient_of(exact, lambda m: probe(m(x)))
    backprop = directions @ gradient_of(model, loss)
    _, found = directional_derivatives(model, loss, tangents)
    rounding = torch.finfo(autocast or params).eps * rms(expected)
    assert rms(found.double() - expected) <= 2 * max(rms(backprop - expected), rounding)
    assert "slower reference engine" not in caplog.text


def rms(x):
    return x.square().mean().sqrt()


# --- what cannot be done is said before a weight moves ------------------------------------------------------------


class Hooked(nn.Module):
    def forward(self, x):
        if x.requires_grad:
            x.register_hook(lambda grad: 2 * grad)
        return x


class Constant(nn.Module):
    def forward(self, x):
        return x.detach()


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (
            Custom(),
            UnsupportedOperation,
            r"^module '2' \(Custom\) uses a custom autograd.Function without jvp, which has no",
        ),
        (
            Hooked(),
            UnsupportedOperation,
            r"^module '2' \(Hooked\) uses a hook on the gradient of a tensor, which has no",
        ),
        (Constant(), LossError, r"the loss carries no tangent"),
    ],
    ids=["custom function", "hook", "detach"],
)
@pytest.mark.parametrize("estimator", [ForwardGradient(), ForwardGradient(LowRank(1), num_tangents=3)], ids=repr)
def test_refused_before_the_first_step(layer, error, message, estimator, tmp_path):
    module = make(estimator, nn.Sequential(nn.Flatten(), nn.Linear(4, 3), layer))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        trainer(tmp_path, max_steps=2).fit(module, Small())
    assert_equal(module.state_dict(), before, rtol=0, atol=0)

"""Layers of images and rows that the forward-AD engine must follow, one line each."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import Case

_generator = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


ROWS, SEQUENCES, IMAGES, VOLUMES = _normal(6, 5), _normal(4, 6, 8), _normal(4, 4, 9, 9), _normal(2, 3, 6, 6, 6)


def probe(out: Tensor) -> Tensor:
    """Losses (B,) that are not constant under any symmetry of a layer: squared distances from different numbers."""
    out = out if out.dim() > 1 else out.unsqueeze(1)
    goal = torch.linspace(-1, 1, out[0].numel(), dtype=torch.float64).view(out.shape[1:])
    return (out - goal.to(out.dtype)).square().flatten(1).mean(1)


def chain(name: str, x: Tensor, *layers: Callable[[], nn.Module]) -> Case:
    return Case(name, lambda: nn.Sequential(*(layer() for layer in layers)), lambda m: probe(m(x)))


def named(name: str, model: Callable[[], nn.Module], out: Callable[[Any], Tensor]) -> Case:
    return Case(name, model, lambda m: probe(out(m)))


# --- activations --------------------------------------------------------------------------------------------------


def _activation(layer: Callable[[], nn.Module], width: int = 6) -> Case:
    return chain(repr(layer()), ROWS, lambda: nn.Linear(5, 6), layer, lambda: nn.Linear(width, 2))


ACTIVATIONS = [
    *map(_activation, [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Sigmoid, nn.PReLU]),
    *map(_activation, [nn.Mish, nn.Hardswish, nn.Hardtanh, nn.ReLU6, nn.SELU, nn.CELU, nn.LogSigmoid, nn.Softsign]),
    *map(_activation, [nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Hardsigmoid, nn.RReLU]),
    _activation(lambda: nn.GELU("tanh")),
    _activation(lambda: nn.Softmax(1)),
    _activation(lambda: nn.LogSoftmax(-1)),
    _activation(lambda: nn.GLU(), 3),
    *(_activation(lambda f=f: f(inplace=True)) for f in (nn.ReLU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Mish)),
    *(_activation(lambda f=f: f(inplace=True)) for f in (nn.Hardswish, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid)),
]

# --- what stands between two linear layers, where value and tangents may be the parts of one tensor -----------------


def _between(name: str, function: Callable[[Tensor], Tensor]) -> Case:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2))

    return named(name, build, lambda m: m[2](function(m[1](m[0](ROWS)))))


BETWEEN = [
    _between("turned between layers", lambda h: h.t()),
    _between("turned and turned back", lambda h: h.t().contiguous().t()),
    _between("other rows", lambda h: h[1:]),
    _between("changed in place", lambda h: h.mul_(2).add_(1)),
    _between("twice", lambda h: h.relu() + h),
    _between("asked whether it requires a gradient", lambda h: 2 * h if h.requires_grad else 3 * h),
]

# --- losses that take derivatives in the input by themselves --------------------------------------------------------


def _penalized(name: str, slope: Callable[[nn.Module, Tensor], Tensor]) -> Case:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))

    return Case(name, build, lambda m: probe(m(ROWS)) + slope(m, ROWS).square().flatten(1).sum(1))


def _by_autograd(m: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(m(x).sum(), x, create_graph=True)[0]


def _of_a_product(m: nn.Module, x: Tensor) -> Tensor:
    scale = next(m.parameters())[0, 0]  # broadcast
    return torch.func.grad(lambda x: (scale * x * m(x).sum(1, keepdim=True)).sum())(x)


PENALTIES = [
    _penalized("slope by autograd.grad", _by_autograd),
    _penalized("slope of a product by func.grad", _of_a_product),
    _penalized("slope by func.vjp", lambda m, x: torch.func.vjp(m, x)[1](torch.ones(6, 2, dtype=x.dtype))[0]),
    _penalized("slope by func.jacrev", lambda m, x: torch.func.vmap(torch.func.jacrev(m))(x)),
]

# --- convolutions and poolings ------------------------------------------------------------------------------------


def _convs(name: str, first: Callable[[], nn.Module], then: Callable[[], nn.Module]) -> Case:
    return chain(name, IMAGES, first, then)


CONVOLUTIONS = [
    _convs("conv2d", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: nn.Conv2d(6, 4, 3, dilation=2)),
    _convs("conv2d groups", lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False)),
    _convs("conv2d same", lambda: nn.Conv2d(4, 6, 3, padding="same"), lambda: nn.Conv2d(6, 2, 3, padding="valid")),
    *(
        _convs(f"conv2d {mode}", lambda m=m: nn.Conv2d(4, 3, 3, padding=1, padding_mode=m), lambda: nn.Conv2d(3, 2, 3))
        for m in ("reflect", "circular", "replicate")
        for mode in [m]
    ),
    chain("conv1d", SEQUENCES, lambda: nn.Conv1d(6, 4, 3), lambda: nn.Conv1d(4, 4, 2, groups=2)),
    chain("conv3d", VOLUMES, lambda: nn.Conv3d(3, 4, 3), lambda: nn.Conv3d(4, 2, 2)),
    chain("conv2d without a batch", IMAGES[0], lambda: nn.Conv2d(4, 6, 3), lambda: nn.Conv2d(6, 2, 3)),
    chain("transposed 1d", SEQUENCES, lambda: nn.ConvTranspose1d(6, 4, 3), lambda: nn.ConvTranspose1d(4, 2, 3)),
    _convs(
        "transposed 2d", lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), lambda: nn.ConvTranspose2d(6, 4, 3, groups=2)
    ),
    chain("transposed 3d", VOLUMES, lambda: nn.ConvTranspose3d(3, 2, 2), lambda: nn.ConvTranspose3d(2, 2, 2)),
    _convs(
        "channels last", lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), lambda: nn.Conv2d(6, 2, 3)
    ),
    Case(
        "channels last, inputs too",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)).to(
            memory_format=torch.channels_last
        ),
        lambda m: probe(m(IMAGES.to(memory_format=torch.channels_last))),
    ),
]


def _pool(layer: Callable[[], nn.Module]) -> Case:
    return chain(repr(layer()), IMAGES, lambda: nn.Conv2d(4, 6, 3), layer, lambda: nn.Conv2d(6, 2, 1))


def _pools(name: str, x: Tensor, conv: Callable[[], nn.Module], *pools: Any) -> Case:
    return Case(name, conv, lambda m: torch.stack([probe(pool(m(x), 2)) for pool in pools]).sum(0))


POOLINGS = [
    _pool(lambda: nn.MaxPool2d(2)),
    _pool(lambda: nn.MaxPool2d(3, 2, 1)),
    _pool(lambda: nn.MaxPool2d(2, ceil_mode=True)),
    _pool(lambda: nn.MaxPool2d(2, dilation=2)),
    _pool(lambda: nn.AvgPool2d(2)),
    _pool(lambda: nn.AdaptiveAvgPool2d(2)),
    _pool(lambda: nn.AdaptiveMaxPool2d(2)),
    _pool(lambda: nn.LPPool2d(2, 2)),
    _pool(lambda: nn.FractionalMaxPool2d(2, output_size=3)),
    _pools(
        "poolings 1d", SEQUENCES, lambda: nn.Conv1d(6, 4, 1),
        F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d,
    ),
    _pools(
        "poolings 3d", VOLUMES, lambda: nn.Conv3d(3, 2, 1),
        F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d,
    ),
    named(
        "max_unpool2d", lambda: nn.Conv2d(4, 6, 3),
        lambda m: F.max_unpool2d(*F.max_pool2d(m(IMAGES), 2, return_indices=True), [2, 2], output_size=(7, 7)),
    ),
]  # fmt: skip

# --- normalisations and dropout -----------------------------------------------------------------------------------


def _norm(layer: Callable[[], nn.Module], train: bool = True) -> Case:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 6, 3), layer(), nn.ReLU(), nn.Conv2d(6, 2, 1)).train(train)

    return Case(f"{layer()!r}{'' if train else ' in eval'}", model, lambda m: probe(m(IMAGES)))


def _of_rows(layer: Callable[[], nn.Module]) -> Case:
    return chain(repr(layer()), SEQUENCES, lambda: nn.Linear(8, 8), layer, lambda: nn.Linear(8, 2))


NORMS = [
    *(
        _norm(layer, train)
        for train in (True, False)
        for layer in (
            lambda: nn.BatchNorm2d(6),
            lambda: nn.BatchNorm2d(6, affine=False),
            lambda: nn.BatchNorm2d(6, track_running_stats=False),
            lambda: nn.BatchNorm2d(6, momentum=None),
            lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        )
    ),
    _norm(lambda: nn.GroupNorm(2, 6)),
    _norm(lambda: nn.GroupNorm(3, 6, affine=False)),
    _norm(lambda: nn.InstanceNorm2d(6)),
    _norm(lambda: nn.InstanceNorm2d(6, affine=True)),
    _norm(lambda: nn.LocalResponseNorm(2)),
    chain("batch norm of the data", IMAGES, lambda: nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 6, 3)),
    chain("batch norm of rows", ROWS, lambda: nn.Linear(5, 6), lambda: nn.BatchNorm1d(6), lambda: nn.Linear(6, 2)),
    chain("batch norm 1d", SEQUENCES, lambda: nn.Conv1d(6, 4, 3), lambda: nn.BatchNorm1d(4)),
    chain("batch norm 3d", VOLUMES, lambda: nn.Conv3d(3, 4, 3), lambda: nn.BatchNorm3d(4)),
    chain("layer norm of the data", SEQUENCES, lambda: nn.LayerNorm(8), lambda: nn.Linear(8, 2)),
    _of_rows(lambda: nn.LayerNorm(8)),
    _of_rows(lambda: nn.LayerNorm([6, 8])),
    _of_rows(lambda: nn.LayerNorm(8, elementwise_affine=False)),
    _of_rows(lambda: nn.LayerNorm(8, bias=False)),
    _of_rows(lambda: nn.RMSNorm(8)),
]

DROPOUTS = [
    _of_rows(lambda: nn.Dropout(0.3)),
    _of_rows(lambda: nn.Dropout(0.3, inplace=True)),
    _of_rows(lambda: nn.Dropout(0.0)),
    _of_rows(lambda: nn.Dropout(1.0)),
    _of_rows(lambda: nn.Dropout1d(0.3)),
    _of_rows(lambda: nn.AlphaDropout(0.3)),
    _of_rows(lambda: nn.FeatureAlphaDropout(0.3)),
    chain("Dropout2d", IMAGES, lambda: nn.Conv2d(4, 6, 3), lambda: nn.Dropout2d(0.3)),
    chain("Dropout3d", VOLUMES, lambda: nn.Conv3d(3, 4, 3), lambda: nn.Dropout3d(0.3)),
]

LAYERS = [*ACTIVATIONS, *BETWEEN, *PENALTIES, *CONVOLUTIONS, *POOLINGS, *NORMS, *DROPOUTS]

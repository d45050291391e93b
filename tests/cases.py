"""The problems on which every estimator is tested: a model and a loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fgtrain.models import Residual


class Case(NamedTuple):
    """A model and a loss; `build` makes both anew, in float64, from a fixed seed."""

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[Any], Tensor]

    def build(self) -> Any:
        state = torch.get_rng_state()
        torch.manual_seed(0)
        model = self.model().double()
        torch.set_rng_state(state)
        return model


class NoJvp(torch.autograd.Function):
    """The identity, differentiable only once and in reverse mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads


class Custom(nn.Module):
    """A module that forward AD cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return NoJvp.apply(x)


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embed(tokens))


def _data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


LABELS = torch.tensor([0, 2, 1, 2])
INPUTS, IMAGES = _data(4, 3), _data(4, 2, 6, 6)

CASES = [
    Case(
        "mlp",
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)),
        lambda m: F.cross_entropy(m(INPUTS), LABELS, reduction="none"),
    ),
    Case(
        "regression, scalar loss, inner function of the model",
        lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()),
        lambda m: F.mse_loss(m[1](m[0](INPUTS)), INPUTS[:, :2]),
    ),
    Case(
        "convolutions, in-place ReLU",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        ),
        lambda m: F.cross_entropy(m(IMAGES), LABELS, reduction="none"),
    ),
    Case(
        "batch norm in training mode, dropout",
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Dropout(0.5), nn.Linear(4, 3)),
        lambda m: F.cross_entropy(m(INPUTS), LABELS, reduction="none"),
    ),
    Case("tied weights", Tied, lambda m: F.cross_entropy(m(LABELS), LABELS, reduction="none")),
    Case(
        "a bare parameter",
        lambda: nn.ParameterDict({"x": torch.tensor([1.5, -0.5])}),
        lambda m: (1 - m["x"][0]) ** 2 + 100 * (m["x"][1] - m["x"][0] ** 2) ** 2,
    ),
    Case(
        "residual block",
        lambda: nn.Sequential(nn.Linear(3, 4), Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, 3)),
        lambda m: F.cross_entropy(m(INPUTS), LABELS, reduction="none"),
    ),
]

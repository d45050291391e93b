"""Methods in the reference engine, which runs what the fast one cannot: the same estimate as in the fast one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fgtrain import ForwardExact, ForwardGradient, GaussNewton, Highway, LocalGuess, LocalLosses
from fgtrain.models import Residual
from tests.cases import INPUTS, LABELS
from tests.properties import assert_is


class Cube(torch.autograd.Function):
    """x^3 with a jvp of its own, which the fast engine does not call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        return 3 * ctx.saved_tensors[0] ** 2 * grads[0]

    @staticmethod
    def jvp(ctx, *tangents):
        return 3 * ctx.saved_tensors[0] ** 2 * tangents[0]


class Cubes(nn.Module):
    def __init__(self, *, custom):
        super().__init__()
        self.cube = Cube.apply if custom else lambda x: x**3

    def forward(self, x):
        return self.cube(x)


def network(*, custom):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Residual(nn.Sequential(nn.Linear(4, 4), Cubes(custom=custom), nn.Linear(4, 4)))
        return nn.Sequential(nn.Linear(3, 4), block, nn.Linear(4, 3)).double()


METHODS = {
    "forward gradient": lambda: ForwardGradient(num_tangents=2),
    "Gauss-Newton, closed form": lambda: GaussNewton(num_tangents=2),
    "local guess": LocalGuess,
    "local losses": lambda: LocalLosses(ForwardGradient(num_tangents=2)),
    "local losses by the tail": lambda: LocalLosses(ForwardGradient(num_tangents=2), head="tail"),
    "highway": lambda: Highway(ForwardExact()),
}
LOSSES = {
    "cross-entropy": lambda m: F.cross_entropy(m(INPUTS), LABELS, reduction="none"),
    "a loss without a closed form": lambda m: m(INPUTS).square().mean(1),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_is_that_of_the_fast_engine(method, loss, caplog):
    fast, slow = (
        METHODS[method]()(network(custom=custom), LOSSES[loss], generator=torch.Generator().manual_seed(0))
        for custom in (False, True)
    )
    assert "slower reference engine" in caplog.text
    assert_is(slow.grads, fast.grads, rounding=1e-10)

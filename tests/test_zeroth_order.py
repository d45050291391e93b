import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fgtrain import SPSA, Backprop, ForwardGradient, LowRank, MeZO, Normal, Rademacher, write_grads
from fgtrain.random import keyed_generator
from fgtrain.studies.benchmarks.steps import Method, measure
from tests.cases import CASES, INPUTS, LABELS, Case
from tests.properties import estimated_grads, exact_grads, flat

SMOOTH = Case(
    "smooth",
    lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
    lambda m: F.cross_entropy(m(INPUTS), LABELS, reduction="none"),
)
QUADRATIC = Case("quadratic", lambda: nn.Linear(3, 2), lambda m: F.mse_loss(m(INPUTS), INPUTS[:, :2]))


def bias(estimator, case):
    """The error of the K derivatives, whatever the directions are; they are read off the estimate."""
    estimate = estimator(case.build(), case.loss, generator=torch.Generator().manual_seed(0))
    derivative = estimate.directional_derivatives
    direction = flat(estimate.grads) / derivative
    return (derivative - flat(exact_grads(case)) @ direction).abs().item()


@pytest.mark.parametrize("law", [Rademacher(), Normal(), LowRank(2)], ids=repr)
def test_quadratics_have_no_bias(law):
    ours, exact = (flat(estimated_grads(e(law, 3), QUADRATIC)) for e in (SPSA, ForwardGradient))
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [SPSA, MeZO])
def test_bias_is_of_second_order(kind):
    errors = [bias(kind(epsilon=epsilon), SMOOTH) for epsilon in (4e-2, 2e-2, 1e-2)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


class Attention(nn.Module):
    """Kernels that take a layer's weights past the layer itself."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.recurrent = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        return self.recurrent(self.attention(x, x, x)[0])[0].square().mean()


SEQUENCE = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FUSED = Case("fused kernels", Attention, lambda m: m(SEQUENCE))


@pytest.mark.parametrize("case", [*CASES, FUSED], ids=lambda case: case.name)
@pytest.mark.parametrize("kind", [SPSA, MeZO])
def test_derivative_is_that_of_the_direction(kind, case):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert bias(kind(epsilon=1e-5), case) < 1e-6


@pytest.mark.slow
def test_mezo_holds_one_perturbed_parameter_at_a_time():
    methods = [Method("spsa", SPSA()), Method("mezo", MeZO())]
    rows = {row.method: row for row in measure("deep64", 1, methods, torch.device("cpu"), rounds=1)}
    parameters = 4 * (256 * 257 * 64 + 257 * 10) / 2**20
    assert rows["spsa"].peak_mib > 2 * parameters  # direction, perturbed copy; gradient
    assert rows["mezo"].peak_mib < 1.1 * parameters  # gradient


def test_mezo_leaves_the_parameters_alone_when_the_loss_fails():
    model = SMOOTH.build()
    before = {name: p.clone() for name, p in model.named_parameters()}

    def fails(m):
        m(INPUTS)
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        MeZO()(model, fails)
    for name, p in model.named_parameters():
        assert isinstance(p, nn.Parameter)
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("estimator", [SPSA(num_tangents=2), MeZO(num_tangents=2)], ids=str)
def test_a_run_is_replayed_from_its_seed_and_its_floats(estimator):
    model, again = SMOOTH.build(), SMOOTH.build()
    floats = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(10):
        estimate = estimator(model, SMOOTH.loss, generator=keyed_generator(0, step))
        floats.append(estimate.directional_derivatives)
        write_grads(model, estimate.grads)
        optimizer.step()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.01, momentum=0.9)
    for step, derivatives in enumerate(floats):
        write_grads(again, estimator.replay(again, derivatives, keyed_generator(0, step)))
        optimizer.step()
    for name, p in again.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name


def test_rows_are_problems_of_their_own():
    points = nn.ParameterDict({"x": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()})
    estimator = SPSA(num_tangents=4, rowwise=True)

    def losses(m):
        return 3 * m["x"].square().sum(1)

    estimate = estimator(points, losses, generator=torch.Generator().manual_seed(0))
    exact = Backprop()(points, losses).grads["x"]
    assert estimate.directional_derivatives is not None
    d = estimate.directional_derivatives.view(4, 3)
    torch.testing.assert_close((estimate.grads["x"] * exact).sum(1), d.square().mean(0))


@pytest.mark.parametrize("kind", [SPSA, MeZO])
def test_bad_arguments(kind):
    with pytest.raises(ValueError, match="num_tangents must be an integer of at least 1, got 0"):
        kind(num_tangents=0)
    with pytest.raises(ValueError, match=r"epsilon must be positive, got -1.0"):
        kind(epsilon=-1.0)

"""Gauss-Newton in the span of tangents, against dense Jacobians and Hessians by reverse mode."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fgtrain import ForwardGradient, GaussNewton, LowRank, Normal, Rademacher, write_grads
from fgtrain.errors import DivergenceError, LossError
from fgtrain.estimators import outputs
from fgtrain.estimators.outputs import linearized
from fgtrain.random import draw_seeds
from fgtrain.tangents.directions import dense
from fgtrain.tasks import Beale, Points
from tests import properties
from tests.basis import Basis
from tests.cases import CASES, INPUTS, Case
from tests.properties import estimated_grads, exact_grads, flat

GENERATOR = torch.Generator().manual_seed(2)
LABELS, MASKED = torch.tensor([0, 2, 1, 2]), torch.tensor([0, -100, 1, 2])
SHARES = torch.rand(4, 3, generator=GENERATOR, dtype=torch.float64).softmax(1)
CLASSES = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
TARGETS = torch.randn(4, 3, generator=GENERATOR, dtype=torch.float64)
TOKENS = torch.randint(3, (4, 2), generator=GENERATOR)


def in_pairs(z):
    """(B, T, C), two positions of every example."""
    return torch.stack([z, z.flip(0)], 1)


CLOSED = {
    "cross-entropy": lambda z: F.cross_entropy(z, LABELS, reduction="none"),
    "cross-entropy, mean": lambda z: F.cross_entropy(z, LABELS),
    "cross-entropy, sum": lambda z: F.cross_entropy(z, LABELS, reduction="sum"),
    "module": lambda z: nn.CrossEntropyLoss(weight=CLASSES)(z, LABELS),
    "label smoothing": lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.2, reduction="none"),
    "class weights": lambda z: F.cross_entropy(z, LABELS, weight=CLASSES, reduction="none"),
    "class weights, mean": lambda z: F.cross_entropy(z, LABELS, weight=CLASSES, label_smoothing=0.2),
    "ignored": lambda z: F.cross_entropy(z, MASKED, weight=CLASSES, label_smoothing=0.2),
    "ignored, per example": lambda z: F.cross_entropy(z, MASKED, reduction="none"),
    "probabilities": lambda z: F.cross_entropy(z, SHARES, weight=CLASSES, label_smoothing=0.1),
    "probabilities that do not add up": lambda z: F.cross_entropy(z, 2 * SHARES, reduction="none"),
    "sequences": lambda z: F.cross_entropy(in_pairs(z).mT, TOKENS, reduction="none").mean(1),
    "rows of sequences": lambda z: F.cross_entropy(in_pairs(z).flatten(0, 1), TOKENS.flatten()),
    "one example": lambda z: F.cross_entropy(z[0], LABELS[0]),
    "squared error": lambda z: F.mse_loss(z, TARGETS),
    "squared error of one number": lambda z: F.mse_loss(z[0, 0], TARGETS[0, 0]),
    "squared error, sum": lambda z: F.mse_loss(z, TARGETS, reduction="sum"),
    "squared error, per example": lambda z: F.mse_loss(z, TARGETS, reduction="none").mean(1),
}
OTHERS = {
    "by hand": lambda z: (z - TARGETS).pow(4).mean(1),
    "huber": lambda z: F.huber_loss(z, TARGETS, reduction="none").mean(1),
    "binary cross-entropy": lambda z: F.binary_cross_entropy_with_logits(z, SHARES, reduction="none").sum(1),
    "sum of two": lambda z: F.cross_entropy(z, LABELS) + 0.5 * F.mse_loss(z, TARGETS),
    "scaled": lambda z: 3 * F.cross_entropy(z, LABELS, reduction="none"),
    "weighted examples": lambda z: F.cross_entropy(z, LABELS, reduction="none") * CLASSES[LABELS],
    "a penalty": lambda z: F.cross_entropy(z, LABELS) + z.square().mean(),
    "negative class weights": lambda z: F.cross_entropy(z, LABELS, weight=-CLASSES, reduction="none"),
    "broadcast": lambda z: F.mse_loss(z.unsqueeze(0), TARGETS, reduction="none").mean((0, 2)),
    "mixed examples": lambda z: (z @ z.T).logsumexp(1) - z.square().sum(1),
}


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def case_of(loss, name="loss"):
    return Case(name, net, lambda m: loss(m(INPUTS)))


def sampled(model, num, law=None):
    params = dict(model.named_parameters())
    return (law or Normal()).sample(params, draw_seeds(torch.Generator().manual_seed(0), num))


def gauss_newton_matrix(model, loss):
    """J^T H J, (n, n), rows in the order of the names; J and H by reverse mode."""
    names = sorted(dict(model.named_parameters()))
    params = {name: model.get_parameter(name).detach() for name in names}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (INPUTS,)))(params)
    j = torch.cat([jacobian[name].reshape(12, -1) for name in names], 1)
    hessian = torch.func.hessian(lambda z: loss(z).mean())(model(INPUTS).detach()).reshape(12, 12)
    return j.T @ hessian @ j


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", [*CLOSED, *OTHERS])
def test_curvature_is_exact(name):
    loss = (CLOSED | OTHERS)[name]
    case = case_of(loss)
    model = case.build()
    directions = sampled(model, 5)
    v = torch.cat([dense(directions[n]).reshape(5, -1) for n in sorted(directions)], 1).T
    found = linearized(model, case.loss, directions)
    torch.testing.assert_close(found.loss, loss(model(INPUTS)).mean().detach())
    torch.testing.assert_close(found.slopes, v.T @ flat(exact_grads(case)))
    torch.testing.assert_close(found.curvature, v.T @ gauss_newton_matrix(model, loss) @ v)


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_need_no_second_derivative(name, monkeypatch):
    monkeypatch.setattr(outputs, "curvature_in_span", None)
    model = net().double()
    linearized(model, lambda m: CLOSED[name](m(INPUTS)), sampled(model, 2))


@pytest.mark.parametrize("name", ["cross-entropy", "ignored", "squared error", "huber", "by hand"])
def test_a_complete_basis_gives_the_levenberg_marquardt_step(name):
    loss = (CLOSED | OTHERS)[name]
    case = case_of(loss)
    g, gradient = gauss_newton_matrix(case.build(), loss), flat(exact_grads(case))
    n = len(gradient)
    step = torch.linalg.solve(g + 0.1 * g.trace() / n * torch.eye(n).double(), gradient)
    found = flat(estimated_grads(GaussNewton(Basis(), n, damping=0.1, max_change=None), case))
    torch.testing.assert_close(found, step, rtol=1e-9, atol=1e-12)


REGRESSION = Case(
    "linear regression",
    lambda: nn.Linear(3, 2),
    lambda m: F.mse_loss(m(INPUTS), TARGETS[:, :2], reduction="none").mean(1),
)


@pytest.mark.parametrize("law", [Normal(), Rademacher(), LowRank(1)], ids=repr)
@pytest.mark.parametrize("num", [24, 40])
def test_a_quadratic_is_minimised_in_one_step(law, num):
    """More random directions than the eight parameters."""
    model = REGRESSION.build()
    estimator = GaussNewton(law, num, damping=1e-10, max_change=None)
    estimate = estimator(model, REGRESSION.loss, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p -= estimate.grads[name].to(p)
    least = torch.linalg.lstsq(torch.cat([INPUTS, torch.ones(4, 1)], 1), TARGETS[:, :2]).solution
    torch.testing.assert_close(model.weight.T, least[:3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.bias, least[3], rtol=1e-5, atol=1e-6)


# --- outputs ---------------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Returns a nest, and is called in parts."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.body(x).tanh()
        return {"logits": self.head(hidden), "hidden": [hidden, "a word"], "count": torch.tensor(4)}


def square(z):
    return (z - TARGETS).square().mean(1)


WAYS = {
    "a nest": lambda m: square(m(INPUTS)["logits"]),
    "parts": lambda m: square(m.head(m.body(INPUTS).tanh())),
    "loss in the model's forward": lambda m: F.mse_loss(m.head(torch.tanh(m.body(INPUTS))), TARGETS),
    "written into": lambda m: square(m(INPUTS)["logits"].mul_(1.0)),
}


@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_found_however_the_model_is_called(way):
    torch.manual_seed(0)
    model = Parts().double()
    directions = sampled(model, 3)
    expected = linearized(model, lambda m: F.mse_loss(m(INPUTS)["logits"], TARGETS), directions)
    for a, b in zip(linearized(model, WAYS[way], directions), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_several_calls_are_outputs_together():
    model = net().double()
    directions = sampled(model, 3)
    both = linearized(model, lambda m: (m(INPUTS) * m(TARGETS).tanh()).square().sum(1), directions)
    one = linearized(
        model, lambda m: (lambda z: (z[:4] * z[4:].tanh()).square().sum(1))(m(torch.cat([INPUTS, TARGETS]))), directions
    )
    for a, b in zip(both, one, strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_call_the_parameters_are_the_outputs():
    """So are they of a model that returns them: Newton's step in the span, with absolute eigenvalues."""
    point = Points(Beale()).double()
    bare = nn.ParameterDict({"x": point().detach().clone()})
    steps = [
        flat(GaussNewton(Normal(), 2)(model, loss, generator=torch.Generator().manual_seed(0)).grads)
        for model, loss in ((point, lambda m: Beale().value(m())), (bare, lambda m: Beale().value(m["x"])))
    ]
    torch.testing.assert_close(*steps)


def test_what_the_loss_takes_from_parameters_directly_is_in_the_slopes():
    case = Case("penalty", net, lambda m: F.cross_entropy(m(INPUTS), LABELS) + m[0].weight.square().sum())
    model = case.build()
    directions = sampled(model, 4)
    v = torch.cat([dense(directions[n]).reshape(4, -1) for n in sorted(directions)], 1).T
    found = linearized(model, case.loss, directions)
    torch.testing.assert_close(found.slopes, v.T @ flat(exact_grads(case)))
    expected = gauss_newton_matrix(model, lambda z: F.cross_entropy(z, LABELS))
    torch.testing.assert_close(found.curvature, v.T @ expected @ v)


def test_a_loss_that_draws_numbers_is_the_same_function_again():
    """Those of a mask within the model come first."""
    model = nn.Sequential(net(), nn.Dropout(0.5)).double()
    directions = sampled(model, 3)
    noise = []

    def loss(m):
        z = m(INPUTS)
        noise.append(torch.rand(4, 3, dtype=torch.float64))
        return (z - noise[-1]).pow(4).mean(1)

    torch.manual_seed(0)
    found = linearized(model, loss, directions)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    loss(model)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(drawn, noise[0]) for drawn in noise)
    assert found.curvature.isfinite().all()


def test_hooks_act_once():
    model = net().double()
    model.register_forward_hook(lambda *given: 2 * given[2])
    directions = sampled(model, 3)
    doubled = linearized(model, lambda m: square(m(INPUTS)), directions)
    expected = linearized(model, lambda m: F.mse_loss(m(INPUTS), TARGETS), directions)
    torch.testing.assert_close(doubled.curvature, expected.curvature)


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [Normal(), LowRank(2)], ids=repr)
@pytest.mark.parametrize("cap", [1e-4, 1e4])
def test_the_change_is_capped(law, cap):
    case = CASES[0]
    model = case.build()
    free, capped = (
        GaussNewton(law, 4, max_change=c)(model, case.loss, generator=torch.Generator().manual_seed(0))
        for c in (None, cap)
    )
    g = linearized(model, case.loss, sampled(model, 4, law)).curvature
    assert free.weights is not None
    change = free.weights @ g @ free.weights
    factor = min(1.0, (cap / change.item()) ** 0.5)
    torch.testing.assert_close(capped.weights, factor * free.weights)
    properties.assert_is(capped.grads, properties.scaled(free.grads, factor))


def test_negative_curvature_is_walked_away_from():
    model = nn.ParameterDict({"x": torch.tensor([1.0, 0.1], dtype=torch.float64)})
    estimator = GaussNewton(Basis(), 2, damping=1e-9, max_change=None)
    estimate = estimator(model, lambda m: m["x"][0] ** 2 - m["x"][1] ** 2)
    torch.testing.assert_close(model["x"] - estimate.grads["x"], torch.tensor([0.0, 0.2], dtype=torch.float64))


def test_length_of_directions_and_losses():
    """Of directions nothing changes; a loss of three times the size changes nothing but its curvature's cap."""

    class Long(Normal):
        def fill(self, rows, size, generator):
            super().fill(rows, size, generator)
            rows.mul_(100)

    tripled = Case("tripled", CASES[0].model, lambda m: 3 * CASES[0].loss(m))
    first = estimated_grads(GaussNewton(Normal(), 3, max_change=None), CASES[0])
    for law, case in ((Long(), CASES[0]), (Normal(), tripled)):
        properties.assert_is(estimated_grads(GaussNewton(law, 3, max_change=None), case), first, rounding=1e-9)


def test_ranks_send_slopes_and_half_of_the_curvature():
    """The mean of two halves' numbers is that of the whole batch."""
    model = net().double()

    def loss(part):
        return lambda m: F.cross_entropy(m(INPUTS[part]), LABELS[part], reduction="none")

    halves: list[torch.Tensor] = []
    for part in (slice(0, 2), slice(2, 4)):
        GaussNewton(num_tangents=3)(
            model, loss(part), generator=torch.Generator().manual_seed(0), reduce=lambda t: halves.append(t) or t
        )
    assert [half.shape for half in halves] == [(3 + 6,), (3 + 6,)]
    mean = (halves[0] + halves[1]) / 2
    estimates = [
        GaussNewton(num_tangents=3)(model, loss(part), generator=torch.Generator().manual_seed(0), reduce=reduce)
        for part, reduce in ((slice(0, 4), None), (slice(0, 2), lambda _: mean))
    ]
    torch.testing.assert_close(estimates[0].weights, estimates[1].weights)


def test_what_is_not_finite_is_refused_and_forgotten():
    estimator, model = GaussNewton(), net().double()

    def estimate(x):
        loss = lambda m: F.cross_entropy(m(x), LABELS, reduction="none")
        return estimator(model, loss, generator=torch.Generator().manual_seed(0))

    before = estimate(INPUTS)
    for value in (torch.nan, torch.inf):
        with pytest.raises(DivergenceError):
            write_grads(model, estimate(torch.full_like(INPUTS, value)).grads)
    assert not estimator.state_dict()
    assert torch.equal(flat(estimate(INPUTS).grads), flat(before.grads))


@pytest.mark.parametrize("loss", [lambda z: z.mean(1), lambda z: F.l1_loss(z, TARGETS)])
def test_a_loss_without_curvature_is_one_line(loss):
    with pytest.raises(LossError, match=r"^the loss is linear in the outputs of the model[^\n]*use ForwardGradient"):
        estimated_grads(GaussNewton(), case_of(loss))


def test_a_flat_point_is_no_mistake():
    model = net().double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    estimate = GaussNewton()(model, lambda m: F.mse_loss(m(INPUTS), torch.zeros(4, 3).double()))
    assert not flat(estimate.grads).any()


def test_a_loss_without_the_model_is_refused():
    with pytest.raises(LossError, match="the loss carries no tangent"):
        GaussNewton()(net().double(), lambda m: F.cross_entropy(m(INPUTS).detach(), LABELS))


def test_the_result_names_what_replays_it():
    model, estimator = net().double(), GaussNewton(num_tangents=3)
    estimate = estimator(model, lambda m: F.mse_loss(m(INPUTS), TARGETS))
    assert estimate.replayed is estimate.weights
    assert estimate.weights is not None
    assert estimate.weights.shape == (3,)
    plain = ForwardGradient()(model, lambda m: F.mse_loss(m(INPUTS), TARGETS))
    assert plain.replayed is plain.directional_derivatives


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tangents": 0}, "num_tangents must be an integer of at least 1, got 0"),
        ({"damping": 0.0}, "damping must be positive, got 0.0"),
        ({"max_change": -1.0}, "max_change must be positive or None, got -1.0"),
        ({"tangents": SimpleNamespace()}, "tangents must be a law of directions"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussNewton(**arguments)

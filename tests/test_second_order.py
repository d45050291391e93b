import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fgtrain import GaussNewton, Normal, Rademacher, SecondOrder
from fgtrain.errors import UnsupportedOperation
from fgtrain.estimators.second_order import curvature_in_span
from fgtrain.random import draw_seeds
from fgtrain.tangents.directions import dense
from fgtrain.tasks import Points, Rosenbrock
from tests import properties
from tests.basis import Basis
from tests.cases import CASES, Case
from tests.derivatives import exact_hessian
from tests.properties import estimated_grads, exact_grads, flat


def sampled(model, num_tangents, draw=0):
    """The directions an estimator takes: {name: (K, *p.shape)} and the matrix V (n, K)."""
    params = dict(model.named_parameters())
    directions = Normal().sample(params, draw_seeds(torch.Generator().manual_seed(draw), num_tangents))
    tangents = {name: dense(tangent) for name, tangent in directions.items()}
    return tangents, torch.cat([tangents[name].reshape(num_tangents, -1) for name in sorted(tangents)], 1).T


def layers(name, *modules):
    return Case(name, lambda: nn.Sequential(*modules), lambda m: m(SEQUENCE).square().sum((1, 2)))


ROWS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
X = ROWS.double()
AT = torch.tensor([0, 1, 1, 2, 2])[:, None].expand(5, 3)
SEQUENCE = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * x


class Taught(nn.Module):
    """A target of the network itself, and statistics of the past, without gradients."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        z = self.layer(x).tanh()
        with torch.no_grad():
            target = self.layer(-x)
            self.mean.mul_(0.5).add_(z.mean((0, 1)))
        return (z - target) * (1 + self.mean)


def linear(name, out):
    """`out` of a linear layer's output h, (5, 3)."""
    return Case(name, lambda: nn.Linear(3, 3), lambda m: out(m(X)).sin().sum())


def with_first(write):
    """`write` changes a tensor that holds h, given h."""

    def out(h):
        made = 1 * h
        write(made, h)
        return made * h

    return out


class Packed(nn.Module):
    """A recurrence over sequences of different lengths."""

    def __init__(self, kind):
        super().__init__()
        self.into, self.rnn = nn.Linear(3, 2), kind(2, 3)

    def forward(self, x):
        packed = pack_padded_sequence(self.into(x), torch.tensor([3, 1]), enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0])[0].square().sum((0, 2))


SINGULAR = [
    linear("sqrt of relu", lambda h: h.relu().sqrt()),
    linear("sqrt_ of relu", lambda h: (1 * h.relu()).sqrt_()),
    linear("sqrt of abs", lambda h: h.relu().abs().sqrt()),
    linear("a power between 1 and 2", lambda h: h.clamp(min=0) ** 1.5),
    linear("a clamped logarithm", lambda h: h.relu().log().clamp(min=-50)),
    linear("acos of a clamped number", lambda h: (3 * h).clamp(-1, 1).acos()),
    linear("xlogy of zeros", lambda h: torch.xlogy(h.relu(), h.relu())),
    linear("atan2 at the origin", lambda h: torch.atan2(h.relu(), h.relu())),
    linear("a quotient of zeros without nan", lambda h: (h.relu() / h.relu()).nan_to_num(0)),
]
WRITES = [
    linear("x[..., 0] = y", with_first(lambda made, h: made.__setitem__((..., 0), h[0, 1]))),
    linear("fill_", with_first(lambda made, h: made[0].fill_(h[0, 1]))),
    linear("scatter_reduce_", with_first(lambda made, h: made.scatter_reduce_(0, AT, h, "amax"))),
    linear("scatter_reduce", lambda h: h.scatter_reduce(0, AT, h.exp(), "mean", include_self=False)),
    linear("x[..., 0] = y of a plain tensor", lambda h: written(h)),
]
OTHERS = [
    linear("roll of a number", lambda h: torch.roll(h.sum(), 1) * h),
    linear("glu", lambda h: nn.functional.glu(h[:, :2], 1)),
    linear("soft margin", lambda h: nn.functional.soft_margin_loss(h, X.sign(), reduction="none")),
    linear("data", lambda h: h / h.data.norm() + (h * 1).detach_() * h),
    linear("a sample of a normal distribution", lambda h: torch.distributions.Normal(h, h.exp()).rsample()),
    linear("a gamma distribution of constants", lambda h: h * torch.igamma(X.exp(), X.exp())),
    linear("by name", lambda h: torch.matmul(h, other=h.T)),
    linear("sparse @ h", lambda h: torch.eye(5, dtype=h.dtype).to_sparse() @ h),
    linear("channels last", lambda h: h.view(5, 3, 1, 1).to(memory_format=torch.channels_last)),
    linear("asked whether it requires a gradient", lambda h: h * (1 + h.requires_grad + h.detach().requires_grad)),
    *(
        Case(f"a packed {kind.__name__}", lambda kind=kind: Packed(kind), lambda m: m(torch.stack([X[:3], X[2:]], 1)))
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
    ),
    Case("copied", lambda: nn.Linear(3, 3), lambda m: (m(X).exp() * copy.deepcopy(m)(X).detach()).sum(1)),
]


def written(h):
    made = torch.zeros_like(ROWS, dtype=h.dtype)
    made[..., 0] = h[0, 1]
    return made * h


TWICE = [
    *SINGULAR,
    *WRITES,
    *OTHERS,
    *CASES,
    *(
        Case(f"linear algebra: {name}", lambda: nn.Linear(6, 3), lambda m, f=f: f((a := m(SEQUENCE)).mT @ a + a[:, :3]))
        for name, f in {
            "det": lambda a: torch.det(a) + a.roll(1, 1).det(),
            "slogdet": lambda a: torch.linalg.slogdet(a).logabsdet + a.slogdet()[1],
            "logdet": lambda a: torch.logdet(a @ a.mT + torch.eye(3, dtype=a.dtype)),
            "solve": lambda a: torch.linalg.solve(a, a.mT.cos()).square().sum((1, 2)),
            "solve for vectors": lambda a: torch.linalg.solve(a, a[:, 0].sin()).square().sum(1),
        }.items()
    ),
    layers("a parameter that is one number", nn.Linear(6, 2), Scaled(), nn.Tanh()),
    layers("layer norm", nn.Linear(6, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 2)),
    layers("batch norm", nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.SiLU(), nn.Conv1d(4, 2, 1)),
    layers("batch norm in use", nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4).eval(), nn.SiLU(), nn.Conv1d(4, 2, 1)),
    layers("instance norm", nn.Conv1d(4, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.SiLU(), nn.Conv1d(4, 2, 1)),
    layers("group norm", nn.Conv1d(4, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv1d(4, 2, 1)),
    layers("a random slope that is the mean", nn.Linear(6, 6), nn.RReLU().eval(), nn.Linear(6, 2), nn.Tanh()),
    layers("rms norm", nn.Linear(6, 6), nn.RMSNorm(6), nn.SiLU(), nn.Linear(6, 2)),
    Case("no_grad", Taught, lambda m: m(SEQUENCE).square().sum((1, 2))),
    Case(
        "spectral norm",
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 2)),
        lambda m: m(SEQUENCE).square().sum((1, 2)),
    ),
    layers("transformer", nn.TransformerEncoderLayer(6, 2, 5, dropout=0.0, batch_first=True)),
]


@pytest.mark.parametrize("case", TWICE, ids=lambda case: case.name)
def test_curvature_is_exact(case):
    model = case.build()
    tangents, v = sampled(model, 3)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        _, slopes, curvature = curvature_in_span(model, case.loss, tangents)
    torch.testing.assert_close(slopes, v.T @ flat(exact_grads(case)))
    torch.testing.assert_close(curvature, v.T @ exact_hessian(case) @ v)


@pytest.mark.parametrize(
    ("loss", "operation"),
    [
        (lambda m: Doubled.apply(m(ROWS)).sum(1), "a custom autograd.Function without setup_context"),
        (
            lambda m: Squared.apply(m(ROWS)).sum(1),
            "a custom autograd.Function",
        ),
        (lambda m: slopes(m).square().sum(1), "a derivative with respect to its own input"),
        (lambda m: torch.rrelu_(m(ROWS) * 1, training=True).sum(1), "aten::rrelu_with_noise_"),
        (
            lambda m: torch.linalg.householder_product(m(ROWS), ROWS[0, :2]).sum(1),
            "linalg_householder_product",
        ),
        (lambda m: with_data(m(ROWS)).square().sum(1), "an assignment to .data"),
        (lambda m: torch.special.gammainc(torch.ones(2), m(ROWS).exp()).sum(1), "igamma"),
    ],
)
def test_what_cannot_be_differentiated_twice_is_one_line(loss, operation):
    with pytest.raises(UnsupportedOperation, match=f"^the loss function uses {operation}, which has no second[^\n]*$"):
        SecondOrder()(nn.Linear(3, 2), loss)


def with_data(h):
    h.data = 2 * h.data
    return h


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        return 2 * args[0]

    @staticmethod
    def backward(ctx, *grad_outputs):
        return 2 * grad_outputs[0]


class Squared(torch.autograd.Function):
    """Nested in itself, forward mode takes the saved x for a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, *tangents):
        (x,) = ctx.saved_tensors
        return 2 * x * tangents[0]


def slopes(model):
    x = ROWS.clone().requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]


def test_newton_step_in_the_whole_space():
    """With K = n, lr = 1 a step lands on the minimum of a convex quadratic, whatever the directions."""
    model = nn.ParameterDict({"x": torch.randn(5, generator=torch.Generator().manual_seed(0)).double()})
    matrix = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double()
    target = torch.arange(5.0).double()
    estimate = SecondOrder(num_tangents=5, damping=1e-12)(
        model, lambda m: (matrix @ (m["x"] - target)).square().sum(), generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(model["x"] - estimate.grads["x"], target)


def test_negative_curvature_is_walked_away_from():
    model = nn.ParameterDict({"x": torch.tensor([1.0, 0.1], dtype=torch.float64)})
    estimate = SecondOrder(num_tangents=2)(model, lambda m: m["x"][0] ** 2 - m["x"][1] ** 2)
    torch.testing.assert_close(model["x"] - estimate.grads["x"], torch.tensor([0.0, 0.2], dtype=torch.float64))


@pytest.mark.parametrize("law", [Normal(), Rademacher()], ids=repr)
def test_bias_a_step_stays_in_the_plane_and_solves_it(law):
    """V^T (H g - grad f) = 0: the step is Newton's in the plane, not the gradient."""
    task = Rosenbrock(dim=6, start=[1.1, 1.2, 1.3, 1.2, 1.1, 1.0])
    model = Points(task).double()
    generator = torch.Generator().manual_seed(0)
    estimate = SecondOrder(law, 2, damping=1e-12)(model, lambda m: task.losses(m, None), generator=generator)
    seeds = draw_seeds(torch.Generator().manual_seed(0), 2)
    v = dense(law.sample(dict(model.named_parameters()), seeds)["points"]).flatten(1).T
    hessian = torch.autograd.functional.hessian(lambda x: task.value(x).sum(), model().detach()).view(6, 6)
    plane = v.T @ hessian @ v
    assert torch.linalg.eigvalsh(plane).min() > 0
    g = estimate.grads["points"].flatten()
    gradient = torch.autograd.functional.jacobian(lambda x: task.value(x).sum(), model().detach()).flatten()
    torch.testing.assert_close(v.T @ hessian @ g, v.T @ gradient)
    torch.testing.assert_close(v @ torch.linalg.lstsq(v, g[:, None]).solution.squeeze(1), g)


def test_directions_given_twice_change_nothing():
    """Only their span matters; a basis goes round once for K = n and twice for K = 2 n."""
    case = CASES[0]
    n = flat(exact_grads(case)).numel()
    once, twice = (estimated_grads(SecondOrder(Basis(), num), case) for num in (n, 2 * n))
    properties.assert_is(twice, once, rounding=1e-9)  # times the condition of |H|, 1e3


def test_length_of_the_directions_does_not_matter():
    class Long(Normal):
        def fill(self, rows, size, generator):
            super().fill(rows, size, generator)
            rows.mul_(100)

    case = CASES[0]
    steps = [
        flat(SecondOrder(law, 3)(case.build(), case.loss, generator=torch.Generator().manual_seed(0)).grads)
        for law in (Normal(), Long())
    ]
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tangents": 0}, "num_tangents must be an integer of at least 1, got 0"),
        ({"damping": 0.0}, "damping must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SecondOrder(**arguments)


@pytest.mark.parametrize("estimator", [SecondOrder(num_tangents=2), GaussNewton(num_tangents=2)], ids=["newton", "gn"])
def test_a_loss_without_second_derivatives(estimator):
    targets, lengths = torch.tensor([[1, 2], [2, 3]]), torch.tensor([6, 6])

    def loss(m):
        return nn.functional.ctc_loss(m(torch.ones(6, 2, 4)).log_softmax(-1), targets, lengths, lengths - 4)

    with pytest.raises(UnsupportedOperation, match=r"ctc_loss, which has no second derivative in .* ForwardGradient$"):
        estimator(nn.Linear(4, 5), loss)


def test_slopes_drawn_at_random_are_those_of_a_leaky_relu():
    """With both bounds equal nothing is random."""
    case = Case(
        "rrelu",
        lambda: nn.Sequential(nn.Linear(6, 6), nn.RReLU(0.2, 0.2), nn.Tanh()),
        lambda m: m(SEQUENCE).square().sum((1, 2)),
    )
    tangents, v = sampled(case.build(), 2)
    with torch.no_grad():
        _, found, _ = curvature_in_span(case.build(), case.loss, tangents)
    torch.testing.assert_close(found, v.T @ flat(exact_grads(case)))


def test_a_singular_function_whose_argument_moves_gives_no_number():
    model = nn.ParameterDict({"x": torch.zeros(1)})
    with torch.no_grad():
        _, slopes, curvature = curvature_in_span(model, lambda m: m["x"].sqrt(), {"x": torch.ones(1, 1)})
    assert not slopes.isfinite().any()
    assert not curvature.isfinite().any()


def test_a_loss_of_nan_gives_steps_of_nan():
    estimate = SecondOrder()(nn.Linear(3, 2), lambda m: m(ROWS).sum() * torch.nan)
    assert all(g.isnan().all() for g in estimate.grads.values())

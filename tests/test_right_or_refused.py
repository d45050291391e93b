"""A derivative is right or refused: cases that once gave a wrong one, or failed although one exists."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fgtrain import FDFA, ActivityPerturbation, Backprop, ForwardGradient, LowRank, Normal, directional_derivatives
from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.forward_ad import jvp, native
from fgtrain.forward_ad.dual import Dual
from fgtrain.network.parameters import slots_of
from fgtrain.tangents.directions import dense
from tests.cases import Case
from tests.coverage_layers import probe
from tests.derivatives import assert_derivatives, reference
from tests.properties import flat

ROWS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MASK = torch.tensor([True, False, True, True])
IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
VOLUMES = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EDGES = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])
ADJACENCY = torch.zeros(5, 5, dtype=torch.float64).index_put((EDGES[0], EDGES[1]), torch.arange(1.0, 7.0).double())
PLACES = torch.tensor([0, 0, 2, 2, 2, 1, 0, 1])


def linear(name, out):
    """`out` of a linear layer's output h, (5, 4)."""
    return Case(name, lambda: nn.Linear(4, 4), lambda m: probe(out(m(ROWS))))


def conv(name, out):
    """`out` of a convolution's output, (2, 3, 4, 4)."""
    return Case(name, lambda: nn.Conv2d(3, 3, 1), lambda m: probe(out(m(IMAGES))))


def with_parameter(name, shape, out):
    def build():
        return nn.ParameterDict({"p": torch.randn(shape, generator=torch.Generator().manual_seed(1))})

    return Case(name, build, lambda m: probe(out(m["p"])))


class Expanded(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.r = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, x):
        mu, total = torch.broadcast_tensors(self.l(x).exp(), self.r.exp())
        return (mu + total).log() - total.lgamma()


def scattered(h, reduce, **options):
    return torch.scatter_reduce(h[:3].cos(), 0, EDGES[0][:5, None].expand(5, 4) % 3, h, reduce, **options)


def written(h, write):
    """`write` puts h into a plain tensor."""
    out = torch.zeros(6, 4, dtype=h.dtype)
    write(out)
    return out[:5] + h


CONSTANTS = [
    linear("mask.type_as(h)", lambda h: h * MASK.type_as(h)),
    linear("mask.to(h)", lambda h: h * MASK.to(h)),
    linear("one_hot.to(h)", lambda h: h * F.one_hot(torch.arange(5) % 4).to(h)),
    linear("cat with integers", lambda h: torch.cat([h, torch.ones(5, 2, dtype=torch.int64)], 1)),
    linear("stack with an integer", lambda h: torch.stack([h.sum(), torch.tensor(3)])),
    linear("hstack by name", lambda h: torch.hstack(tensors=[h, MASK.expand(5, 4)])),
    linear(
        "complex constants",
        lambda h: torch.view_as_real(torch.cat([torch.complex(h, h), torch.eye(4).to(torch.complex64)])),
    ),
    linear("integers shaped as h", lambda h: h * torch.arange(20).view_as(h)),
    linear("where as a method", lambda h: h.where(h > 0, torch.ones(())) + h.where(MASK, 2 * h)),
    linear("rmatmul", lambda h: h.__rmatmul__(torch.ones(2, 5, dtype=h.dtype))),
    linear("roll of a number", lambda h: torch.roll(h.sum(), 1).expand(5)),
]

ATTENTION = [
    with_parameter(
        f"attention, {name} all over a row",
        (3, 4),
        lambda p, mask=mask: F.scaled_dot_product_attention(p[None], p[None], p[None], attn_mask=mask)[0],
    )
    for name, mask in {
        "masked": torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]]).bool(),
        "-inf": torch.tensor([[0, 1.0, 0], [-torch.inf] * 3, [0, 0, -torch.inf]]).double(),
    }.items()
]

OPERATIONS = [
    *(linear(f"scatter_reduce {reduce}", lambda h, r=reduce: scattered(h, r)) for reduce in ("prod", "amax", "mean")),
    linear("scatter_reduce without the old", lambda h: scattered(h, "amin", include_self=False)),
    linear("products with factors 0", lambda h: scattered(h.where(h < h.mean(), 0 * h), "prod")),
    linear("index_reduce", lambda h: torch.index_reduce(h[:3], 0, EDGES[1][:5] % 3, h, "prod")),
    linear("sparse @ h", lambda h: ADJACENCY.to_sparse() @ h),
    linear("CSR @ h", lambda h: ADJACENCY.to_sparse_csr() @ h),
    linear("sparse.mm", lambda h: torch.sparse.mm(ADJACENCY.to_sparse(), h)),
    linear("cdist", lambda h: torch.cdist(h, h.flip(0) + 1)),
    linear("cdist with itself", lambda h: torch.cdist(h, h)),
    linear("pdist", lambda h: F.pdist(h, p=1.5)),
    linear("cholesky_inverse", lambda h: torch.cholesky_inverse((h.T @ h + 9 * torch.eye(4)).double().tril())),
    linear("multi margin", lambda h: F.multi_margin_loss(h, torch.arange(5) % 4, reduction="none", p=2)),
    linear(
        "multilabel margin",
        lambda h: F.multilabel_margin_loss(h, torch.tensor([[3, 0, -1, 1]] * 5), reduction="none"),
    ),
    linear("Gamma's samples", lambda h: torch.distributions.Gamma(h.exp() + 1, h.exp()).rsample()),
    with_parameter(
        "embedding bag",
        (4, 3),
        lambda p: F.embedding_bag(PLACES % 4, p, torch.tensor([0, 3, 3]), mode="mean", padding_idx=2),
    ),
    with_parameter("embedding bag, max", (4, 3), lambda p: F.embedding_bag(PLACES[:6].view(2, 3), p, mode="max")),
    with_parameter(
        "weighted embedding bag",
        (8, 3),
        lambda p: F.embedding_bag(PLACES.view(2, 4), p, mode="sum", per_sample_weights=p[:, 0].view(2, 4)),
    ),
    *(
        conv(f"grid sample {mode} {padding}", lambda h, m=mode, p=padding: moved_by_itself(h, mode=m, padding_mode=p))
        for mode in ("bilinear", "bicubic", "nearest")
        for padding in ("zeros", "border", "reflection")
    ),
    with_parameter(
        "embedding by frequency",
        (4, 3),
        lambda p: F.embedding(PLACES.view(2, 4), p, padding_idx=1, scale_grad_by_freq=True),
    ),
    *(
        with_parameter(
            "embedding bag by frequency",
            (4, 3),
            lambda p: F.embedding_bag(PLACES.view(2, 4), p, scale_grad_by_freq=True),
        )
        for _ in range(torch.__version__ >= "2.14")  # before, the backward pass divides by other frequencies
    ),
    linear("_foreach_norm", lambda h: torch.stack(torch._foreach_norm(list(h)))),
    linear("weights made inside", lambda h: h * nn.init.kaiming_uniform_(torch.empty(5, 4, dtype=h.dtype))),
    conv("grid sample of the image", lambda h: F.grid_sample(h, h.detach()[:, :2].movedim(1, 3), align_corners=True)),
]


def moved_by_itself(h, **options):
    grid = torch.cat([1.4 * h[:, :2], h.flip(0)[:, :2]], 1).unflatten(1, (2, 2)).flatten(0, 1)[:2]
    return F.grid_sample(h, grid.movedim(1, 3), align_corners=False, **options)


class Packed(nn.Module):
    def __init__(self, layer, **options):
        super().__init__()
        self.rnn = layer(4, 3, num_layers=2, bidirectional=True, **options)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 5, 1]), enforce_sorted=False)
        out, state = self.rnn(packed)
        out, _ = nn.utils.rnn.pad_packed_sequence(out)
        state = state[0] if isinstance(state, tuple) else state
        return torch.cat([out.movedim(1, 0).flatten(1), state[..., :3].movedim(1, 0).flatten(1)], 1)


PACKED = [
    Case(
        f"packed {layer.__name__} {options}",
        lambda layer=layer, options=options: Packed(layer, **options),
        lambda m: probe(m(torch.linspace(-1, 1, 60, dtype=torch.float64).view(5, 3, 4).sin())),
    )
    for layer, options in [(nn.LSTM, {}), (nn.GRU, {}), (nn.RNN, {"bias": False}), (nn.LSTM, {"proj_size": 2})]
]

MATRIX = torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4)
BY_NAME = [
    linear("sum by name", lambda h: torch.add(input=h, other=h.cos(), alpha=2)),
    linear("matmul by name", lambda h: torch.matmul(h, other=MATRIX)),
    linear("mm by name", lambda h: torch.mm(input=h, mat2=MATRIX)),
    linear("addmm by name", lambda h: torch.addmm(input=h, mat1=h, mat2=MATRIX)),
    linear("linear by name", lambda h: F.linear(input=h, weight=MATRIX)),
    linear("where by name", lambda h: torch.where(condition=h > 0, input=h, other=h.cos())),
    linear("log_softmax by name", lambda h: torch.log_softmax(input=h, dim=1)),
    conv("convolution by name", lambda h: F.conv2d(input=h, weight=torch.ones(2, 3, 2, 2, dtype=h.dtype))),
    conv("pooling by name", lambda h: F.avg_pool2d(input=h, kernel_size=2)),
]

LAYOUTS = [  # what one direction can be asked and several could not
    conv("channels last", lambda h: h.to(memory_format=torch.channels_last) * 2),
    linear("narrow from a tensor", lambda h: torch.narrow(h, 0, torch.tensor(1), 2)),
    linear("split at a tensor", lambda h: torch.tensor_split(h, torch.tensor([1, 3]))[1]),
    linear("unsqueeze_", lambda h: (2 * h).unsqueeze_(0)),
    linear("t_", lambda h: (2 * h).t_()),
    linear("_foreach_mul_", lambda h: (lambda copy: (torch._foreach_mul_([copy], 3.0), copy)[1])(2 * h)),
    linear("squeeze_", lambda h: (2 * h)[None].squeeze_(0)),
    linear("fill_ by name", lambda h: (2 * h).fill_(value=3.0) + h),
    Case(
        "dropout3d in place",
        lambda: nn.Conv3d(3, 3, 1),
        lambda m: probe(F.dropout3d(2 * m(VOLUMES), 0.5, training=True, inplace=True)),
    ),
]

WRITES = [
    linear("index_add_ to a plain tensor", lambda h: written(h, lambda out: out.index_add_(0, EDGES[1][:5], h))),
    linear(
        "scatter_add_ to a plain tensor",
        lambda h: written(h, lambda out: out.scatter_add_(0, EDGES[1][:5, None].expand(5, 4), h)),
    ),
    linear("index_put_ to a plain tensor", lambda h: written(h, lambda out: out.index_put_((EDGES[1][:5],), h))),
    linear("x[i] = h of a plain tensor", lambda h: written(h, lambda out: out.__setitem__(slice(1, 6), h))),
    linear("a sum that begins with 0", lambda h: started_at_0(h)),
    linear("rows written one by one", lambda h: written(h, lambda out: [out[i].copy_(h[i]) for i in range(5)])),
    linear("a view made before", lambda h: (lambda out, row: (out.add_(h), row * h[0])[1])(*with_row(h))),
    linear("a mask of a plain tensor", lambda h: written(h, lambda out: out[:5].__setitem__(h > 0, h[h > 0]))),
    linear("scatter_reduce_ to a plain tensor", lambda h: beginning_with(h, 0.0).scatter_reduce_(0, AT, h, "amax")),
    linear(
        "what is detached is a constant",
        lambda h: (lambda out: h * out[1:].detach()[2] * out.detach().exp())(sum_of(h)),
    ),
    linear("what is made under no_grad is a constant", lambda h: h * constant_view(sum_of(h))),
    linear("a change without a graph", lambda h: changed_without_graph(sum_of(h))),
    linear("fill_diagonal_", lambda h: (2 * h).fill_diagonal_(3.0) + h),
    linear("rows as long as there are directions", lambda h: rows_of_three(2 * h, h[0])),
    *(
        linear(f"scatter_reduce_ {reduce}", lambda h, r=reduce: (2 * h[:3]).scatter_reduce_(0, AT, h, r))
        for reduce in ("prod", "mean", "amax")
    ),
    linear("index_reduce_", lambda h: (2 * h[:3]).index_reduce_(0, AT[:, 0], h, "prod")),
    linear("integers written", lambda h: h * torch.zeros(5, 4, dtype=torch.int64).copy_(3 * h)),
]


def rows_of_three(out, row):
    out[:2, :3].fill_(row[0])
    out[2:, 1:].copy_(row[1:])
    return out


def with_row(h):
    out = torch.zeros(5, 4, dtype=h.dtype)
    return out, out[2]


def sum_of(h):
    return torch.zeros(5, 4, dtype=h.dtype).index_add_(0, EDGES[1][:5] % 4, h)


def constant_view(out):
    with torch.no_grad():
        return out[1:].view(4, 4)[1]


def changed_without_graph(out):
    with torch.no_grad():
        out.mul_(2)
    return out.sin()


def started_at_0(h):
    total = torch.zeros(5, dtype=h.dtype)
    for column in h.unbind(1):
        total += column.square()
    return total


def doubled_in(view):
    """A view of h is doubled; the other views of h change with it."""

    def out(h):
        first = h[1:]
        view(h)[:2].mul_(2)
        return torch.cat([h, first])

    return out


VIEWS = [
    linear("a view of complex numbers", doubled_in(lambda h: torch.view_as_complex(h.view(5, 2, 2)))),
    linear("a view of the adjoint", doubled_in(lambda h: h.adjoint())),
    linear("a view of the property mH", doubled_in(lambda h: h.mH)),
    linear("a view of an operation without a rule", doubled_in(torch.atleast_3d)),
]

EXTREMES = [
    linear("a maximum that begins with -inf", lambda h: beginning_with(h, -torch.inf).scatter_reduce(0, AT, h, "amax")),
    linear("a minimum that begins with inf", lambda h: beginning_with(h, torch.inf).scatter_reduce(0, AT, h, "amin")),
    linear("a maximum of masked rows", lambda h: beginning_with(h, 0.0).scatter_reduce(0, AT, masked_row(h), "amax")),
    linear(
        "a mean without nan",
        lambda h: beginning_with(h, torch.nan).scatter_reduce(0, AT, h, "mean", include_self=False),
    ),
    linear("logsumexp of a masked row", lambda h: masked_row(h).logsumexp(1).exp()),
    linear("logsumexp of a masked row, dimensions kept", lambda h: masked_row(h).logsumexp((0, 1), keepdim=True)),
    linear("special.logsumexp", lambda h: torch.special.logsumexp(masked_row(h), 1).exp()),
    linear("logcumsumexp of a masked row", lambda h: masked_row(h).logcumsumexp(1).exp()),
    linear("logaddexp of -inf", lambda h: torch.logaddexp(masked_row(h), masked_row(h[0])).exp()),
    linear("a quotient of zeros without nan", lambda h: (h.relu() / h.relu()).nan_to_num(0)),
    linear("a quotient of zeros without nan, in place", lambda h: (h.relu() / h.relu()).nan_to_num_(posinf=1.0)),
    linear("attention of a masked row without nan", lambda h: masked_row(h).softmax(1).nan_to_num() @ h.T),
    linear("sqrt of relu", lambda h: h.relu().sqrt()),
    linear("a power of a clamped number", lambda h: h.clamp(min=0) ** 0.5),
    linear("a power with a power that moves", lambda h: h.relu().pow(h.relu())),
    linear("a power whose exponent alone moves", lambda h: h.relu() ** h.sigmoid()),
    linear("sqrt_ of relu", lambda h: (h.relu() + 0).sqrt_()),
    linear("_foreach_sqrt of relu", lambda h: torch._foreach_sqrt([h.relu()])[0]),
    linear("acos of a cosine beyond 1", lambda h: (3 * h).clamp(-1, 1).acos()),
    linear("a clamped logarithm", lambda h: (3 * h).clamp(0, 1).log().clamp(min=-100)),
    linear("lp_pool of zeros", lambda h: F.lp_pool1d(0 * h, 2.0, 2)),
    linear("lp_pool of nothing", lambda h: F.lp_pool1d(h.relu() * (h[0] > 0), 2.0, 2)),
    linear("atan2 at the origin", lambda h: torch.atan2(h.relu(), h.relu())),
    linear("hypot at the origin", lambda h: torch.hypot(h.relu(), h.relu())),
    linear("xlogy of zeros", lambda h: torch.xlogy(h.relu(), h.relu())),
    linear("entropy of zeros", lambda h: torch.special.entr(h.relu())),
    linear("logaddexp2 of -inf", lambda h: torch.logaddexp2(masked_row(h), masked_row(h[0])).exp2()),
    linear("divergence from zeros", lambda h: F.kl_div(h.log_softmax(1), h.relu(), reduction="none")),
    linear("divergence of logarithms", lambda h: F.kl_div(h, h.log_softmax(1), reduction="none", log_target=True)),
    linear(
        "cross-entropy of saturated probabilities",
        lambda h: F.binary_cross_entropy((60 * h).sigmoid(), ROWS.sigmoid().round(), reduction="none"),
    ),
    linear(
        "weighted cross-entropy of probabilities of 0 and 1",
        lambda h: F.binary_cross_entropy(
            (h > 0) + 1e-13 * (h - h.detach()), ROWS.sigmoid(), MASK + 1.0, reduction="none"
        ),
    ),
]


def slope_of(h, func, **options):
    """The slope of `func`, as the loss itself computes it."""
    x = ROWS.clone().requires_grad_()
    out = func(x * h)
    (slope,) = torch.autograd.grad(out.sum(), x, retain_graph=True, **options)
    return out + slope.square()


def attacked(h):
    x = ROWS.clone().requires_grad_()
    F.silu(x * h).sum().backward(inputs=[x])
    assert x.grad is not None
    return h * (x + x.grad)


SLOPES = [
    linear("slope that is a constant", lambda h: slope_of(h, torch.tanh)),
    linear("slope of silu that is a constant", lambda h: slope_of(h, F.silu)),
    linear("slope of silu", lambda h: slope_of(h, F.silu, create_graph=True)),
    linear("slope of an angle", lambda h: slope_of(h, lambda y: torch.atan2(y, h.exp()), create_graph=True)),
    linear("slope of a power", lambda h: slope_of(h, lambda y: y.exp().pow(h), create_graph=True)),
    linear("attack", attacked),
]
AT = torch.tensor([0, 1, 1, 2, 2])[:, None].expand(5, 4)


def beginning_with(h, value):
    return torch.full((3, 4), value, dtype=h.dtype)


def masked_row(h):
    """h with -inf in the third row and the second column."""
    return (
        h.index_fill(-1, torch.tensor([1]), -torch.inf)
        if h.dim() == 1
        else h.index_fill(0, torch.tensor([2]), -torch.inf)
    )


def assigned(h, name, value):
    setattr(h, name, value)
    return h


PROPERTIES = [
    linear("h.data = ...", lambda h: assigned(h, "data", 2 * h.data)),
    linear("h.data = ... after a view", lambda h: h[:, :2] + assigned(h, "data", h.data.exp())[:, 2:]),
    linear(
        "z.real = ...",
        lambda h: torch.view_as_real(
            (lambda z: assigned(z, "real", 2 * z.real + z.imag))(torch.view_as_complex(h.view(5, 2, 2).clone()))
        ),
    ),
]
NOTHING = [
    Case(
        "a parameter without elements",
        lambda: nn.ParameterDict({"p": torch.ones(3), "none": torch.empty(0, 2), "nothing": torch.empty(2, 0)}),
        lambda m: m["p"].square().sum() + m["none"].sum() + m["nothing"].exp().sum(),
    )
]


BETA = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:index_reduce.. is in beta")


@pytest.mark.parametrize(
    "case",
    [
        *CONSTANTS,
        *ATTENTION,
        *OPERATIONS,
        *PACKED,
        *LAYOUTS,
        *WRITES,
        *VIEWS,
        *BY_NAME,
        *EXTREMES,
        *SLOPES,
        *PROPERTIES,
        *NOTHING,
        Case("expanded", Expanded, lambda m: m(ROWS).sum(1)),
    ],
    ids=lambda case: case.name,
)
@BETA
@pytest.mark.parametrize(
    "derivatives_of",
    [directional_derivatives, pytest.param(reference, marks=pytest.mark.slow)],
    ids=["first", "reference"],
)
def test_derivative(case, derivatives_of):
    assert_derivatives(case, [(Normal(), 1), (Normal(), 3), (LowRank(1), 3)], derivatives_of)


@BETA
@pytest.mark.parametrize(
    "case",
    [*CONSTANTS, *ATTENTION, *OPERATIONS, *PACKED, *WRITES, *VIEWS[:-1], *BY_NAME, *EXTREMES],
    ids=lambda case: case.name,
)
def test_the_fast_engine_takes_it(case, caplog):
    assert_derivatives(case, [(LowRank(1), 3)])
    assert not caplog.text


# --- a derivative that is lost is refused ---------------------------------------------------------------------------


@torch.library.custom_op("fgtrain_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


doubled.register_autograd(lambda ctx, grad: torch.from_numpy(2 * grad.detach().numpy()))  # differentiable only once


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("derivatives_of", [jvp, native.jvp], ids=["first", "reference"])
def test_an_operation_that_loses_its_derivative_is_named(derivatives_of, num_tangents):
    model = nn.Linear(4, 4).double()
    tangents = Normal().sample(dict(model.named_parameters()), range(num_tangents))
    with pytest.raises(UnsupportedOperation, match=r"uses \S*doubled\S*, which has no forward-mode derivative"):
        derivatives_of(model, lambda m: (lambda h: (doubled(h) + h).sum(1))(m(ROWS)), tangents)


def test_what_is_refused_says_what_to_use_instead():
    segment_reduce = vars(torch)["segment_reduce"]  # which torch's stubs leave out
    lengths = torch.tensor([[1, 3], [2, 2], [4, 0], [0, 4], [3, 1]])
    case = linear("segments", lambda h: segment_reduce(h, "sum", lengths=lengths, axis=1))
    model = case.build()
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    with pytest.raises(UnsupportedOperation, match=r"segment_reduce, .*; use torch.index_add, .*, or train with"):
        jvp(model, case.loss, tangents)


def test_what_is_a_constant_to_backpropagation_is_one_here():
    case = linear("rounded", lambda h: h * (h.round() + h.sign() + h.floor() + h.detach()))
    assert_derivatives(case, [(Normal(), 1), (Normal(), 3)])
    assert_derivatives(case, [(Normal(), 3)], reference)


# --- tensors made of parameters outside of the pass -----------------------------------------------------------------


@pytest.mark.parametrize("derivatives_of", [jvp, native.jvp], ids=["first", "reference"])
@pytest.mark.parametrize("with_model", [True, False], ids=["and the model", "alone"])
def test_a_tensor_that_was_made_of_parameters_before_is_refused(derivatives_of, with_model):
    model = nn.Linear(4, 3).double()
    doubled_weight = model.weight * 2
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    with pytest.raises(UnsupportedOperation, match="was computed from the model's parameters before this pass"):
        derivatives_of(
            model,
            lambda m: ((m(ROWS) if with_model else 0) + F.linear(ROWS, doubled_weight)).pow(2).mean(),
            tangents,
        )


@pytest.mark.parametrize("derivatives_of", [directional_derivatives, reference], ids=["first", "reference"])
def test_a_parameter_that_the_loss_holds_itself_moves(derivatives_of):
    model = nn.Linear(4, 3).double()
    weight = model.weight
    tangents = Normal().sample(dict(model.named_parameters()), [0, 1])

    def loss(m):
        return (m(ROWS) + F.linear(ROWS, weight)).pow(2).sum(1) + weight.norm()

    grads = torch.autograd.grad(loss(model).mean(), list(model.parameters()))
    expected = sum(
        (dense(tangents[n]) * g).flatten(1).sum(1) for (n, _), g in zip(model.named_parameters(), grads, strict=True)
    )
    torch.testing.assert_close(derivatives_of(model, loss, tangents)[1], expected)


def test_tensors_that_wait_for_another_gradient_are_constants():
    other, model = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    plain = Case("plain", lambda: copy.deepcopy(model), lambda m: (m(ROWS) * other(ROWS).detach()).sum(1))
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    found = directional_derivatives(model, lambda m: (m(ROWS) * other(ROWS)).sum(1), tangents)
    torch.testing.assert_close(found, directional_derivatives(plain.build(), plain.loss, tangents))


class Caching(nn.Module):
    """In eval mode it computes a bias once; it also keeps what it computed last, in a list."""

    def __init__(self):
        super().__init__()
        self.l, self.table = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))
        self.cache, self.last, self.calls = {}, [None], 0

    def forward(self, x):
        self.calls += 1
        bias = self.table.exp()[0] if self.training else self.cache.get("bias")
        if bias is None:
            bias = self.cache["bias"] = self.table.exp()[0]
        self.last[0] = out = self.l(x) + bias
        return out


def kept_by(model):
    return [*model.cache.values(), *model.last]


@pytest.mark.parametrize("derivatives_of", [jvp, native.jvp], ids=["first", "reference"])
@pytest.mark.parametrize("num_tangents", [1, 3])
def test_a_model_keeps_no_dual(derivatives_of, num_tangents):
    model = Caching().double().eval()
    tangents = Normal().sample(dict(model.named_parameters()), range(num_tangents))
    losses, derivatives = derivatives_of(model, lambda m: m(ROWS).square().sum(1), tangents)
    again = Case("again", Caching, lambda m: m(ROWS).square().sum(1)).build()
    again.load_state_dict(model.state_dict())
    again.train()
    torch.testing.assert_close((losses, derivatives), native.jvp(again, lambda m: m(ROWS).square().sum(1), tangents))
    assert model.calls == 1
    assert {type(x) for x in kept_by(model)} == {torch.Tensor}
    torch.testing.assert_close(model(ROWS).square().sum(1).detach(), losses)
    model.last[0] = None  # what a plain forward leaves cannot be copied
    torch.testing.assert_close(pickle.loads(pickle.dumps(copy.deepcopy(model)))(ROWS), model(ROWS))
    with pytest.raises(UnsupportedOperation, match="was computed from the model's parameters before this pass"):
        derivatives_of(model, lambda m: m(ROWS).square().sum(1), tangents)
    model.cache.clear()
    torch.testing.assert_close(derivatives_of(model, lambda m: m(ROWS).square().sum(1), tangents)[1], derivatives)


def test_what_a_loss_keeps_is_a_value_and_refused_in_the_next_pass():
    model, kept = nn.Linear(4, 4).double(), []
    tangents = Normal().sample(dict(model.named_parameters()), [0])

    def loss(m):
        kept.append(m(ROWS))
        return kept[0].sum(1)

    jvp(model, loss, tangents)
    assert isinstance(kept[0], Dual)
    torch.testing.assert_close(kept[0] @ model.weight.T, model(ROWS).detach() @ model.weight.T)
    assert type(copy.deepcopy(kept[0])) is torch.Tensor
    with pytest.raises(UnsupportedOperation, match="was computed from the model's parameters before this pass"):
        jvp(model, loss, tangents)


# --- the engine is chosen by what it meets --------------------------------------------------------------------------


class Sometimes(nn.Module):
    """Fails in the fast engine while `fails`."""

    def __init__(self, error=RuntimeError):
        super().__init__()
        self.l, self.fails, self.error, self.tried = nn.Linear(4, 4), True, error, []

    def forward(self, x):
        h = self.l(x)
        self.tried.append(type(h))
        if self.fails and isinstance(h, Dual):
            raise self.error("not here")
        return h


def test_a_failure_is_told_once_and_does_not_last(caplog):
    model, tangents = Sometimes().double(), None
    for step in range(12):
        tangents = Normal().sample(dict(model.named_parameters()), [step])
        model.fails = step < 3
        _, found = directional_derivatives(model, lambda m: m(ROWS).square().sum(1), tangents)
        grads = Backprop()(model, lambda m: m(ROWS).square().sum(1)).grads
        torch.testing.assert_close(found[0], flat(grads) @ flat({n: dense(t)[0] for n, t in tangents.items()}))
    assert caplog.text.count("slower reference engine: not here") == 1
    assert model.tried[-2] is Dual


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError, MemoryError, lambda m: RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_memory_that_is_not_there_is_not_asked_for_again(error):
    model = Sometimes(error).double()
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    with pytest.raises((RuntimeError, MemoryError)):
        jvp(model, lambda m: m(ROWS).square().sum(1), tangents)
    assert model.tried == [Dual]


def test_a_mistake_in_the_first_loss_costs_nothing_afterwards(caplog):
    model = Sometimes().double()
    model.fails = False
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    with pytest.raises(LossError):
        jvp(model, lambda m: m(ROWS), tangents)
    model.tried.clear()
    jvp(model, lambda m: m(ROWS).sum(1), tangents)
    assert model.tried == [Dual]


def test_a_loss_that_changes_when_it_is_repeated_is_refused():
    model, batch = nn.Linear(4, 4).double(), ROWS.clone()
    tangents = Normal().sample(dict(model.named_parameters()), [0, 1])
    with pytest.raises(UnsupportedOperation, match="the loss changes when its pass is repeated"):
        native.jvp(model, lambda m: m(batch.mul_(0.5)).square().sum(1), tangents)


@pytest.mark.parametrize("case", [*LAYOUTS, *WRITES], ids=lambda case: case.name)
def test_one_model_with_several_numbers_of_directions(case):
    model = case.build()
    params = dict(model.named_parameters())
    with torch.random.fork_rng():
        for num_tangents in (1, 3, 1, 2):
            tangents = Normal().sample(params, range(num_tangents))
            torch.manual_seed(3)
            grads = torch.autograd.grad(case.loss(model).mean(), list(params.values()))
            torch.manual_seed(3)
            found = directional_derivatives(model, case.loss, tangents)[1]
            expected = sum((dense(tangents[n]) * g).flatten(1).sum(1) for n, g in zip(params, grads, strict=True))
            torch.testing.assert_close(found, expected)


# --- settings and layers around the engine --------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_where_backend_flags_are_frozen(layer, monkeypatch):
    monkeypatch.setattr(torch.backends, "__allow_nonbracketed_mutation_flag", False)
    x = ROWS[None]
    case = Case("recurrent", lambda: layer(4, 3), lambda m: probe(m(x)[0]))
    assert_derivatives(case, [(Normal(), 3)])
    assert_derivatives(case, [(Normal(), 3)], reference)


class FedByABuffer(nn.Module):
    """A layer whose input is a buffer, as the relative positions of Swin are."""

    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.randn(4, 2))
        self.l, self.of_positions, self.norm = nn.Linear(4, 4), nn.Linear(2, 1), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.l(x) + self.of_positions(self.positions)[:, 0])


@pytest.mark.parametrize("memory", ["keep", "replay"])
def test_a_layer_may_be_fed_by_a_buffer(memory):
    model = FedByABuffer().double()
    ActivityPerturbation(num_tangents=2, memory=memory, examples="mixed")(model, lambda m: m(ROWS).square().sum(1))
    ActivityPerturbation(num_tangents=2, memory=memory)(model, lambda m: m(ROWS).square().sum(1))


@pytest.mark.parametrize("memory", ["keep", "replay"])
def test_activity_perturbation_follows_what_is_written(memory):
    case = linear("sum", started_at_0)
    exact = flat(Backprop()(case.build(), case.loss).grads)
    estimator = ActivityPerturbation(num_tangents=4, memory=memory)
    torch.testing.assert_close(flat(estimator(case.build(), case.loss).grads), exact)


class AroundTheHead(nn.Module):
    """What is made before the last layer, or of a parameter of its own, meets the last layer's output."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        h = self.a(x)
        return (h + self.b(h.tanh())) * self.scale


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize(
    "estimator",
    [
        lambda k: ActivityPerturbation(k, exact_head=True),
        lambda k: ForwardGradient(num_tangents=k, exact_head=True),
        lambda k: FDFA(k),
    ],
    ids=["activity", "forward gradient", "fdfa"],
)
def test_the_exact_gradient_of_the_last_layer_beside_other_paths(estimator, num_tangents):
    labels = torch.tensor([0, 1, 2, 1, 0])
    case = Case("around", AroundTheHead, lambda m: F.cross_entropy(m(ROWS), labels, reduction="none"))
    model = case.build()
    exact, found = Backprop()(model, case.loss).grads, estimator(num_tangents)(model, case.loss).grads
    for name in ("b.weight", "b.bias"):
        torch.testing.assert_close(found[name], exact[name])


def test_what_the_last_layer_writes_into_an_earlier_tensor_is_refused():
    class Written(AroundTheHead):
        def forward(self, x):
            h = self.a(x)
            h[:, :2].add_(self.b(h.tanh())[:, :2])
            return h

    estimator = ForwardGradient(exact_head=True)
    with pytest.raises(UnsupportedOperation, match=r"add_ writes what depends on a later layer.*the out-of-place form"):
        estimator(Written().double(), lambda m: m(ROWS).square().sum(1))


def test_slots_name_what_changed_its_name():
    model = nn.Linear(2, 2)
    before = slots_of(model)
    model._parameters["other"] = model._parameters.pop("weight")
    assert slots_of(model) is not before
    assert "other" in slots_of(model).params

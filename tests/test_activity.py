"""Activity perturbation against backprop in float64, with variances from closed forms."""

import math
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_weight

from fgtrain import FDFA, ActivityPerturbation, Backprop, ForwardGradient
from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.layer_noise.layers import run_perturbed
from fgtrain.layer_noise.noise import LayerNoise, PerturbedPass
from fgtrain.layer_noise.rows import ExaminedPass, Rows, rows_of_examples
from fgtrain.random import keyed_generator
from tests import properties
from tests.basis import Basis, complete_noise, noise_of, signs, sizes_of, walsh
from tests.cases import CASES, IMAGES, INPUTS, LABELS, Case
from tests.properties import estimated_grads, exact_grads, flat

MLP, SCALAR, CONV, MIXING, TIED, BARE, _ = CASES
OPTIONS = [
    {},
    {"num_tangents": 3},
    {"num_tangents": 3, "noise": "normal"},
    {"num_tangents": 3, "noise": "rademacher"},
    {"num_tangents": 2, "exact_head": True},
    {"num_tangents": 2, "memory": "replay"},
]
TOKENS = Case(
    "tokens, norms, embedding",
    lambda: nn.Sequential(
        nn.Embedding(3, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3)
    ),
    lambda m: F.cross_entropy(m(LABELS[:, None].expand(4, 2)), LABELS, reduction="none"),
)


def estimate_with_complete_noise(case, **options):
    """With a direction for every number of noise of the whole batch and of the parameters of other layers."""
    sizes = sizes_of(case)
    estimator = ActivityPerturbation(sum(sizes), "normal", tangents=Basis(sizes.noise), **options)
    with complete_noise(sizes):
        return estimated_grads(estimator, case)


@pytest.mark.parametrize(
    "options",
    [{}, {"exact_head": True}, {"memory": "replay"}, {"examples": "mixed"}, {"positions": "independent"}],
    ids=str,
)
@pytest.mark.parametrize("case", [MLP, CONV, TOKENS], ids=lambda case: case.name)
def test_complete_noise_gives_the_gradient(case, options):
    properties.assert_is(estimate_with_complete_noise(case, **options), exact_grads(case))


@pytest.mark.parametrize("memory", ["keep", "replay"])
@pytest.mark.parametrize("case", [SCALAR, MIXING], ids=lambda case: case.name)
def test_complete_noise_where_one_loss_sees_all_examples(case, memory):
    options = {"examples": "mixed", "memory": memory}
    properties.assert_is(estimate_with_complete_noise(case, **options), exact_grads(case))


SMALL_MLP = Case(
    "small mlp",
    lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)),
    lambda m: F.cross_entropy(m(INPUTS[:2]), LABELS[:2].clamp(max=1), reduction="none"),
)
SMALL_MAP = Case(
    "small map",
    lambda: nn.Sequential(nn.Conv2d(2, 2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)),
    lambda m: F.cross_entropy(m(IMAGES[:2]), LABELS[:2], reduction="none"),
)


@pytest.mark.parametrize("options", [{"memory": "keep"}, {"memory": "replay"}, {"exact_head": True}], ids=str)
@pytest.mark.parametrize("noise", ["balanced", "rademacher"])
@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("case", [SMALL_MLP, SMALL_MAP], ids=lambda case: case.name)
def test_the_mean_over_uncorrelated_signs_is_the_gradient(case, num_tangents, noise, options):
    """The signs are rows of a Hadamard matrix, in which the numbers of a direction are uncorrelated columns."""
    numbers = sizes_of(case).noise * (num_tangents if noise == "rademacher" else 1)
    rows = 2 ** (numbers - 1).bit_length()
    model, estimator, found = case.build(), ActivityPerturbation(num_tangents, noise, **options), []
    for row in range(rows):
        with signs(lambda first, count, row=row: walsh(row, first % numbers, count)):
            found.append(flat(estimator(model, case.loss).grads))
    torch.testing.assert_close(torch.stack(found).mean(0), flat(exact_grads(case)), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("noise", ["balanced", "rademacher", "normal"])
def test_noise_has_the_variance_1(noise):
    """Signs, those of a balanced direction sqrt(K) long; of normal numbers E u^4 = 3."""
    num, output = 4, torch.zeros(500, 6, dtype=torch.float64)
    drawn, pattern = PerturbedPass(num, seed=0, noise=noise).draw(output, -1)
    if noise == "normal":
        assert abs(drawn.square().mean() - 1) <= 5 * math.sqrt(2 / drawn.numel())
        assert abs(drawn.mean()) <= 5 / math.sqrt(drawn.numel())
        return
    assert torch.equal(drawn.abs(), torch.ones_like(drawn))
    assert abs(drawn.mean()) <= 5 / math.sqrt(drawn.numel())
    if pattern is not None:
        assert noise == "balanced"
        owners = torch.arange(6) % num
        assert torch.equal(pattern, torch.where(owners == torch.arange(num)[:, None], 2.0, 0.0).double())


def test_every_layer_and_every_seed_has_noise_of_its_own():
    """Of n products of unrelated signs the mean has the deviation 1 / sqrt(n)."""
    output = torch.zeros(100, 50, dtype=torch.float64)
    first = PerturbedPass(1, seed=0, noise="rademacher")
    drawn = [first.draw(output, -1)[0] for _ in range(2)] + [PerturbedPass(1, 1, "rademacher").draw(output, -1)[0]]
    for a, b in combinations(drawn, 2):
        assert abs((a * b).mean()) <= 5 / math.sqrt(output.numel())


def relative_variance(case, inputs, labels, noise, num_tangents):
    """Of the estimated gradients of a network with one ReLU: units it cuts off neither count nor disturb.

    With g_i the gradient in the N_i living units of example i, E ||estimate - g_i||^2 = c_i ||g_i||^2, and a layer's
    weight and bias gradient is the mean over examples of g_i (x_i, 1)^T.
    """
    model = case.build().requires_grad_(False)
    first = model[0](inputs)
    hidden = first.clamp(min=0)
    second = model[2](hidden)
    grad_second = second.softmax(1) - F.one_hot(labels, second.shape[1])
    grad_first = (grad_second @ model[2].weight) * (first > 0)
    layers = [(grad_first.square(), inputs, (first > 0).sum(1)), (grad_second.square(), hidden, second.shape[1])]
    excess = {"normal": 1, "rademacher": -1}[noise]
    # Error of unit j: (N - 1) / K parts of the others' squares and its own kurtosis, summed over layers per example.
    total = sum(square.sum(1) for square, *_ in layers)
    variance = 0.0
    for square, x, width in layers:
        error = width * total + excess * square.sum(1)  # sum over units j of (sum_l g_l^2 + excess g_j^2)
        variance += float((error / num_tangents * (x.square().sum(1) + 1)).sum()) / len(inputs) ** 2
    return variance / float(flat(exact_grads(case)).square().sum())


NODES = {
    "rademacher": ([-1.0, 1.0], [1 / 2, 1 / 2]),
    "normal": ([-math.sqrt(3), 0.0, math.sqrt(3)], [1 / 6, 2 / 3, 1 / 6]),  # has the moments of up to the fifth order
}


@pytest.mark.parametrize(
    ("noise", "examples", "num_tangents", "width"),
    [("rademacher", 1, 1, 3), ("rademacher", 2, 1, 2), ("rademacher", 1, 2, 2), ("normal", 1, 1, 3)],
)
def test_variance_is_the_closed_form(noise, examples, num_tangents, width):
    """Summed over every sign vector, or by a quadrature that is exact, as the error is of the fourth degree."""
    inputs, labels = INPUTS[2 : 2 + examples], LABELS[:examples].clamp(max=1)
    case = Case(
        "small",
        lambda: nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2)),
        lambda m: F.cross_entropy(m(inputs), labels, reduction="none"),
    )
    size = sizes_of(case).noise
    nodes, weights = (
        torch.tensor(list(product(values, repeat=num_tangents * size)), dtype=torch.float64) for values in NODES[noise]
    )
    model, estimator = case.build(), ActivityPerturbation(num_tangents, noise)
    g, mean, variance = flat(exact_grads(case)), 0.0, 0.0
    for numbers, weight in zip(nodes, weights.prod(1), strict=True):
        with noise_of(numbers.view(num_tangents, size)):
            estimate = flat(estimator(model, case.loss).grads)
        mean = mean + weight * estimate
        variance += float(weight * (estimate - g).square().sum() / g.square().sum())
    torch.testing.assert_close(mean, g, rtol=1e-10, atol=1e-13)
    assert variance == pytest.approx(relative_variance(case, inputs, labels, noise, num_tangents), rel=1e-10)


SEQUENCES = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class OfSequences(nn.Module):
    """A network of sequences (T, B, 6), or of (B, T, 6) with the examples first; `flat` merges both for the layers."""

    def __init__(self, dim, *, flat=False):
        super().__init__()
        self.dim, self.flat = dim, flat
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        hidden = x.flatten(0, 1) if self.flat else x
        hidden = self.second(torch.tanh(self.first(hidden)))
        return hidden.view(*x.shape[:2], -1).mean(1 - self.dim)


def towers(model):
    first, second = model(torch.cat([INPUTS, INPUTS + 0.1])).chunk(2)
    return (first - second).square().sum(1) + (first.sum(1) - 1) ** 2


@pytest.mark.parametrize(
    ("model", "steps", "rows"),
    [
        (lambda: OfSequences(1), 4, Rows(1)),
        (lambda: OfSequences(1), 3, Rows(1)),
        (lambda: OfSequences(0), 4, Rows(0)),
        (lambda: OfSequences(1, flat=True), 4, Rows(0, "interleaved")),
        (lambda: OfSequences(0, flat=True), 4, Rows(0, "blocks")),
        (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)), None, Rows(0, "interleaved")),
    ],
    ids=["T x B, T = B", "T x B", "B x T, T = B", "TB", "BT", "two towers"],
)
@pytest.mark.parametrize("memory", ["keep", "replay"])
def test_complete_noise_wherever_the_examples_are(model, steps, rows, memory):
    inputs = SEQUENCES[:steps]
    loss = (lambda m: F.cross_entropy(m(inputs), LABELS, reduction="none")) if steps else towers
    case = Case("rows", model, loss)
    built, perturbed = case.build(), PerturbedPass(1, seed=0)
    with torch.no_grad():
        weights = [name for name, _ in built.named_parameters() if name.endswith("weight")]
        examined = ExaminedPass(built, loss)
        losses, _ = run_perturbed(built, loss, {name: LayerNoise(name, perturbed) for name in weights})
        found = rows_of_examples(examined, perturbed.calls, losses)
    assert set(found.values()) == {rows}
    properties.assert_is(estimate_with_complete_noise(case, memory=memory), exact_grads(case))


def test_rows_that_are_nobodys_share_one_direction():
    """Four time steps of two examples each loss reaches all of: nothing tells whose the 8 rows are."""
    inputs = SEQUENCES[:2]

    def losses(m):
        first, second = m(inputs).square()
        return torch.stack([first.sum() * second.sum(), (first * second).sum()])

    case = Case("mixing", lambda: OfSequences(0, flat=True), losses)
    properties.assert_is(estimate_with_complete_noise(case), exact_grads(case))


@pytest.mark.parametrize("estimator", [ActivityPerturbation(exact_head=True), ForwardGradient(exact_head=True), FDFA()])
@pytest.mark.parametrize("behind", [nn.BatchNorm1d(3), nn.Identity()], ids=["BatchNorm", "contrastive"])
def test_exact_head_refuses_examples_mixed_behind_it(estimator, behind):
    def contrastive(m):
        z = F.normalize(m(INPUTS), dim=1)
        return F.cross_entropy(z @ z.T, torch.arange(4).roll(1), reduction="none")

    losses = contrastive if isinstance(behind, nn.Identity) else MLP.loss
    case = Case("mixing", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), behind), losses)
    with pytest.raises(UnsupportedOperation, match="examples are mixed after it"):
        estimated_grads(estimator, case)


def test_exact_head_refuses_a_last_layer_called_twice():
    case = Case("twice", lambda: nn.Linear(3, 3), lambda m: (m(INPUTS) - m(INPUTS + 1)).square().sum(1))
    with pytest.raises(
        UnsupportedOperation, match="the last layer, is called twice; train without it: exact_head=False"
    ):
        estimated_grads(ActivityPerturbation(exact_head=True), case)
    with pytest.raises(UnsupportedOperation, match="or ActivityPerturbation instead of FDFA"):
        estimated_grads(FDFA(), case)


@pytest.mark.parametrize("estimator", [ActivityPerturbation(exact_head=True), ForwardGradient(exact_head=True), FDFA()])
def test_exact_head_refuses_a_pass_without_the_last_layer(estimator):
    model, used = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).double(), 0
    losses = lambda m: m[used](INPUTS).square().sum(1)
    estimator(model, losses)
    used = 1
    with pytest.raises(UnsupportedOperation, match="0 was the last layer of the model's first pass"):
        estimator(model, losses)


@pytest.mark.parametrize("options", [{}, {"memory": "replay"}, {"exact_head": True}], ids=str)
def test_as_many_directions_as_units_give_the_gradient(options):
    """Each unit has a direction of its own: K = 4 + 3, the complete basis."""
    properties.assert_is(estimated_grads(ActivityPerturbation(7, **options), MLP), exact_grads(MLP))


def test_exact_head_is_exact_whatever_the_directions():
    for case, head in ((MLP, "2"), (CONV, "4")):
        estimate, exact = estimated_grads(ActivityPerturbation(1, exact_head=True), case), exact_grads(case)
        for name in (f"{head}.weight", f"{head}.bias"):
            torch.testing.assert_close(estimate[name], exact[name])


@pytest.mark.parametrize("positions", ["independent", "shared"])
@pytest.mark.parametrize("case", [MLP, CONV, MIXING, TOKENS], ids=lambda case: case.name)
def test_replayed_noise_gives_the_kept_estimate(case, positions):
    kept, replayed = (
        estimated_grads(ActivityPerturbation(3, memory=memory, positions=positions), case)
        for memory in ("keep", "replay")
    )
    torch.testing.assert_close(flat(kept), flat(replayed), rtol=1e-12, atol=1e-12)


def test_shared_positions_treat_the_layers_output_as_one_unit_per_channel():
    """Bias of the shared noise: every position gets the gradient summed over all of them."""
    conv = nn.Conv2d(2, 3, 3).double()
    case = Case("map", lambda: conv, lambda m: m(IMAGES).square().flatten(1).sum(1))
    output = conv(IMAGES).detach()
    shared = (2 * output).sum((2, 3), keepdim=True).expand_as(output) / len(IMAGES)
    expected = conv2d_weight(IMAGES, conv.weight.shape, shared)
    estimate = estimated_grads(ActivityPerturbation(3, positions="shared"), case)  # 3 directions, 3 channels: no noise
    torch.testing.assert_close(estimate["weight"], expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", [MLP, CONV, MIXING, TOKENS], ids=lambda case: case.name)
def test_leaves_no_trace(case, options):
    properties.assert_leaves_no_trace(ActivityPerturbation(**options), case)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_seed_same_estimate(options):
    properties.assert_same_seed_same_estimate(ActivityPerturbation(**options), CONV)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", [0, 1, "same", "valid"])
@pytest.mark.parametrize("kernel", [2, 3])
def test_gradient_of_padded_strided_and_grouped_convolutions(padding, kernel):
    stride = 1 if padding == "same" else 2
    conv = nn.Conv2d(2, 4, kernel, stride=stride, padding=padding, groups=2).double()
    case = Case("conv", lambda: conv, lambda m: m(IMAGES)[:, :, 1, 1].square().sum(1))
    properties.assert_is(estimate_with_complete_noise(case), exact_grads(case))


def test_weights_used_outside_their_layer_get_directions_of_their_own():
    class Reused(nn.Sequential):
        def forward(self, input):  # noqa: A002 - the name of nn.Sequential
            return super().forward(input) + input @ self[0].weight.T

    case = Case(
        "reused", lambda: Reused(nn.Linear(3, 3)), lambda m: F.cross_entropy(m(INPUTS), LABELS, reduction="none")
    )
    with pytest.raises(UnsupportedOperation, match="no trained Linear or convolution"):
        estimated_grads(ActivityPerturbation(), case)


@pytest.mark.parametrize("case", [TIED, BARE], ids=lambda case: case.name)
def test_a_model_without_layers_is_refused(case):
    with pytest.raises(UnsupportedOperation, match="no trained Linear or convolution"):
        estimated_grads(ActivityPerturbation(), case)


def test_a_penalty_in_the_loss_is_named():
    model = nn.Sequential(nn.Linear(3, 2))
    penalized = lambda m: m(torch.ones(4, 3)).square().mean() + m[0].weight.square().sum()
    with pytest.raises(UnsupportedOperation, match=r"0\.weight is also used outside its layer; .* use weight_decay"):
        ActivityPerturbation()(model, penalized)


@pytest.mark.parametrize("estimator", [ActivityPerturbation(), FDFA()], ids=str)
def test_a_penalty_that_begins_later_is_named(estimator):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    losses = lambda m: m(torch.ones(5, 3)).square().mean(1)
    estimator(model, losses)
    with pytest.raises(UnsupportedOperation, match=r"^2\.weight is used outside its layer, .* use weight_decay"):
        estimator(model, lambda m: losses(m) + m[2].weight.square().sum())


def test_inputs_changed_in_place_are_refused():
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            hidden = self.first(x)
            out = self.second(hidden)
            hidden += 1.0
            return out + hidden

    case = Case("changes", Changes, lambda m: F.cross_entropy(m(INPUTS), LABELS, reduction="none"))
    with pytest.raises(UnsupportedOperation, match="second is changed in place"):
        estimated_grads(ActivityPerturbation(), case)
    outside = Case(
        "outside",
        Changes,
        lambda m: F.cross_entropy(m.second(m.first(INPUTS)) + m.first(INPUTS) + 1, LABELS, reduction="none"),
    )
    properties.assert_is(estimate_with_complete_noise(case, memory="replay"), exact_grads(outside))


def test_exact_head_needs_losses_per_example():
    case = Case("scalar", lambda: nn.Linear(3, 3), lambda m: m(INPUTS).logsumexp(1).mean())
    with pytest.raises(LossError, match="one loss for each of the 4 rows"):
        estimated_grads(ActivityPerturbation(exact_head=True), case)


def test_a_scalar_loss_is_warned_of_once(caplog):
    model, estimator = MLP.build(), ActivityPerturbation()
    losses = MLP.loss
    for loss, warnings in ((losses, 0), (lambda m: losses(m).square().mean(), 1), (lambda m: losses(m).amax(), 1)):
        estimator(model, loss)
        assert [r.getMessage().split(":")[0] for r in caplog.records] == [
            "activity perturbation got one loss for 4 rows"
        ] * warnings


def test_frozen_layers_get_no_gradient():
    model = MLP.build()
    model[0].requires_grad_(False)
    estimate = ActivityPerturbation()(model, MLP.loss, generator=torch.Generator().manual_seed(0))
    assert sorted(estimate.grads) == ["2.bias", "2.weight"]


@pytest.mark.parametrize(
    "estimator",
    [lambda: ActivityPerturbation(7), FDFA, lambda: ForwardGradient(exact_head=True)],
    ids=["activity", "FDFA", "exact head"],
)
@pytest.mark.parametrize("layer", [0, 2])
def test_layers_frozen_and_unfrozen_in_mid_training(estimator, layer):
    """The estimate is that of a fresh estimator and model with the same layers frozen."""
    model, steps = MLP.build(), estimator()
    for frozen in (False, True, False):
        fresh, first = MLP.build(), estimator()
        for m in (model, fresh):
            m[layer].requires_grad_(not frozen)
        steps.load_state_dict(first.state_dict(), strict=False)
        found, expected = (
            e(m, MLP.loss, generator=keyed_generator(0)).grads for e, m in ((steps, model), (first, fresh))
        )
        assert sorted(found) == sorted(expected)
        if not isinstance(steps, FDFA):  # its feedback has learnt from more steps
            torch.testing.assert_close(flat(found), flat(expected))


@pytest.mark.parametrize("options", [{}, {"memory": "replay"}, {"exact_head": True}], ids=str)
def test_convolutions_under_autocast(options):
    """As many directions as units, 3 maps of one position and 3 outputs; half precision has 8 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 6), nn.Tanh(), nn.Flatten(), nn.Linear(3, 3))
    losses = lambda m: F.cross_entropy(m(IMAGES.float()), LABELS, reduction="none")
    exact = Backprop()(model, losses).grads
    with torch.autocast("cpu", torch.bfloat16):
        found = ActivityPerturbation(6, **options)(model, losses).grads
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert (flat(found) - flat(exact)).norm() <= 0.05 * flat(exact).norm()


@pytest.mark.parametrize(
    "estimator",
    [
        ActivityPerturbation(8),
        ActivityPerturbation(1, "normal", exact_head=True),
        ForwardGradient(exact_head=True),
        FDFA(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_layers_of_several_dtypes(estimator, dtypes):
    """Balanced, as many directions as units are the gradient; the others have an exact last layer."""
    first, second = dtypes
    model = MLP.build()
    exact = Backprop()(model, MLP.loss).grads
    model[0].to(first)
    model[2].to(second)

    def losses(m):
        hidden = torch.relu(m[0](INPUTS.to(first)))
        return F.cross_entropy(m[2](hidden.to(second)), LABELS, reduction="none")

    found = estimator(model, losses).grads
    assert {name: g.dtype for name, g in found.items()} == {name: p.dtype for name, p in model.named_parameters()}
    balanced = getattr(estimator, "noise", None) == "balanced"
    for name in exact if balanced else ("2.weight", "2.bias"):
        torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"num_tangents": 0}, {"noise": "x"}, {"positions": "x"}, {"examples": "x"}, {"memory": "x"}]
)
def test_arguments_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        ActivityPerturbation(**options)


@pytest.mark.parametrize("noise", ["rademacher", "normal", "balanced"])
def test_shrinkage_multiplies_by_its_formula(noise):
    """Sixteen examples, five units: s is the variance of one example over sqrt(16)."""
    torch.manual_seed(0)
    layer, inputs, num = nn.Linear(3, 5, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64), 2
    variance = {"rademacher": 4 / 2, "normal": 6 / 2, "balanced": 3 / 2}[noise]
    losses = lambda m: m(inputs).square().sum(1)
    plain, shrunk = (
        ActivityPerturbation(num, noise, shrinkage=on)(layer, losses, generator=keyed_generator(0)).grads
        for on in (False, True)
    )
    for name, g in plain.items():
        torch.testing.assert_close(shrunk[name], g / (1 + variance / 4))

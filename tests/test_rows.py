"""Losses of rows that a scalar loss, or the losses of sequences, are the mean of."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgtrain import FDFA, ActivityPerturbation, Backprop, ForwardGradient, GaussNewton
from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.forward_ad.row_losses import Evaluated, marks
from tests.cases import INPUTS, LABELS, Case
from tests.properties import assert_is, estimated_grads, exact_grads

TARGETS = INPUTS.sin()
WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
SOME = LABELS.clone()
SOME[1] = -100

SCALAR = {
    "cross-entropy": lambda z: F.cross_entropy(z, LABELS),
    "sum": lambda z: F.cross_entropy(z, LABELS, reduction="sum"),
    "class weights": lambda z: F.cross_entropy(z, LABELS, weight=WEIGHTS),
    "ignored": lambda z: F.cross_entropy(z, SOME),
    "smoothing and weights": lambda z: F.cross_entropy(z, LABELS, weight=WEIGHTS, label_smoothing=0.2),
    "soft targets": lambda z: F.cross_entropy(z, INPUTS.softmax(1)),
    "a temperature": lambda z: F.cross_entropy(z / 2, LABELS),
    "squared error": lambda z: F.mse_loss(z, TARGETS),
    "sum of squares": lambda z: F.mse_loss(z, TARGETS, reduction="sum"),
    "mean of losses": lambda z: F.cross_entropy(z, LABELS, reduction="none").mean(),
}
PLAIN = ["cross-entropy", "a temperature", "squared error", "mean of losses", "soft targets"]


def classifier():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def of_inputs(loss):
    return Case("classifier", classifier, lambda m: loss(m(INPUTS)))


@pytest.mark.parametrize("estimator", [ActivityPerturbation(2, exact_head=True), ForwardGradient(exact_head=True)])
@pytest.mark.parametrize("name", SCALAR)
def test_the_head_is_exact_under_a_scalar_loss(name, estimator):
    case = of_inputs(SCALAR[name])
    found, exact = estimated_grads(estimator, case), exact_grads(case)
    for key in ("2.weight", "2.bias"):
        torch.testing.assert_close(found[key], exact[key])


@pytest.mark.parametrize(
    "estimator", [ActivityPerturbation(2), ActivityPerturbation(2, exact_head=True), ActivityPerturbation(), FDFA()]
)
@pytest.mark.parametrize("name", PLAIN)
def test_a_scalar_loss_is_as_good_as_the_losses_of_its_examples(name, estimator, caplog):
    def losses(z):
        if name == "squared error":
            return F.mse_loss(z, TARGETS, reduction="none").mean(1)
        targets = INPUTS.softmax(1) if name == "soft targets" else LABELS
        return F.cross_entropy(z / 2 if name == "a temperature" else z, targets, reduction="none")

    assert_is(estimated_grads(estimator, of_inputs(SCALAR[name])), estimated_grads(estimator, of_inputs(losses)))
    assert not caplog.records


@pytest.mark.parametrize("estimator", [ActivityPerturbation(2), ActivityPerturbation(2, exact_head=True), FDFA()])
def test_a_loss_of_one_element_is_a_scalar(estimator, caplog):
    for loss in (lambda z: F.cross_entropy(z, LABELS).view(1), lambda z: F.mse_loss(z, TARGETS)[None]):
        scalar = lambda z, loss=loss: loss(z)[0]
        found, expected = (estimated_grads(copy.deepcopy(estimator), of_inputs(of)) for of in (loss, scalar))
        assert_is(found, expected)
    assert not caplog.records
    if not isinstance(estimator, FDFA) and not estimator.exact_head:
        estimated_grads(estimator, of_inputs(lambda z: z.logsumexp(1).mean().view(1)))
        assert "got one loss for 4 rows" in caplog.text


class Sequences(nn.Module):
    """A network of 4 sequences of 5 numbers, in which a number depends on those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 6)
        self.mixing = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.unsqueeze(-1)).tanh()
        h = h + self.mixing(h.cumsum(1)).tanh()
        return self.last(self.norm(h))


SERIES = torch.linspace(-2, 3, 20, dtype=torch.float64).sin().view(4, 5)
NEXT = (SERIES > 0).long() + (SERIES > 0.7).long()
PADDED = NEXT.clone()
PADDED[2, 3:] = -100


def per_token(z: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), NEXT.flatten(), reduction="none").view(4, 5)


RIGHT = {
    "mean of each sequence": lambda z: per_token(z).mean(1),
    "scalar": lambda z: F.cross_entropy(z.flatten(0, 1), NEXT.flatten()),
    "channels second": lambda z: F.cross_entropy(z.transpose(1, 2), NEXT, reduction="none").mean(1),
    "padding": lambda z: F.cross_entropy(z.flatten(0, 1), PADDED.flatten()),
    "regression": lambda z: F.mse_loss(z, SERIES.unsqueeze(-1).expand(4, 5, 3)),
    "temperature": lambda z: per_token(z / 3).mean(1),
}
OTHERS = {
    "a mask": lambda z: (per_token(z) * (NEXT > 0)).mean(1),
    "the last token": lambda z: per_token(z)[:, -1],
    "the best token": lambda z: per_token(z).amin(1),
    "a penalty": lambda z: per_token(z).mean(1) + z.square().mean((1, 2)),
    "by hand": lambda z: -z.log_softmax(-1).gather(-1, NEXT.unsqueeze(-1)).squeeze(-1).mean(1),
}
MIXED = {
    "times first": lambda z: F.cross_entropy(z.transpose(0, 1).flatten(0, 1), NEXT.T.flatten()),
    "positions mixed": lambda z: per_token(z.cumsum(1)).mean(1),
}


def of_series(loss):
    return Case("sequences", Sequences, lambda m: loss(m(SERIES)))


@pytest.mark.parametrize("estimator", [ActivityPerturbation(2, exact_head=True), ForwardGradient(exact_head=True)])
@pytest.mark.parametrize("name", RIGHT)
def test_the_head_is_exact_on_sequences(name, estimator):
    case = of_series(RIGHT[name])
    found, exact = estimated_grads(estimator, case), exact_grads(case)
    for key in ("last.weight", "last.bias"):
        torch.testing.assert_close(found[key], exact[key])


@pytest.mark.parametrize("name", OTHERS)
def test_losses_that_are_no_mean_of_rows_are_refused(name):
    with pytest.raises(LossError, match="one loss for each of the 20 rows of last, got losses of shape"):
        estimated_grads(ActivityPerturbation(exact_head=True), of_series(OTHERS[name]))


@pytest.mark.parametrize("name", MIXED)
def test_rows_elsewhere_than_in_the_output_are_refused(name):
    with pytest.raises(UnsupportedOperation, match="losses that each depend on one row of last"):
        estimated_grads(ActivityPerturbation(exact_head=True), of_series(MIXED[name]))


def test_fdfa_refuses_sequences():
    with pytest.raises(
        UnsupportedOperation, match=r"whose first dimension is the 20 examples, but first gives \(4, 5, 6\)"
    ):
        estimated_grads(FDFA(), of_series(RIGHT["scalar"]))


@pytest.mark.parametrize("estimator", [ActivityPerturbation(2, exact_head=True), ForwardGradient(exact_head=True)])
def test_the_head_is_exact_under_the_losses_of_tokens(estimator):
    case = of_series(lambda z: per_token(z).flatten())
    found, exact = estimated_grads(estimator, case), exact_grads(case)
    for key in ("last.weight", "last.bias"):
        torch.testing.assert_close(found[key], exact[key])


ORDER = torch.tensor([0, 3, 1, 2])


class Sorting(nn.Module):
    """A network whose middle layer gets the examples in another order, in which the first stays where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 3)
        self.sorted = nn.Linear(3, 3)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.sorted(self.first(x).tanh()[ORDER]).tanh()[ORDER.argsort()])


def test_a_layer_with_the_examples_in_another_order_has_the_derivative_of_the_mean():
    """With a direction for every unit, the layers whose rows are known have the exact gradient."""
    case = Case("sorting", Sorting, lambda m: m(SERIES[:, :1]).square().sum(1))
    found, exact = estimated_grads(ActivityPerturbation(8), case), exact_grads(case)
    mixed = estimated_grads(ActivityPerturbation(8, examples="mixed"), case)
    for name in exact:
        torch.testing.assert_close(found[name], (mixed if name.startswith("sorted") else exact)[name])


@pytest.mark.parametrize("order", [[0, *range(len(INPUTS) - 1, 0, -1)], [*range(1, len(INPUTS)), 0]])
def test_losses_in_another_order_are_seen(order):
    """Also if the loss of no example stays where it is."""
    losses = lambda z: z.square().sum(1)
    permuted = of_inputs(lambda z: losses(z)[torch.tensor(order)])
    mixed = estimated_grads(ActivityPerturbation(2, examples="mixed"), of_inputs(losses))
    assert_is(estimated_grads(ActivityPerturbation(2), permuted), mixed)
    for estimator in (ActivityPerturbation(exact_head=True), ForwardGradient(exact_head=True)):
        with pytest.raises(UnsupportedOperation, match="losses that each depend on one row of 2"):
            estimated_grads(estimator, permuted)


@pytest.mark.parametrize("estimator", [ActivityPerturbation(2, exact_head=True), FDFA(), GaussNewton()])
@pytest.mark.parametrize("weight", [None, WEIGHTS.float()], ids=["plain", "class weights"])
def test_a_scalar_loss_under_its_own_autocast(weight, estimator):
    """The logits are in half precision, the loss is not."""

    def loss(m):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(m(INPUTS.float()), LABELS, weight=weight)

    model = classifier().float()
    found, exact = estimator(model, loss), Backprop()(model, loss)
    assert found.loss.dtype == exact.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, exact.loss)
    if not isinstance(estimator, GaussNewton):
        torch.testing.assert_close(found.grads["2.weight"], exact.grads["2.weight"], rtol=0.05, atol=0.01)


EITHER = {
    "tokens": lambda m: per_token(m(SERIES)).flatten(),
    "sequences": lambda m: per_token(m(SERIES)).mean(1),
    "scalar": lambda m: per_token(m(SERIES)).mean(),
}


@pytest.mark.parametrize("before", EITHER)
@pytest.mark.parametrize("name", EITHER)
def test_an_estimate_does_not_depend_on_an_earlier_loss(before, name):
    case = of_series(RIGHT["scalar"])
    model, found = case.build(), []
    for m in (model, case.build()):
        if m is model:
            ActivityPerturbation(2)(m, EITHER[before])
        found.append(ActivityPerturbation(2)(m, EITHER[name], generator=torch.Generator().manual_seed(0)).grads)
    assert_is(*found)


@pytest.mark.parametrize("estimator", [ActivityPerturbation(exact_head=True), ForwardGradient(exact_head=True)])
def test_a_single_pair_of_mixed_examples_is_refused(estimator):
    model, inputs = classifier().double(), torch.randn(12, 3, dtype=torch.float64)
    for one, other in itertools.permutations(range(12), 2):

        def mixed(m, one=one, other=other):
            z = m(inputs)
            return z.index_add(0, torch.tensor([one]), z[[other]]).square().sum(1)

        with pytest.raises(UnsupportedOperation, match="losses that each depend on one row of 2"):
            estimator(model, mixed)


@pytest.mark.parametrize("num", [1, 2, 3, 20, 21, 1000])
def test_every_row_has_marks_that_no_other_row_covers(num):
    marked = marks(num, torch.zeros(())).isnan().float()
    both = marked.T @ marked
    assert both.eq(both.diagonal()).equal(torch.eye(num, dtype=torch.bool))


def test_a_later_loss_that_mixes_examples_is_refused():
    model, estimator = of_inputs(None).build(), ForwardGradient(exact_head=True)
    estimator(model, lambda m: m(INPUTS).square().sum(1))
    with pytest.raises(UnsupportedOperation, match="losses that each depend on one row of 2"):
        estimator(model, lambda m: m(INPUTS).cumsum(0).square().sum(1))


@pytest.mark.parametrize(
    "estimator", [ActivityPerturbation(2, exact_head=True), ForwardGradient(exact_head=True), FDFA()]
)
def test_a_batch_with_nan_gives_nan(estimator):
    bad = INPUTS.clone()
    bad[1] = torch.nan
    found = estimated_grads(estimator, Case("nan", classifier, lambda m: F.cross_entropy(m(bad), LABELS)))
    assert found["2.weight"].isnan().any()


@pytest.mark.parametrize("estimator", [ActivityPerturbation(2, exact_head=True), ForwardGradient(exact_head=True)])
def test_the_scalar_loss_of_a_single_example(estimator):
    """The last batch of an epoch may hold one."""
    case = Case("one", classifier, lambda m: F.cross_entropy(m(INPUTS[:1]), LABELS[:1]))
    torch.testing.assert_close(estimated_grads(estimator, case)["2.weight"], exact_grads(case)["2.weight"])


def test_rows_are_known_where_their_slopes_cancel():
    rows = Evaluated(torch.ones(2), torch.tensor([[1.0, -1.0]]))
    assert rows.has_mean_of(Evaluated(torch.tensor(1.0), torch.tensor([1e-8])))
    assert not rows.has_mean_of(Evaluated(torch.tensor(1.0), torch.tensor([1e-2])))

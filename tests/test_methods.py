"""The table: every method of conf/method x every problem x what the method claims."""

import math
from functools import cache

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fgtrain import write_grads
from fgtrain.errors import DivergenceError, UserError
from fgtrain.tasks import Beale, Points, Rosenbrock, Sphere
from tests import properties
from tests.cases import CASES
from tests.properties import estimated_grads, estimates_of, exact_grads, flat
from tests.test_script import composed, options

METHODS = options("method")
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
SCALAR, TIED, POINTS = "regression, scalar loss, inner function of the model", "tied weights", "a bare parameter"
REFUSED = {  # by name of the case; POINTS stands for the test functions too
    "activity": {TIED, POINTS},
    "activity_head": {SCALAR, TIED, POINTS},
    "fdfa": {SCALAR, TIED, POINTS},
    "local": {SCALAR, TIED, POINTS},
    "local_guess": {SCALAR, TIED, POINTS},
}
DRAWS = 50


@cache
def configuration(method):
    """The arguments in its file, and the `_target_` they are for."""
    return OmegaConf.to_container(composed(f"method={method}").method, resolve=True)


def make(method, **changed):
    """The estimator as its file configures it, but for those of its arguments that are given here."""
    node = configuration(method)
    return instantiate(node | {key: value for key, value in changed.items() if key in node})


def unshrunk(method, **changed):
    """The estimator with its own length."""
    return make(method, shrinkage=False, **changed)


def refuses(method, case):
    return case in REFUSED.get(method, ())


def table(methods=METHODS, refused=False):
    """Every method x every problem that it takes, or every one that it refuses."""
    pairs = [(method, case) for method in methods for case in CASES if refuses(method, case.name) == refused]
    ids = [f"{method}, {case.name}" for method, case in pairs]
    return pytest.mark.parametrize(("method", "case"), pairs, ids=ids)


def claiming(claim):
    return [method for method in METHODS if claim in unshrunk(method).claims]


@table(refused=True)
def test_what_a_method_cannot_train_is_refused_in_a_line(method, case):
    with pytest.raises(UserError) as refusal:
        estimated_grads(make(method), case)
    assert not isinstance(refusal.value, DivergenceError)
    assert "\n" not in str(refusal.value)


@EVERY_METHOD
def test_no_method_refuses_a_plain_network(method):
    estimated_grads(make(method), CASES[0])


@table(claiming("exact"))
def test_exact(method, case):
    estimator = make(method)
    torch.testing.assert_close(flat(estimated_grads(estimator, case)), flat(exact_grads(case)))


@table(claiming("unbiased"))
def test_unbiased_with_the_error_of_its_closed_form(method, case):
    gradient = exact_grads(case)
    num_tangents = math.ceil(2.5 * unshrunk(method, num_tangents=1).relative_squared_error(gradient))
    estimator = unshrunk(method, num_tangents=num_tangents)
    properties.assert_unbiased(estimator, case, estimator.relative_squared_error(gradient), draws=20)


@table(claiming("descent"))
def test_descent(method, case):
    estimator = make(method)
    gradient = exact_grads(case)
    for draw in range(10):
        estimate = estimated_grads(estimator, case, draw)
        assert sum((g * gradient[name]).sum() for name, g in estimate.items()) >= 0


@table()
def test_leaves_no_trace(method, case):
    properties.assert_leaves_no_trace(make(method), case)


@table()
def test_same_state_and_seed_same_estimate(method, case):
    first, again = (flat(estimated_grads(make(method), case, 7)) for _ in range(2))
    assert torch.equal(first, again)


@table([method for method in METHODS if make(method).scalar_reducible])
def test_replayed_from_derivatives_and_seed(method, case):
    estimator, model = make(method, num_tangents=3), case.build()
    estimate = estimator(model, case.loss, generator=torch.Generator().manual_seed(0))
    assert estimate.directional_derivatives is not None
    again = estimator.replay(model, estimate.directional_derivatives, torch.Generator().manual_seed(0))
    assert torch.equal(flat(again), flat(estimate.grads))


@table([method for method in METHODS if "chunk_size" in configuration(method)])
def test_chunked_equals_unchunked(method, case):
    whole, chunked = (make(method, num_tangents=3, chunk_size=size) for size in (None, 2))
    torch.testing.assert_close(flat(estimated_grads(chunked, case)), flat(estimated_grads(whole, case)))


@pytest.mark.parametrize("task", [Sphere(dim=4), Beale(), Rosenbrock()], ids=lambda task: type(task).__name__)
@pytest.mark.parametrize("method", [method for method in METHODS if not refuses(method, POINTS)])
def test_lowers_test_functions(method, task):
    estimator = make(method)
    torch.manual_seed(42)
    model = Points(task)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    start = task.value(model()).item()
    for _ in range(50):
        write_grads(model, estimator(model, lambda m: task.losses(m, None), generator=generator).grads)
        optimizer.step()
    assert task.value(model()).item() < start


# --- biased methods state their bias ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num_tangents", [1, 16])
@pytest.mark.parametrize("law", ["Normal", "Rademacher"])
@pytest.mark.parametrize("method", ["fwdgrad", "spsa", "mezo"])
def test_shrinkage_is_the_best_length(method, law, num_tangents):
    """E||a g_hat - g||^2 over ||g||^2 is a^2 (1 + s) - 2 a + 1, least at a = 1 / (1 + s), the mean estimate a g."""
    options = {"tangents": {"_target_": f"fgtrain.{law}"}, "num_tangents": num_tangents}
    plain, shrunk = unshrunk(method, **options), make(method, **options)
    case, gradient = CASES[0], exact_grads(CASES[0])
    s = plain.relative_squared_error(gradient)
    factor = 1 / (1 + s)
    torch.testing.assert_close(
        flat(estimated_grads(shrunk, case)), factor * flat(estimated_grads(plain, case)), rtol=1e-12, atol=0
    )
    assert "unbiased" not in shrunk.claims
    assert shrunk.relative_squared_error(gradient) == pytest.approx(s / (1 + s))
    expected, draws = factor * flat(gradient), math.ceil(50 * s)
    properties.assert_mean_is(expected, estimates_of(shrunk, case, draws), s * expected.square().sum())
    for other in (0.9 * factor, 1.1 * factor):
        assert other**2 * s + (1 - other) ** 2 > shrunk.relative_squared_error(gradient)


@pytest.mark.parametrize("options", [{}, {"shrinkage": False}, {"combine": "projection"}], ids=str)
@pytest.mark.parametrize("num_tangents", [1, 8])
def test_expected_cosine(num_tangents, options):
    """cos^2 of a projection on K isotropic directions is Beta(K / 2, (n - K) / 2), of mean K / n; so is K = 1's."""
    estimator = make("fwdgrad", tangents={"_target_": "fgtrain.Sphere"}, num_tangents=num_tangents, **options)
    case, gradient = CASES[0], flat(exact_grads(CASES[0]))
    n, share = gradient.numel(), num_tangents / gradient.numel()
    estimates = estimates_of(estimator, case, DRAWS)
    squares = torch.nn.functional.cosine_similarity(estimates, gradient, dim=1).square()
    expected = estimator.expected_cosine(exact_grads(case)) ** 2
    if num_tangents == 1 or "combine" in options:
        assert expected == pytest.approx(share)
    deviation = math.sqrt(share * (1 - share) * 2 / (n + 2))
    assert abs(squares.mean() - expected) <= 5 * deviation / math.sqrt(DRAWS)


def test_a_projection_needs_no_shrinkage():
    on, off = (make("fwdgrad", combine="projection", shrinkage=on) for on in (True, False))
    assert torch.equal(flat(estimated_grads(on, CASES[0])), flat(estimated_grads(off, CASES[0])))


def test_projection_is_short():
    """E[g_hat] = (K/n) g for isotropic directions, and E ||g_hat||^2 = (K/n) ||g||^2."""
    estimator = make("fwdgrad", combine="projection", num_tangents=8)
    case, gradient = CASES[0], flat(exact_grads(CASES[0]))
    share = 8 / gradient.numel()
    assert estimator.relative_squared_error(exact_grads(case)) == pytest.approx(1 - share)
    error = share * (1 - share) * gradient.square().sum()
    properties.assert_mean_is(share * gradient, estimates_of(estimator, case, 200), error)

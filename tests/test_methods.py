"""The table: every method of conf/method x every problem x what the method claims."""

import copy
import math

import pytest
import torch
from torch import nn

from fgtrain import SPSA, ActivityPerturbation, Backprop, ForwardGradient, Highway, LocalLosses, MeZO, write_grads
from fgtrain.errors import DivergenceError, UserError
from fgtrain.tasks import Beale, Points, Rosenbrock, Sphere
from tests import properties
from tests.backward_passes import backward_passes
from tests.basis import Basis, PartwiseBasis
from tests.cases import CASES, Case
from tests.derivatives import exact_hessian
from tests.every_method import (
    EVERY_METHOD,
    METHODS,
    OF_ANY_NETWORK,
    POINTS,
    RESIDUAL,
    configuration,
    make,
    refuses,
    table,
)
from tests.properties import estimated_grads, estimates_of, exact_grads, flat


def unshrunk(method, **changed):
    """The estimator with its own length."""
    return make(method, shrinkage=False, **changed)


def count(grads):
    return sum(g.numel() for g in grads.values())


TRAITS = {
    "exact": ["backprop", "backprop_checkpoint", "forward_exact"],
    "unbiased": ["fwdgrad", "fwdgrad_lowrank"],
    "descent": ["fwdgrad", "fwdgrad_lowrank", "gauss_newton", "local_guess", "second_order"],
    "scalar_reducible": ["forward_exact", "fwdgrad", "fwdgrad_lowrank", "gauss_newton", "mezo", "spsa"],
    "chunk_size": ["forward_exact", "fwdgrad", "fwdgrad_lowrank", "highway", "highway_forward"],
}
"""{trait: the methods that have it}: written down, since to build every method takes as long as many tests."""


@pytest.mark.slow
def test_methods_have_the_traits_that_they_are_tried_for():
    found = {trait: [] for trait in TRAITS}
    for method in METHODS:
        estimator = unshrunk(method)
        traits = {*estimator.claims, *(["scalar_reducible"] if estimator.scalar_reducible else [])}
        for trait in traits | ({"chunk_size"} & configuration(method).keys()):
            found[trait].append(method)
    assert found == TRAITS


@table(refused=True)
def test_what_a_method_cannot_train_is_refused_in_a_line(method, case):
    with pytest.raises(UserError) as refusal:
        estimated_grads(make(method), case)
    assert not isinstance(refusal.value, DivergenceError)
    assert "\n" not in str(refusal.value)


WITH_ANOTHER_INNER_ESTIMATOR = {
    "highway, no backward pass": lambda: Highway(ActivityPerturbation()),
    "local, backprop in a block": lambda: LocalLosses(Backprop()),
    "local by the tail, backprop in a block": lambda: LocalLosses(Backprop(), head="tail"),
}


@pytest.mark.parametrize("name", [*OF_ANY_NETWORK, *WITH_ANOTHER_INNER_ESTIMATOR])
def test_the_backward_pass_is_the_one_that_is_stated(name):
    estimator = WITH_ANOTHER_INNER_ESTIMATOR[name]() if name in WITH_ANOTHER_INNER_ESTIMATOR else make(name)
    case = next(case for case in CASES if case.name == RESIDUAL)
    first, block, last = case.build()
    model = nn.Sequential(first, block, copy.deepcopy(block), last)
    ran, reached = backward_passes(model, lambda: estimator(model, case.loss))
    assert ran == (estimator.backward_pass != "none")
    assert (estimator.backward_pass == "whole") == (ran and "exact" in estimator.claims)
    if estimator.backward_pass == "within a block":
        everything = {parameter for parameter, _ in model.named_parameters()}
        assert reached
        assert all(names < everything for names in reached)


@EVERY_METHOD
def test_every_method_takes_a_network_with_skips_and_gives_the_derivatives_that_it_states(method):
    estimator, case = make(method), next(case for case in CASES if case.name == RESIDUAL)
    estimate = estimator(case.build(), case.loss, generator=torch.Generator().manual_seed(0))
    assert (estimate.directional_derivatives is not None) == estimator.gives_derivatives


@pytest.mark.parametrize("build", [Highway, lambda **named: LocalLosses(head="tail", **named)])
def test_blocks_are_a_list_of_names(build):
    assert build(blocks=("blocks.0",)).blocks == ["blocks.0"]
    with pytest.raises(ValueError, match=r"^blocks must be a list of names, such as \[blocks.0\], got 'blocks.0'"):
        build(blocks="blocks.0")


@EVERY_METHOD
def test_no_method_but_highway_refuses_a_plain_network(method):
    if not method.startswith("highway"):
        estimated_grads(make(method), CASES[0])


@table(TRAITS["exact"])
def test_exact(method, case):
    estimator = make(method)
    torch.testing.assert_close(flat(estimated_grads(estimator, case)), flat(exact_grads(case)))


BASIS = {"_target_": "tests.basis.Basis"}
VARIANTS = {
    "all at once": {},
    "in chunks": {"chunk_size": 4},
    "of rank 1": {"tangents": BASIS | {"rank": 1}},
    "of rank 2, in chunks": {"tangents": BASIS | {"rank": 2}, "chunk_size": 4},
    "projected": {"combine": "projection"},
    "projected, in chunks": {"combine": "projection", "chunk_size": 4},
    "never clipped": {"clip_derivative": 1e9},
}


@pytest.mark.parametrize("variant", VARIANTS)
@table(TRAITS["unbiased"])
def test_a_complete_basis_gives_the_gradient(method, case, variant):
    gradient = exact_grads(case)
    estimator = unshrunk(method, **{"tangents": BASIS, "num_tangents": count(gradient)} | VARIANTS[variant])
    properties.assert_is(estimated_grads(estimator, case), gradient)


@pytest.mark.parametrize("num_bases", [1, 3])
@table(["fwdgrad", "fwdgrad_lowrank"])
def test_a_complete_basis_gives_the_known_multiple_if_shrunk(method, case, num_bases):
    """1 / (1 + s), where a direction drawn from the basis has the relative variance n - 1."""
    gradient = exact_grads(case)
    n = count(gradient)
    estimate = estimated_grads(make(method, tangents=BASIS, num_tangents=num_bases * n, shrinkage=True), case)
    properties.assert_is(estimate, properties.scaled(gradient, 1 / (1 + (n - 1) / (num_bases * n))))


@pytest.mark.parametrize("chunk_size", [None, 4])
@table(["activity_head"])
def test_a_complete_basis_of_the_other_layers_beside_an_exact_head(method, case, chunk_size):
    """On the problems that have a last layer whose gradient activity_head can take exactly."""
    gradient = exact_grads(case)
    n = count(gradient) - sum(gradient[name].numel() for name in sorted(gradient)[-2:])
    options = {"num_tangents": max(n, 1), "chunk_size": chunk_size, "exact_head": True}
    estimator = unshrunk("fwdgrad", tangents=BASIS, **options)
    properties.assert_is(estimated_grads(estimator, case), gradient)


@pytest.mark.parametrize("shrinkage", [False, True])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"combine": "projection"}], ids=str)
def test_a_complete_basis_of_every_row(options, shrinkage):
    """Four numbers a row: K = 4 for a row, whatever their number."""
    task = Rosenbrock(starts=3, start="domain", dim=4)
    case = Case("rows", lambda: Points(task), lambda m: task.losses(m, None))
    estimator = make("fwdgrad", tangents=BASIS, num_tangents=4, rowwise=True, shrinkage=shrinkage, **options)
    factor = 1 / (1 + 3 / 4) if shrinkage and "combine" not in options else 1.0
    properties.assert_is(estimated_grads(estimator, case), properties.scaled(exact_grads(case), factor))


EPSILON = torch.finfo(torch.float64).eps ** (1 / 3)
DIFFERENCES = 1e4 * EPSILON**2
"""Of a central difference with such an epsilon both errors, rounding |f| u / epsilon and epsilon^2 / 6 times the third
derivative, are of the order epsilon^2 = 4e-11; the third derivative has a factor n, up to 1e4 in these problems."""


@pytest.mark.parametrize("shrinkage", [False, True])
@table(["spsa", "mezo"])
def test_a_complete_basis_of_differences_gives_the_gradient(method, case, shrinkage):
    gradient = exact_grads(case)
    n = count(gradient)
    law = Basis() if method == "spsa" else PartwiseBasis(case)
    estimator = {"spsa": SPSA, "mezo": MeZO}[method](law, n, epsilon=EPSILON, shrinkage=shrinkage)
    expected = properties.scaled(gradient, 1 / (1 + (n - 1) / n) if shrinkage else 1.0)
    properties.assert_is(estimated_grads(estimator, case), expected, rounding=DIFFERENCES)


@pytest.mark.parametrize("method", ["spsa", "mezo"])
def test_a_complete_basis_of_differences_is_off_by_the_third_derivative(method):
    """f = sum x_k^3 / 6: along sqrt(n) e_k the difference adds epsilon^2 n / 6 to x_k^2 / 2, and nothing else."""
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    case = Case("cubic", lambda: nn.ParameterDict({"x": x.clone()}), lambda m: (m["x"] ** 3).sum() / 6)
    law = Basis() if method == "spsa" else PartwiseBasis(case)
    estimate = estimated_grads({"spsa": SPSA, "mezo": MeZO}[method](law, 3, epsilon=0.1), case)
    properties.assert_is(estimate, {"x": x**2 / 2 + 0.1**2 * 3 / 6})


@table(["second_order"])
def test_a_complete_basis_gives_the_damped_newton_step(method, case):
    """|H|^-1 g with the Hessian of all parameters, no eigenvalue below a thousandth of the largest."""
    gradient, hessian = exact_grads(case), exact_hessian(case)
    estimator = make(method, tangents=BASIS, num_tangents=count(gradient))
    sizes, vectors = torch.linalg.eigh(hessian)
    sizes = sizes.abs().clamp_min(1e-3 * sizes.abs().max())
    step = vectors @ (vectors.T @ flat(gradient) / sizes)
    found = flat(estimated_grads(estimator, case))
    assert (found - step).norm() <= 1e-10 * step.norm()  # rounding times the condition, 1e3


@table(TRAITS["descent"])
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


@table(TRAITS["scalar_reducible"])
def test_replayed_from_derivatives_and_seed(method, case):
    estimator, model = make(method, num_tangents=3), case.build()
    estimate = estimator(model, case.loss, generator=torch.Generator().manual_seed(0))
    assert estimate.replayed is not None
    again = estimator.replay(model, estimate.replayed, torch.Generator().manual_seed(0))
    assert torch.equal(flat(again), flat(estimate.grads))


@table(TRAITS["chunk_size"])
def test_chunked_equals_unchunked(method, case):
    whole, chunked = (make(method, num_tangents=3, chunk_size=size) for size in (None, 2))
    torch.testing.assert_close(flat(estimated_grads(chunked, case)), flat(estimated_grads(whole, case)))


NEWTON = {"gauss_newton", "second_order"}


@pytest.mark.slow
@pytest.mark.parametrize("task", [Sphere(dim=4), Beale(), Rosenbrock()], ids=lambda task: type(task).__name__)
@pytest.mark.parametrize("method", [m for m in METHODS if not refuses(m, POINTS) and m not in NEWTON])
def test_lowers_test_functions_as_gradient_descent_does(method, task):
    """Small steps, longer by what the estimate is shorter, lower f by lr sum (grad f . v)^2: T squares of a mean of K
    normal numbers have the relative deviation sqrt(2 / (K T)) at most. Newton steps have tests of their own."""
    steps, lr = 200, 1e-5
    fallen = []
    for estimator in (make("backprop"), make(method)):
        torch.manual_seed(42)
        model = Points(task).double()
        generator = torch.Generator().manual_seed(0)
        rate = lr / estimator.mean_length(dict(model.named_parameters()))
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        start = task.value(model()).item()
        for _ in range(steps):
            write_grads(model, estimator(model, lambda m: task.losses(m, None), generator=generator).grads)
            optimizer.step()
        fallen.append(start - task.value(model()).item())
    exact, ours = fallen
    assert exact > 0
    assert ours == pytest.approx(exact, rel=5 * math.sqrt(2 / steps))


# --- biased methods state their bias ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tangents", [1, 16])
@pytest.mark.parametrize("law", ["Normal", "Rademacher"])
@pytest.mark.parametrize("method", ["fwdgrad", "spsa", "mezo"])
def test_shrinkage_is_the_best_length(method, law, num_tangents):
    """E||a g_hat - g||^2 over ||g||^2 is a^2 s + (1 - a)^2, least, s / (1 + s), at a = 1 / (1 + s)."""
    options = {"tangents": {"_target_": f"fgtrain.{law}"}, "num_tangents": num_tangents}
    plain, shrunk = unshrunk(method, **options), make(method, **options)
    case, gradient = CASES[0], exact_grads(CASES[0])
    s = (count(gradient) + {"Normal": 1, "Rademacher": -1}[law]) / num_tangents
    properties.assert_is(
        estimated_grads(shrunk, case), properties.scaled(estimated_grads(plain, case), 1 / (1 + s)), rounding=1e-14
    )
    assert "unbiased" not in shrunk.claims
    assert plain.relative_squared_error(gradient) == pytest.approx(s)
    assert shrunk.relative_squared_error(gradient) == pytest.approx(s / (1 + s))
    assert shrunk.mean_length(gradient) == pytest.approx(1 / (1 + s))
    assert shrunk.mean_length_of(5, gradient) == pytest.approx(1 / (1 + s / 5))


SPHERE = {"_target_": "fgtrain.Sphere"}
OPTIONS = pytest.mark.parametrize("options", [{}, {"shrinkage": False}, {"combine": "projection"}], ids=str)


@OPTIONS
def test_expected_cosine_of_one_direction(options):
    """cos^2 of a projection on K isotropic directions is Beta(K / 2, (n - K) / 2), of mean K / n; so is K = 1's."""
    gradient = exact_grads(CASES[0])
    estimator = make("fwdgrad", tangents=SPHERE, num_tangents=1, **options)
    assert estimator.expected_cosine(gradient) == pytest.approx(count(gradient) ** -0.5)


@pytest.mark.slow
@OPTIONS
def test_expected_cosine_of_several_directions(options):
    """To 10 % of the cosine, which are 20 % of its square."""
    estimator = make("fwdgrad", tangents=SPHERE, num_tangents=8, **options)
    case, gradient, draws = CASES[0], exact_grads(CASES[0]), 200
    share = 8 / count(gradient)
    squares = nn.functional.cosine_similarity(estimates_of(estimator, case, draws), flat(gradient), dim=1).square()
    expected = estimator.expected_cosine(gradient) ** 2
    if "combine" in options:
        assert expected == pytest.approx(share)
    deviation = math.sqrt(share * (1 - share) * 2 / (count(gradient) + 2))
    bound = 5 * deviation / math.sqrt(draws)
    assert bound < 0.2 * expected
    assert abs(squares.mean() - expected) <= bound


def test_a_projection_needs_no_shrinkage():
    on, off = (make("fwdgrad", combine="projection", shrinkage=on) for on in (True, False))
    assert torch.equal(flat(estimated_grads(on, CASES[0])), flat(estimated_grads(off, CASES[0])))


def test_projection_is_short():
    """E[g_hat] = (K/n) g for isotropic directions, and E ||g_hat||^2 = (K/n) ||g||^2.

    Of n estimates along K unit vectors each, taken in turn, every number is in K.
    """
    case, gradient = CASES[0], exact_grads(CASES[0])
    n, g, num = count(gradient), flat(gradient), 8
    estimator = make("fwdgrad", combine="projection", num_tangents=num)
    in_turn = ForwardGradient(Basis(), num, "projection")
    estimates = estimates_of(in_turn, case, n)
    torch.testing.assert_close(estimates.mean(0), num / n * g, rtol=1e-12, atol=1e-14)
    errors = (estimates - g).square().sum(1) / g.square().sum()
    assert estimator.relative_squared_error(gradient) == pytest.approx(errors.mean().item())
    assert estimator.mean_length(gradient) == pytest.approx(num / n)
    more = make("fwdgrad", combine="projection", num_tangents=2 * n)
    assert (more.relative_squared_error(gradient), more.mean_length(gradient)) == (0, 1)

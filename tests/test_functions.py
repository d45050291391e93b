import pytest
import torch

from fgtrain import Backprop, ForwardGradient, write_grads
from fgtrain.figures import look, looks, save
from fgtrain.lightning.callbacks.trajectory import draw_trajectories
from fgtrain.studies.profiles import problems
from fgtrain.tasks import Beale, CataloguedFunction, Himmelblau, Matyas, Points, Rosenbrock, Sphere, StyblinskiTang
from tests.commands import options

KINKED = {"ackley", "salomon"}  # square roots of zero at the minimum: no slope there


@pytest.mark.parametrize("function", problems([2, 5], 1), ids=lambda f: f"{f.name}-{f.dim}")
def test_minima_are_minima(function, float64):
    minima = function.minima().double().requires_grad_()
    values = function.value(minima)
    torch.testing.assert_close(values, torch.full_like(values, function.minimum), atol=1e-9, rtol=1e-9)
    if function.name not in KINKED:
        (slope,) = torch.autograd.grad(values.sum(), minima)
        assert slope.abs().max() < 1e-4
    low, high = function.domain
    generator = torch.Generator().manual_seed(0)
    everywhere = low + (high - low) * torch.rand(20_000, function.dim, generator=generator)
    nearby = minima.detach()[:, None] + 1e-3 * (high - low) * torch.randn(1, 1000, function.dim, generator=generator)
    for points in (everywhere, nearby):
        assert (function.value(points) >= function.minimum - 1e-9 * abs(function.minimum)).all()
    assert ((minima >= low) & (minima <= high)).all()
    assert (function.distance_to_minimum(minima.detach()) < 1e-9).all()


def test_names_are_unique():
    names = [(function.name, function.dim) for function in problems([3], 1)]
    assert len(set(names)) == len(names) > 70


@pytest.mark.parametrize(
    ("function", "point", "value"),
    [
        (Beale(), [0.0, 0.0], 14.203125),
        (Himmelblau(), [0.0, 0.0], 170.0),
        (Matyas(), [1.0, 1.0], 0.04),
        (Rosenbrock(dim=3), [0.0, 0.0, 0.0], 2.0),
        (Sphere(dim=3), [1.0, 2.0, 3.0], 14.0),
        (StyblinskiTang(), [1.0, 1.0], -10.0),
        (CataloguedFunction("booth"), [0.0, 0.0], 74.0),
        (CataloguedFunction("goldstein_price"), [0.0, 0.0], 600.0),
        (CataloguedFunction("branin"), [0.0, 0.0], 55.602112642270264),
        # the starting points of More, Garbow and Hillstrom 1981 and the values that they give for them
        (CataloguedFunction("freudenstein_roth"), [0.5, -2.0], 400.5),
        (CataloguedFunction("jennrich_sampson"), [0.3, 0.4], 4171.306161960),
        (CataloguedFunction("box3"), [0.0, 10.0, 20.0], 1031.1538106094),
        (CataloguedFunction("helical_valley"), [-1.0, 0.0, 0.0], 2500.0),
        (CataloguedFunction("wood"), [-3.0, -1.0, -3.0, -1.0], 19192.0),
        (CataloguedFunction("powell_singular"), [3.0, -1.0, 0.0, 1.0], 215.0),
        (CataloguedFunction("brown_dennis"), [25.0, 5.0, -5.0, -1.0], 7926693.336997432),
        (CataloguedFunction("biggs_exp6"), [1.0, 2.0, 1.0, 1.0, 1.0, 1.0], 0.7790700756560),
        (CataloguedFunction("trigonometric", dim=10), [0.1] * 10, 0.00707575946622),
        (CataloguedFunction("variably_dimensioned", dim=10), [1 - i / 10 for i in range(1, 11)], 2198551.1625),
        (CataloguedFunction("brown_almost_linear", dim=10), [0.5] * 10, 273.2480478286743),
    ],
)
def test_values_by_hand(function, point, value, float64):
    torch.testing.assert_close(function.value(torch.tensor(point)), torch.tensor(value), rtol=1e-9, atol=0)


def descend(estimator, task, steps=20, lr=1e-3):
    """End points of plain gradient descent, the directions keyed by the step."""
    model = Points(task)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        write_grads(model, estimator(model, lambda m: task.losses(m, None), generator=generator).grads)
        optimizer.step()
    return model().detach()


def test_many_starts_are_as_many_runs(float64):
    starts = torch.tensor([[0.3, 0.4], [-1.0, 1.5], [2.0, 0.1]])
    task = Beale(starts=3)
    task.starting_points = starts.clone
    together = descend(Backprop(), task)
    alone = torch.cat([descend(Backprop(), Beale(start=point)) for point in starts.tolist()])
    torch.testing.assert_close(together, alone)


ESTIMATED = [*((Backprop(), function) for function in problems([2], 3)), (ForwardGradient(rowwise=True), Beale(3))]


@pytest.mark.parametrize(("estimator", "function"), ESTIMATED, ids=lambda x: getattr(x, "name", type(x).__name__))
def test_a_start_that_diverged_stays_and_the_others_go_on(estimator, function):
    low, high = function.domain
    starts = torch.rand(3, function.dim, generator=torch.Generator().manual_seed(1)) * (high - low) + low
    far = starts.clone()
    far[1] = 1e30
    function.starting_points = far.clone
    model = Points(function)
    if function.value(model())[1] <= 1e15:
        return  # a bounded function
    metrics = function.metrics(model, None)
    assert metrics["diverged_starts"].tolist() == [0, 1, 0]
    torch.testing.assert_close(metrics["loss"], function.value(starts[::2]))
    estimate = estimator(model, lambda m: function.losses(m, None), generator=torch.Generator().manual_seed(0))
    function.starting_points = starts.clone
    alone = estimator(Points(function), lambda m: function.losses(m, None), generator=torch.Generator().manual_seed(0))
    assert not estimate.grads["points"][1].any()
    torch.testing.assert_close(estimate.grads["points"][::2], alone.grads["points"][::2])
    torch.testing.assert_close(estimate.loss, function.value(starts[::2]).sum())


def test_a_run_of_which_no_start_is_left_has_no_finite_loss():
    task = Beale(2, start=[1e30, 1e30])
    assert task.losses(Points(task), None).isinf().all()


def test_equal_starts_take_different_forward_gradient_paths(float64):
    ends = descend(ForwardGradient(rowwise=True), Beale(starts=4, start=[1.0, 1.0]))
    assert len({tuple(end) for end in ends.tolist()}) == 4


def test_start_points():
    torch.manual_seed(42)
    expected = torch.rand(2)
    torch.manual_seed(42)
    torch.testing.assert_close(Beale().starting_points(), expected[None])
    wide = Himmelblau(starts=1000, start="domain").starting_points()
    assert wide.min() < -4.9
    assert wide.max() > 4.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Beale(starts=0), "starts must be at least 1, got 0"),
        (lambda: Rosenbrock(dim=1), "dim must be at least 2, got 1"),
        (lambda: CataloguedFunction("ackely"), r"there is no test function ackely; did you mean ackley\?"),
        (lambda: CataloguedFunction("zigzag"), "there is no test function zigzag; choose one of ackley, "),
        (lambda: CataloguedFunction("wood", dim=3), "wood has dimension 4, got dim=3"),
        (lambda: Beale(start=[1.0]), r"start must have 2 coordinates, got \[1.0\]"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def drawn(function, **paths):
    figure = draw_trajectories(function, {m: torch.as_tensor(p) for m, p in paths.items()}, "lr 0.1", max_paths=4)
    figure.canvas.draw()
    lines = [line for line in figure.axes[0].get_lines() if line.get_marker() == "None"]
    return figure, {m: [line for line in lines if line.get_color() == look(m)[0]] for m in paths}


def test_trajectories_of_two_methods_are_on_one_contour():
    paths = torch.rand(10, 3, 2)
    diverged = paths.clone()
    diverged[5:, 1] = 1e30
    figure, lines = drawn(Himmelblau(), backprop=paths, fwdgrad=diverged)
    assert {method: len(found) for method, found in lines.items()} == {"backprop": 3, "fwdgrad": 3}
    assert figure.axes[0].get_title() == "Himmelblau, lr 0.1\n3 starts, 1 diverged with fwdgrad"
    assert max(map(abs, figure.axes[0].get_xlim() + figure.axes[0].get_ylim())) < 6
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["backprop", "fwdgrad"]


def test_a_title_says_how_many_paths_are_drawn():
    figure, lines = drawn(Himmelblau(), backprop=torch.rand(3, 9, 2))
    assert len(lines["backprop"]) == 4
    assert figure.axes[0].get_title() == "Himmelblau, backprop, lr 0.1\n4 of 9 starts"


def test_every_method_has_a_look_of_its_own():
    shipped = {method: look(method) for method in options("method")}
    assert len(set(shipped.values())) == len(shipped)
    assert ":" not in {dashes for _, dashes in shipped.values()}
    assert look("mine")[1] == ":"
    assert look("mine") == look("mine")


def test_methods_of_one_figure_look_different():
    methods = [*options("method"), *(f"fwdgrad:num_tangents={k}" for k in range(12))]
    found = looks(methods)
    assert list(found) == methods
    assert len(set(found.values())) == len(methods)
    assert all(found[method] == look(method) for method in options("method"))


@pytest.mark.slow
def test_a_saved_figure_is_the_same_file_each_time(tmp_path):
    for name in ("first", "second"):
        save(
            draw_trajectories(Beale(), {"backprop": torch.rand(3, 1, 2, generator=torch.Generator().manual_seed(0))}),
            tmp_path / name,
        )
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".svg"}
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()

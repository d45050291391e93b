import pytest
import torch

from fgtrain import Backprop, ForwardGradient, write_grads
from fgtrain.lightning.callbacks.trajectory import draw_trajectories
from fgtrain.studies.profiles import problems
from fgtrain.tasks import Beale, CataloguedFunction, Himmelblau, Matyas, Points, Rosenbrock, Sphere, StyblinskiTang

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
        (lambda: CataloguedFunction("bowl"), "there is no test function bowl; choose one of ackley, "),
        (lambda: CataloguedFunction("wood", dim=3), "wood has dimension 4, got dim=3"),
        (lambda: Beale(start=[1.0]), r"start must have 2 coordinates, got \[1.0\]"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_trajectories_are_drawn_with_diverged_paths_left_out():
    paths = torch.rand(10, 3, 2)
    paths[5:, 1] = torch.nan
    figure = draw_trajectories(Himmelblau(), paths)
    figure.canvas.draw()
    lines = figure.axes[0].get_lines()
    assert len(lines) == 3 * 2 + 1  # a path and its start each, and the minima

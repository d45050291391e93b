import pytest
import torch

from fgtrain import Backprop, ForwardGradient, write_grads
from fgtrain.lightning.callbacks.trajectory import draw_trajectories
from fgtrain.tasks import Beale, Himmelblau, Matyas, Points, Rosenbrock, Sphere, StyblinskiTang

PLANE = [Beale, Himmelblau, Matyas]
ANY_DIMENSION = [Rosenbrock, Sphere, StyblinskiTang]
FUNCTIONS = [
    *(pytest.param(f(), id=f.__name__) for f in PLANE),
    *(pytest.param(f(dim=d), id=f"{f.__name__}-{d}") for f in ANY_DIMENSION for d in (2, 5)),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_minima_are_minima(function, float64):
    minima = function.minima().double().requires_grad_()
    values = function.value(minima)
    torch.testing.assert_close(values, torch.full_like(values, function.minimum), atol=1e-9, rtol=1e-9)
    (slope,) = torch.autograd.grad(values.sum(), minima)
    assert slope.abs().max() < 1e-4
    low, high = function.domain
    everywhere = low + (high - low) * torch.rand(20_000, function.dim, generator=torch.Generator().manual_seed(0))
    assert (function.value(everywhere) >= function.minimum).all()
    assert (function.distance_to_minimum(minima.detach()) < 1e-9).all()


@pytest.mark.parametrize(
    ("function", "point", "value"),
    [
        (Beale(), [0.0, 0.0], 14.203125),
        (Himmelblau(), [0.0, 0.0], 170.0),
        (Matyas(), [1.0, 1.0], 0.04),
        (Rosenbrock(dim=3), [0.0, 0.0, 0.0], 2.0),
        (Sphere(dim=3), [1.0, 2.0, 3.0], 14.0),
        (StyblinskiTang(), [1.0, 1.0], -10.0),
    ],
)
def test_values_by_hand(function, point, value, float64):
    torch.testing.assert_close(function.value(torch.tensor(point)), torch.tensor(value))


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

"""Performance profiles: the share of problems that a method solves within a number of evaluations.

They cover many functions, dimensions, starting points and learning rates. A step treats all starting points and
learning rates of a function as one batch. A problem is one function in one dimension from one start. It is solved when

    f(x) <= f* + tolerance (f(x_0) - f*).

Source: Dolan and More 2002; More and Wild 2009; for forward gradients Belouze 2022, arXiv:2209.06302.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fgtrain.estimators import GradientEstimator
from fgtrain.figures import house_style, looks
from fgtrain.random import keyed_generator
from fgtrain.tasks import functions
from fgtrain.tasks.catalogue import CATALOGUE, CataloguedFunction
from fgtrain.tasks.functions import Function, Points

CLASSES = (functions.Beale, functions.Himmelblau, functions.Matyas)
CLASSES_OF_ANY_DIMENSION = (functions.Rosenbrock, functions.Sphere, functions.StyblinskiTang)


class Solved(NamedTuple):
    """The result of one method on one function.

    Args:
        function: the function's name.
        dim: its dimension.
        method: the method's name.
        lr: the learning rate of `rates` that solves the most starts, or the fastest of several such rates.
        evaluations: evaluations until solved for each start, infinity if unsolved; see `evaluations_of`.
    """

    function: str
    dim: int
    method: str
    lr: float
    evaluations: list[float]


def problems(dims: Sequence[int], rows: int) -> list[Function]:
    """Every function with `rows` starting points in its domain, in every dimension of `dims` if that is free."""
    made: list[Function] = [cls(rows, "domain") for cls in CLASSES]
    made += [cls(rows, "domain", dim=dim) for cls in CLASSES_OF_ANY_DIMENSION for dim in dims]
    for name, formula in CATALOGUE.items():
        made += [CataloguedFunction(name, rows, "domain", dim) for dim in ([formula.dim] if formula.dim else dims)]
    return made


def solve(
    function: Function,
    method: str,
    estimator: GradientEstimator,
    rates: Sequence[float],
    starts: int,
    evaluations: int,
    *,
    tolerance: float = 0.01,
    seed: int = 0,
) -> Solved:
    """Minimise `function` from all starts with all learning rates in parallel, by plain gradient steps.

    Args:
        function: a function with len(rates) * starts rows.
        method: the method's name.
        estimator: the rowwise gradient estimator.
        rates: learning rates in units of 1 / (length of the gradients at the starts / length of the domain).
        starts: number of starting points.
        evaluations: the budget of a start, see `evaluations_of`; at least one step is done.
        tolerance: see above.
        seed: seed of starting points and directions; every method has the same points.
    """
    model = Points(function)
    low, high = function.domain
    unit = torch.rand(starts, function.dim, generator=keyed_generator(seed, function.dim))
    model.points.data = (low + (high - low) * unit).repeat(len(rates), 1)
    lr = torch.tensor(rates).repeat_interleave(starts)[:, None] * scale_of(function, model)
    first = function.value(model.points.detach())
    target = function.minimum + tolerance * (first - function.minimum)
    solved_at = torch.full((len(lr),), torch.inf)
    step = cost = 0
    while not step or (step + 1) * cost <= evaluations:
        cost = _step(function, model, estimator, lr, seed, step)
        step += 1
        hit = function.value(model.points.detach()) <= target
        solved_at[hit & solved_at.isinf()] = step * cost
        if solved_at.view(len(rates), starts).isfinite().all(1).any():
            break
    by_rate = solved_at.view(len(rates), starts)
    found = by_rate.isfinite()
    order = [(-int(found[i].sum()), float(by_rate[i][found[i]].sum()), i) for i in range(len(rates))]
    best = min(order)[2]
    return Solved(function.name, function.dim, method, rates[best], by_rate[best].tolist())


def scale_of(function: Function, model: Points) -> float:
    """Length of the domain over the median length of the gradients at the starts."""
    points = model.points.detach().clone().requires_grad_()
    (grads,) = torch.autograd.grad(function.value(points).sum(), points)
    return (function.domain[1] - function.domain[0]) / grads.norm(dim=1).median().clamp_min(1e-12).item()


def _step(function: Function, model: Points, estimator: GradientEstimator, lr: Tensor, seed: int, step: int) -> int:
    """Do one step of every row; returns the evaluations per row."""
    calls = 0

    def losses(net: Points) -> Tensor:
        nonlocal calls
        calls += 1
        return function.losses(net, None)

    estimate = estimator(model, losses, generator=keyed_generator(seed, step))
    model.points.data -= lr * estimate.grads["points"]
    rows = len(model.points)
    return evaluations_of(calls, estimate.directional_derivatives, rows)


def evaluations_of(calls: int, derivatives: Tensor | None, rows: int) -> int:
    """Evaluations that a step counts as: a pass counts 1, each derivative in it 1, a reverse sweep 2."""
    if derivatives is None:
        return calls + 2
    carried = max(1, derivatives.numel() // rows)
    return calls + (carried if calls == 1 else 0)


def share_solved(found: Iterable[Solved], budgets: Tensor) -> Tensor:
    """The profile of one method, (B,): the share of its problems solved within each of `budgets`, (B,)."""
    evaluations = torch.tensor([e for solved in found for e in solved.evaluations])
    return (evaluations[:, None] <= budgets).double().mean(0)


@house_style
def draw(found: Sequence[Solved], evaluations: int) -> Figure:
    """A figure of the profiles of all methods, up to the budget that was run."""
    budgets = torch.logspace(0, math.log10(evaluations), 200)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method, (colour, dashes) in looks(dict.fromkeys(solved.method for solved in found)).items():
        shares = share_solved([s for s in found if s.method == method], budgets)
        axes.step(budgets, shares, where="post", label=method, color=colour, linestyle=dashes)
    axes.set(xscale="log", xlabel="evaluations of the function", ylabel="share of problems solved", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def speed_of_batching(make: Callable[[int], Function], estimator: GradientEstimator, rows: int) -> float:
    """The factor by which one batched iteration of `rows` rows is faster than `rows` iterations of one row each."""
    iterations = 20

    def seconds(count: int) -> float:
        function = make(count)
        model = Points(function)
        lr = torch.zeros(count, 1)
        _step(function, model, estimator, lr, 0, 0)
        start = time.perf_counter()
        for step in range(iterations):
            _step(function, model, estimator, lr, 0, step)
        return (time.perf_counter() - start) / iterations

    return rows * seconds(1) / seconds(rows)

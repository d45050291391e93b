"""Calibration of a simulator by forward mode and by backpropagation: error against time, cost against steps.

All methods start from the same guesses, on one thread. Time is CPU time. The error is the root mean square of the
relative errors of the parameters with the lowest loss so far. A start fails if it ends above `FAILED`. The learning
rate of each method is the best of the same three multiples of its usual one, from a start that does not count.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from torch.optim import LBFGS, SGD, Adam, Optimizer

from fgtrain.estimators import Backprop, CheckpointedBackprop, ForwardExact, GaussNewton, GradientEstimator
from fgtrain.estimators.gradients import write_grads
from fgtrain.figures import house_style, looks
from fgtrain.lightning.optimizers import lbfgs
from fgtrain.memory import peak_mib
from fgtrain.studies.parts import Parts
from fgtrain.studies.timing import cpu_seconds
from fgtrain.tasks import Calibration, Guess

FAILED = 0.1
HEADINGS = ("method", "learning rate", "failed", "error", "seconds to twice that", "evaluations", "ms each")
SEARCHED = (1 / 3, 1, 3)
"""Multiples of a method's usual learning rate."""


class Method(NamedTuple):
    """A way to calibrate.

    Args:
        estimator: gives the gradient or the step.
        optimizer: takes parameters and a learning rate.
        lr: the usual learning rate of the optimizer.
    """

    estimator: GradientEstimator
    optimizer: Callable[..., Optimizer]
    lr: float


METHODS = {
    "forward_exact, Adam": Method(ForwardExact(), Adam, 0.03),
    "forward_exact, L-BFGS": Method(ForwardExact(), lbfgs, 1.0),
    "gauss_newton": Method(GaussNewton(num_tangents=None), SGD, 1.0),
    "backprop, Adam": Method(Backprop(), Adam, 0.03),
    "backprop, L-BFGS": Method(Backprop(), lbfgs, 1.0),
    "backprop_checkpoint, Adam": Method(CheckpointedBackprop(), Adam, 0.03),
    "backprop_checkpoint, L-BFGS": Method(CheckpointedBackprop(), lbfgs, 1.0),
}
"""{name: a method}; gauss_newton takes all unit directions."""


class Course(NamedTuple):
    """The course of one method from one start.

    Args:
        method: a key of `METHODS`.
        lr: the learning rate.
        start: the seed of the guess.
        seconds: CPU time after every evaluation of the loss and its gradient.
        errors: the error at each of these times; infinite until a loss is finite.
    """

    method: str
    lr: float
    start: int
    seconds: list[float]
    errors: list[float]

    @property
    def failed(self) -> bool:
        """Whether the parameters are not found."""
        return not self.errors[-1] <= FAILED


class _Over(Exception):
    """The time is over, or the loss no longer falls."""


def search(course: Callable[[str, float], Course], method: str) -> float:
    """The learning rate whose course ends with the least error; `course` takes a method and a learning rate."""
    courses = [course(method, METHODS[method].lr * factor) for factor in SEARCHED]
    return min(courses, key=lambda course: course.errors[-1]).lr


def follow(task: Calibration, method: str, lr: float, start: int, seconds: float, spread: float) -> Course:
    """Calibrate by one method from one start, for some CPU time or until eight evaluations gain less than 0.01 %."""
    torch.manual_seed(start)
    guess = Guess(task, spread)
    estimator, optimizer = METHODS[method].estimator, METHODS[method].optimizer(guess.parameters(), lr=lr)
    course, lowest, losses = Course(method, lr, start, [], []), math.inf, []
    spent = 0.0

    def evaluate() -> Tensor:
        nonlocal lowest, spent
        began = time.process_time()
        estimate = estimator(guess, lambda model: task.losses(model, None))
        write_grads(guess, estimate.grads, check_finite=False)
        spent += time.process_time() - began
        loss, error = estimate.loss.item(), task.relative_errors(guess().detach()).square().mean().sqrt().item()
        is_better = loss < lowest
        lowest = loss if is_better else lowest
        course.seconds.append(spent)
        course.errors.append(error if is_better else course.errors[-1] if course.errors else math.inf)
        losses.append(lowest)
        if spent > seconds or not math.isfinite(loss) or (len(losses) > 8 and lowest > 0.9999 * losses[-9]):
            raise _Over
        return estimate.loss

    try:
        while True:
            if isinstance(optimizer, LBFGS):
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
    except _Over:
        pass
    return course


class Cost(NamedTuple):
    """The cost of one gradient.

    Args:
        method: a method of `GRADIENTS`.
        steps: of the solver.
        mib: the peak size of its tensors, or above 1,000 steps the growth of the process, at least 0.1; None if it was
            not tried, since it would need more than the limit.
        passes: its CPU time over that of a simulation without derivatives.
    """

    method: str
    steps: int
    mib: float | None
    passes: float | None


GRADIENTS: dict[str, GradientEstimator] = {
    "forward_exact": ForwardExact(),
    "gauss_newton": GaussNewton(num_tangents=None),
    "backprop": Backprop(),
    "backprop_checkpoint": CheckpointedBackprop(),
}


def costs(task: Calibration, steps: Sequence[int], limit: float, parts: Parts) -> list[Cost]:
    """The costs of gradients at these numbers of steps, if their memory is at most `limit` MiB."""
    found: list[Cost] = []
    compiled: set[str] = set()
    for number in sorted(set(steps)):
        task.times, task.steps = task.times[[0, -1]], number  # one simulation, without stops
        task.observed = task.observed[:2]
        for name in GRADIENTS:
            before = [c for c in found if c.method == name]
            run = partial(_cost, task, name, before, limit, compiled)
            found.append(parts(Cost, f"cost of {name} at {number}", run))
    return found


def _cost(task: Calibration, name: str, before: Sequence[Cost], limit: float, compiled: set[str]) -> Cost:
    if before and (before[-1].mib is None or _expected(before, task.steps) > limit):
        return Cost(name, task.steps, None, None)
    guess = Guess(task, spread=0.0)

    def gradient() -> object:
        return GRADIENTS[name](guess, lambda model: task.losses(model, None))

    def simulation() -> None:
        with torch.no_grad():
            task.losses(guess, None)

    if name not in compiled:
        gradient()
        simulation()
        compiled.add(name)
    rounds = max(1, min(5, 2000 // task.steps))
    times = [(cpu_seconds(gradient), cpu_seconds(simulation)) for _ in range(rounds)]
    passes = median(slow / fast for slow, fast in times)
    return Cost(name, task.steps, peak_mib(gradient, torch.device("cpu"), is_long=task.steps > 1000), passes)


def _expected(before: Sequence[Cost], steps: int) -> float:
    """The MiB at this number of steps, if they grow on as a power of it."""
    last, earlier = before[-1], before[-2] if len(before) > 1 else None
    assert last.mib is not None
    power = 1.0
    if earlier is not None and earlier.mib is not None:
        power = math.log(last.mib / earlier.mib) / math.log(last.steps / earlier.steps)
    return last.mib * (steps / last.steps) ** power


def table_of(courses: Sequence[Course]) -> Table:
    """Of every method: the starts that fail, and of the others the median error, time to it and evaluations."""
    grid = Table(title=f"calibration; a start fails above an error of {FAILED:.0%}")
    for name in HEADINGS:
        grid.add_column(name, justify="left" if name == "method" else "right")
    for row in rows_of(courses):
        grid.add_row(*row)
    return grid


def rows_of(courses: Sequence[Course]) -> list[tuple[str, ...]]:
    """The rows of the table."""
    rows = []
    for method in dict.fromkeys(course.method for course in courses):
        own = [course for course in courses if course.method == method]
        sound = [course for course in own if not course.failed]
        cells = ["-"] * 2
        if sound:
            cells = [f"{median(p.errors[-1] for p in sound):.2%}", f"{median(map(_seconds_to_twice, sound)):.2f}"]
        each = median(p.seconds[-1] / len(p.seconds) for p in own)
        evaluations = f"{median(len(p.seconds) for p in own):.0f}"
        rows.append(
            (
                method,
                f"{own[0].lr:.2g}",
                f"{len(own) - len(sound)} of {len(own)}",
                *cells,
                evaluations,
                f"{1e3 * each:.0f}",
            )
        )
    return rows


def _seconds_to_twice(course: Course) -> float:
    """When the error was at most twice the last one, and stayed so."""
    late = [i for i, error in enumerate(course.errors) if error > 2 * course.errors[-1]]
    return course.seconds[late[-1] + 1 if late else 0]


@house_style
def draw(courses: Sequence[Course], measured: Sequence[Cost]) -> Figure:
    """Error against time, failed starts in thin lines, beside memory and time of a gradient against steps."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    styles = looks(_look_of(name) for name in METHODS)
    for course in courses:
        colour, dashes = styles[_look_of(course.method)]
        label = course.method if course.start == courses[0].start else None
        errors = [min(error, 10) for error in course.errors]
        left.step(
            course.seconds, errors, where="post", label=label, color=colour, linestyle=dashes,
            linewidth=0.6 if course.failed else 1.4,
        )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="CPU seconds", ylabel="relative error of the parameters")
    for method in dict.fromkeys(cost.method for cost in measured):
        own = [cost for cost in measured if cost.method == method and cost.mib is not None]
        colour, dashes = styles[method]
        for axes, values in ((middle, [c.mib or 0.0 for c in own]), (right, [c.passes or 0.0 for c in own])):
            axes.plot(
                [c.steps for c in own], values, marker="o", markersize=3, label=method, color=colour, linestyle=dashes
            )
    middle.set(xscale="log", yscale="log", xlabel="steps of the solver", ylabel="memory of a gradient, MiB")
    right.set(xscale="log", xlabel="steps of the solver", ylabel="time of a gradient in simulations")
    right.set_ylim(bottom=0)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    for axes in (left, middle):
        if axes.lines:
            axes.legend(fontsize=6)
    return figure


def _look_of(method: str) -> str:
    """The name whose colour a method has: that of its gradient for Adam."""
    return method.partition(",")[0] if "Adam" in method else method

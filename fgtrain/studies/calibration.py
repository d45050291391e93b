"""Calibration of a simulator by forward mode and by backpropagation: error against time, memory against steps.

All methods start from the same guesses, on one thread. Time is CPU time. The error is the root mean square of the
relative errors of the parameters with the lowest loss so far. A start fails if it ends above `FAILED`.
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
from fgtrain.estimators.base import write_grads
from fgtrain.figures import house_style, looks
from fgtrain.memory import free_memory, peak_mib
from fgtrain.tasks import Calibration, Guess

FAILED = 0.1
HEADINGS = ("method", "failed", "error", "seconds to twice that", "evaluations", "ms each")
_adam = partial(Adam, lr=0.03)
_lbfgs = partial(LBFGS, max_iter=1000, max_eval=1000, line_search_fn="strong_wolfe")
METHODS: dict[str, tuple[GradientEstimator, Callable[..., Optimizer]]] = {
    "forward_exact, Adam": (ForwardExact(), _adam),
    "gauss_newton": (GaussNewton(num_tangents=None, max_change=0.5), partial(SGD, lr=1.0)),
    "backprop, Adam": (Backprop(), _adam),
    "backprop, L-BFGS": (Backprop(), _lbfgs),
    "backprop_checkpoint, Adam": (CheckpointedBackprop(), _adam),
    "backprop_checkpoint, L-BFGS": (CheckpointedBackprop(), _lbfgs),
}
"""{name: the method and its optimizer}; gauss_newton takes all unit directions."""


class Course(NamedTuple):
    """The course of one method from one start.

    Args:
        method: a key of `METHODS`.
        start: the seed of the guess.
        seconds: CPU time after every evaluation of the loss and its gradient.
        errors: see above, beside `seconds`; infinite if no loss was finite.
    """

    method: str
    start: int
    seconds: list[float]
    errors: list[float]

    @property
    def failed(self) -> bool:
        """Whether the parameters are not found."""
        return not self.errors[-1] <= FAILED


class _Over(Exception):
    """The time is over, or the loss no longer falls."""


def follow(task: Calibration, method: str, start: int, seconds: float, spread: float) -> Course:
    """Calibrate by one method from one start, for some CPU time or until eight evaluations gain less than 0.01 %."""
    estimator, optimizer_of = METHODS[method]
    torch.manual_seed(start)
    guess = Guess(task, spread)
    optimizer = optimizer_of(guess.parameters())
    path, lowest, losses = Course(method, start, [], []), math.inf, []
    spent = 0.0

    def evaluate() -> Tensor:
        nonlocal lowest, spent
        began = time.process_time()
        estimate = estimator(guess, lambda model: task.losses(model, None))
        write_grads(guess, estimate.grads, check_finite=False)
        spent += time.process_time() - began
        loss, error = estimate.loss.item(), task.relative_errors(guess().detach()).square().mean().sqrt().item()
        is_better = loss < lowest
        lowest = min(loss, lowest) if is_better else lowest
        path.seconds.append(spent)
        path.errors.append(error if is_better else path.errors[-1] if path.errors else math.inf)
        losses.append(lowest)
        if spent > seconds or not math.isfinite(loss) or (len(losses) > 8 and lowest > 0.9999 * losses[-9]):
            raise _Over
        return estimate.loss

    try:
        while True:
            if isinstance(optimizer, LBFGS):
                optimizer.step(evaluate)
                break  # it has converged
            evaluate()
            optimizer.step()
    except _Over:
        pass
    return path


class Peak(NamedTuple):
    """The memory of one gradient.

    Args:
        method: forward_exact, backprop or backprop_checkpoint.
        steps: of the solver.
        mib: the peak size of its tensors; None if it was not tried, since ten times fewer steps needed too much.
    """

    method: str
    steps: int
    mib: float | None


def peaks(steps: Sequence[int], system: str, trajectories: int) -> list[Peak]:
    """The memory of a gradient at these numbers of steps."""
    found = []
    for method, estimator in (
        ("forward_exact", ForwardExact()),
        ("backprop", Backprop()),
        ("backprop_checkpoint", CheckpointedBackprop()),
    ):
        before: Peak | None = None
        for number in sorted(steps):
            mib = None
            if before is None or (before.mib is not None and before.mib * number / before.steps < _affordable()):
                mib = _peak(system, trajectories, number, estimator)
            before = Peak(method, number, mib)
            found.append(before)
    return found


def _affordable() -> float:
    """Half of the free memory, in MiB."""
    return (free_memory(torch.device("cpu")) or 2**32) / 2**21


def _peak(system: str, trajectories: int, steps: int, estimator: GradientEstimator) -> float:
    task = Calibration(system, trajectories, observations=1, steps=steps)
    guess = Guess(task, spread=0.0)
    return peak_mib(lambda: estimator(guess, lambda model: task.losses(model, None)), torch.device("cpu"))


def table_of(paths: Sequence[Course]) -> Table:
    """Of every method: the starts that fail, and of the others the median error, time to it and evaluations."""
    grid = Table(title=f"calibration; a start fails above an error of {FAILED:.0%}")
    for name in HEADINGS:
        grid.add_column(name, justify="left" if name == "method" else "right")
    for row in rows_of(paths):
        grid.add_row(*row)
    return grid


def rows_of(paths: Sequence[Course]) -> list[tuple[str, ...]]:
    """The rows of the table."""
    rows = []
    for method in dict.fromkeys(path.method for path in paths):
        own = [path for path in paths if path.method == method]
        sound = [path for path in own if not path.failed]
        cells = ["-"] * 2
        if sound:
            cells = [f"{median(p.errors[-1] for p in sound):.2%}", f"{median(map(_seconds_to_twice, sound)):.2f}"]
        each = median(p.seconds[-1] / len(p.seconds) for p in own)
        evaluations = f"{median(len(p.seconds) for p in own):.0f}"
        rows.append((method, f"{len(own) - len(sound)} of {len(own)}", *cells, evaluations, f"{1e3 * each:.0f}"))
    return rows


def _seconds_to_twice(path: Course) -> float:
    """When the error was at most twice the last one, and stayed so."""
    late = [i for i, error in enumerate(path.errors) if error > 2 * path.errors[-1]]
    return path.seconds[late[-1] + 1 if late else 0]


@house_style
def draw(paths: Sequence[Course], memory: Sequence[Peak]) -> Figure:
    """Error against time, failed starts in thin lines, beside memory against steps."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = looks(name.partition(",")[0] if "Adam" in name or "," not in name else name for name in METHODS)
    for path in paths:
        name = path.method.partition(",")[0] if "Adam" in path.method else path.method
        colour, dashes = styles[name]
        label = path.method if path.start == paths[0].start else None
        errors = [min(error, 10) for error in path.errors]
        left.step(
            path.seconds, errors, where="post", label=label, color=colour, linestyle=dashes,
            linewidth=0.6 if path.failed else 1.4,
        )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="CPU seconds", ylabel="relative error of the parameters")
    for method in dict.fromkeys(peak.method for peak in memory):
        own = [peak for peak in memory if peak.method == method and peak.mib is not None]
        colour, dashes = styles[method]
        right.plot(
            [p.steps for p in own], [p.mib or 0.0 for p in own],
            marker="o", markersize=3, label=method, color=colour, linestyle=dashes,
        )  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="steps of the solver", ylabel="memory of a gradient, MiB")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    return figure

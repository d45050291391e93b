"""Time and memory of one training step, in units of one backprop step and of one forward pass of the same model.

All steps of a model are measured in turns, so that other load on the machine affects them equally.
"""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgtrain.estimators import GradientEstimator, write_grads
from fgtrain.memory import peak_mib
from fgtrain.models import CNN, MLP, torchvision_model
from fgtrain.network.compilation import compile_model
from fgtrain.studies.timing import synchronize

FORWARD, BACKPROP = "forward", "backprop"


class Problem(NamedTuple):
    """The model and the data of one step.

    Args:
        model: the network, on its device.
        inputs: (B, *shape).
        targets: (B,), class indices.
        autocast: dtype of mixed precision, None for the parameters' own.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    autocast: torch.dtype | None = None

    def losses(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        """Per-example losses (B,)."""
        with torch.autocast(self.inputs.device.type, self.autocast, enabled=self.autocast is not None):
            return F.cross_entropy(model(self.inputs), self.targets, reduction="none")


# name: (shape of an input, classes, builder)
MODELS: dict[str, tuple[tuple[int, ...], int, Callable[..., nn.Module]]] = {
    "mlp": ((1, 28, 28), 10, partial(MLP, hidden=[1024, 1024])),
    "cnn": ((1, 28, 28), 10, CNN),
    "digits_mlp": ((1, 8, 8), 10, partial(MLP, hidden=[64])),
    "deep8": ((256,), 10, partial(MLP, hidden=[256] * 8)),
    "deep24": ((256,), 10, partial(MLP, hidden=[256] * 24)),
    "deep64": ((256,), 10, partial(MLP, hidden=[256] * 64)),
}


def make_problem(name: str, batch_size: int, device: torch.device, precision: str = "32") -> Problem:
    """A model of `MODELS`, or of torchvision by name, with random data.

    Args:
        name: the model's name.
        batch_size: B.
        device: the device of model and data.
        precision: "32", "bf16-mixed" or "bf16-true".

    Raises:
        ValueError: there is no such model.
    """
    torch.manual_seed(0)
    if name in MODELS:
        shape, classes, build = MODELS[name]
        model = build(input_shape=shape, num_classes=classes)
    else:
        shape, classes = (3, 224, 224), 1000
        model = torchvision_model(name, classes)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    model.to(device, dtype)
    inputs = torch.randn(batch_size, *shape, device=device, dtype=dtype)
    targets = torch.randint(classes, (batch_size,), device=device)
    return Problem(model, inputs, targets, torch.bfloat16 if precision == "bf16-mixed" else None)


class Method(NamedTuple):
    """One row of the benchmark: an estimator and its labels.

    Args:
        name: the method's name.
        estimator: the estimator of the step; None with `make_step`.
        tangents: law of its directions, "" if it has none.
        num_tangents: K, 0 if it has no directions.
        compiled: whether the model is compiled.
        make_step: makes a training step that is not fgtrain's, from the problem and K.
    """

    name: str
    estimator: GradientEstimator | None
    tangents: str = ""
    num_tangents: int = 0
    compiled: bool = False
    make_step: Callable[[Problem, int], Callable[[], None]] | None = None


def _forward_pass(problem: Problem, _: int) -> Callable[[], None]:
    """A forward pass without gradients."""

    def step() -> None:
        with torch.no_grad():
            problem.losses(problem.model).mean()

    return step


def _backprop_step(problem: Problem, _: int) -> Callable[[], None]:
    """A step of plain PyTorch, as in any training loop."""
    optimizer = _sgd(problem.model)

    def step() -> None:
        problem.losses(problem.model).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


REFERENCES = (
    Method(FORWARD, None, make_step=_forward_pass),
    Method(BACKPROP, None, make_step=_backprop_step),
)


@dataclass
class Row:
    """One measurement: times in milliseconds, memory in MiB above the parameters, ratios without a unit."""

    model: str
    batch_size: int
    method: str
    tangents: str
    num_tangents: int
    compiled: bool
    step_ms: float
    step_ms_quartiles: tuple[float, float]
    ratio_to_backprop: float
    ratio_to_backprop_quartiles: tuple[float, float]
    ratio_to_forward: float
    peak_mib: float
    peak_to_backprop: float
    peak_to_forward: float
    device: str
    threads: int
    precision: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    name: str,
    batch_size: int,
    methods: Sequence[Method],
    device: torch.device,
    *,
    precision: str = "32",
    rounds: int = 9,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure a step of every method on one model, after `REFERENCES`.

    Args:
        name: the model's name, see `make_problem`.
        batch_size: B.
        methods: the rows besides the references.
        device: the device to use.
        precision: see `make_problem`.
        rounds: the number of turns of each method.
        progress: called with a description of each measurement.
    """
    methods = [*REFERENCES, *methods]
    problem = make_problem(name, batch_size, device, precision)
    compiled = _compiled(problem) if any(method.compiled for method in methods) else problem
    steps = [_step(method, compiled if method.compiled else problem) for method in methods]
    peaks = []
    for method, step in zip(methods, steps, strict=True):
        progress(f"{name} batch {batch_size}: memory of {method.name}")
        step()
        peaks.append(peak_mib(step, device))
    repeats = [max(1, round(0.05 / _seconds(step, 1, device))) for step in steps]
    times: list[list[float]] = [[] for _ in steps]
    for i in range(rounds):
        progress(f"{name} batch {batch_size}: round {i + 1} of {rounds}")
        for measured, step, repeat in zip(times, steps, repeats, strict=True):
            measured.append(_seconds(step, repeat, device))
    described = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rows = []
    for method, taken, peak in zip(methods, times, peaks, strict=True):
        to_backprop = [t / b for t, b in zip(taken, times[1], strict=True)]
        rows.append(
            Row(
                model=name,
                batch_size=batch_size,
                method=method.name,
                tangents=method.tangents,
                num_tangents=method.num_tangents,
                compiled=method.compiled,
                step_ms=1e3 * median(taken),
                step_ms_quartiles=_quartiles([1e3 * t for t in taken]),
                ratio_to_backprop=median(to_backprop),
                ratio_to_backprop_quartiles=_quartiles(to_backprop),
                ratio_to_forward=median(t / f for t, f in zip(taken, times[0], strict=True)),
                peak_mib=peak,
                peak_to_backprop=peak / peaks[1],
                peak_to_forward=peak / peaks[0],
                device=described,
                threads=torch.get_num_threads(),
                precision=precision,
            )
        )
    return rows


def _compiled(problem: Problem) -> Problem:
    """The same problem with a compiled copy of the model.

    Raises:
        ConfigError: torch.compile does not work here.
    """
    model = deepcopy(problem.model)
    compile_model(model, problem.inputs.device)
    return problem._replace(model=model)


def _step(method: Method, problem: Problem) -> Callable[[], None]:
    """A step of the method: its own, or one along its estimated gradient, as in the README's loop."""
    if method.make_step is not None:
        return method.make_step(problem, method.num_tangents)
    estimator = method.estimator
    assert estimator is not None
    model, optimizer = problem.model, _sgd(problem.model)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        estimate = estimator(model, problem.losses, generator=generator)
        write_grads(model, estimate.grads)
        del estimate
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-6)


def _seconds(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Seconds per step, in steps that follow one that is not measured, as in training.

    On one CPU thread it is the time of the process, which other load on the machine changes less.
    """
    is_alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if is_alone else time.perf_counter
    step()
    synchronize(device)
    start = clock()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (clock() - start) / repeats


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4)
    return low, high

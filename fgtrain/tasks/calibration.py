"""Find the parameters of a simulator from noisy observations of its states.

A simulator is a plain function. Its keyword-only arguments are the parameters, and their defaults are the true values:

    def decay(trajectories, times, steps, *, rate=0.5):
        y = torch.linspace(1, 2, trajectories).to(times)
        h, states = (times[1] - times[0]) / steps, [y]
        for _ in times[1:]:
            for _ in range(steps):
                y = y - h * rate * y
            states.append(y)
        return torch.stack(states)

It returns the states (T, ...) at the `times` (T,), with `steps` solver steps between two of them. It may call any
solver, such as torchdiffeq's `odeint`. In a file mine.py it is trained by

    python scripts/train.py task=calibration 'task.system={_target_: mine.decay, _partial_: true}' method=forward_exact

With K directions for K parameters, forward mode has the exact gradient in one pass, in the memory of K + 1 states at
any number of steps; backpropagation stores every step. `fgtrain.tasks.simulators.rk4` is a solver that
`CheckpointedBackprop` cuts into segments, and whose step `task.compile=true` compiles. Another solver has both if its
loop is `y = fgtrain.network.repeated_steps.repeat(step, y, steps)`.
"""

import math
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgtrain.network.compilation import require_compiler
from fgtrain.network.repeated_steps import run_by
from fgtrain.tasks.base import Task
from fgtrain.tasks.simulators import SIMULATORS


class Calibration(Task):
    """Find the parameters of a simulator. The loss is the mean squared error of the observed states.

    Errors are divided by the standard deviation of all true states, so the loss of the true parameters is noise^2. The
    model is a `Guess`.

    Args:
        system: the name of a simulator of `fgtrain.tasks.simulators`, or a function as above.
        trajectories: how many are simulated side by side, from different starting states.
        observations: the number of observed times after the start.
        steps: solver steps between two observed times.
        duration: the last time.
        noise: standard deviation of the noise, in standard deviations of the states.
        seed: of the noise.
        compile: whether to compile a step of the solver, which takes about a minute once; see `repeat`.

    Attributes:
        true: {name of a parameter: its true value}.

    Raises:
        ValueError: an argument is out of its range, the simulator is not a function as above, or its states at the
            true parameters are not finite.
        ConfigError: torch.compile does not work on this machine.

    >>> task = Calibration("pendulum", observations=5, noise=0.0)
    >>> task.true
    {'stiffness': 2.0, 'damping': 0.2}
    >>> task.losses(Guess(task, spread=0.0), None).item() < 1e-9
    True
    """

    advice = "take more steps of the solver (task.steps=...) or a first guess nearer the truth (model.spread=...)"

    def __init__(
        self,
        system: str | Callable[..., Tensor] = "lotka_volterra",
        trajectories: int = 64,
        observations: int = 20,
        steps: int = 50,
        duration: float = 10.0,
        noise: float = 0.05,
        seed: int = 0,
        compile: bool = False,  # noqa: A002 - the name that the command line has elsewhere
    ) -> None:
        for name, value in (("trajectories", trajectories), ("observations", observations), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (0 < duration < math.inf and 0 <= noise < math.inf):
            raise ValueError(f"duration must be positive and noise at least 0, got {duration} and {noise}")
        self.system, self.true = _simulator(system)
        self.name = _name(self.system)
        self.trajectories = trajectories
        self.steps = steps
        self.times = torch.linspace(0, duration, observations + 1, dtype=torch.float64)
        self.compiled: Any = None
        with torch.no_grad():
            states = self.simulate(torch.tensor(list(self.true.values()), dtype=torch.float64))
        if not states.isfinite().all():
            raise ValueError(
                f"the states of {self.name} are not finite at its true parameters; take more steps (task.steps, now "
                f"{steps}) or a shorter duration (task.duration, now {duration:g})"
            )
        self.scale = states.std().item() or 1.0
        draw = torch.randn(states.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.observed = states / self.scale + noise * draw
        if compile:
            from fgtrain.forward_ad.compiled_steps import CompiledSteps  # importing the compiler takes seconds

            require_compiler(torch.device("cpu"), "task.compile=true")
            self.compiled = CompiledSteps()

    def simulate(self, values: Tensor) -> Tensor:
        """The states (T, ...) for the parameters `values` (n,), in the order of `true`.

        Raises:
            ValueError: the simulator does not return a real tensor (T, ...), of one shape for all parameters.
        """
        named = dict(zip(self.true, values.unbind(), strict=True))
        with run_by(self.compiled):
            states = self.system(self.trajectories, self.times.to(values), self.steps, **named)
        if not isinstance(states, Tensor) or not states.is_floating_point() or states.shape[:1] != self.times.shape:
            got = f"{states.dtype} {tuple(states.shape)}" if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(
                f"{self.name} must return a real tensor with one state for each of {len(self.times)} times, got {got}"
            )
        return states

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        predicted = self.simulate(model()) / self.scale
        if predicted.shape != self.observed.shape:
            before, now = tuple(self.observed.shape), tuple(predicted.shape)
            raise ValueError(f"{self.name} must return states of one shape, {before}, but returns {now}; pad them")
        return F.mse_loss(predicted, self.observed.to(predicted))

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        errors = self.relative_errors(model())
        named = {f"error_{name}": error[None] for name, error in zip(self.true, errors.unbind(), strict=True)}
        total = errors.square().mean().sqrt()
        return {"loss": self.losses(model, batch)[None], "parameter_error": total[None], **named}

    def relative_errors(self, values: Tensor) -> Tensor:
        """|value - true| / |true| of every parameter, (n,)."""
        true = values.new_tensor(list(self.true.values()))
        return ((values - true) / true).abs()

    def results(self, model: nn.Module) -> dict[str, Any]:
        """The loss, the errors and the values of the parameters at the end of a run."""
        with torch.no_grad():
            metrics = {name: value.item() for name, value in self.metrics(model, None).items()}
            return {"metrics": metrics, "solution": dict(zip(self.true, model().tolist(), strict=True))}


class Guess(nn.Module):
    """The parameters of a simulator: values first * exp(p) of one trained parameter p (n,), which is 0 at the start.

    So every value keeps its sign, and a step is relative to it.

    Args:
        task: the simulator with the true values.
        spread: the first value is the true one times exp(spread z) with z normal, from the global random state.
    """

    def __init__(self, task: Calibration, spread: float = 0.3) -> None:
        super().__init__()
        if not 0 <= spread < math.inf:
            raise ValueError(f"spread must be at least 0, got {spread}")
        true = torch.tensor(list(task.true.values()))
        self.first: Tensor
        self.register_buffer("first", true * (spread * torch.randn(len(true))).exp())
        self.change = nn.Parameter(torch.zeros(len(true)))

    def forward(self) -> Tensor:
        return self.first * self.change.exp()


def _simulator(system: str | Callable[..., Tensor]) -> tuple[Callable[..., Tensor], dict[str, float]]:
    """The simulator, and the true values of its parameters."""
    if isinstance(system, str):
        if system not in SIMULATORS:
            raise ValueError(
                f"there is no simulator {system}; choose one of {', '.join(SIMULATORS)}, or give a function: "
                "task.system={_target_: mine.simulate, _partial_: true}"
            )
        system = SIMULATORS[system]
    taken = [p for p in signature(system).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
    true = {p.name: p.default for p in taken}
    if not true or not all(isinstance(v, (int, float)) and v and math.isfinite(v) for v in true.values()):
        raise ValueError(
            f"{_name(system)} must have keyword-only parameters whose defaults are the true values, finite and not 0, "
            f"as in def simulate(trajectories, times, steps, *, rate=0.5); it has {signature(system)}"
        )
    return system, {name: float(value) for name, value in true.items()}


def _name(system: Callable[..., Tensor]) -> str:
    return getattr(getattr(system, "func", system), "__name__", "the simulator")

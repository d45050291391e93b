"""A step that is repeated many times, such as a solver's, with or without activation checkpointing or compilation."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from math import isqrt
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Runs(Protocol):
    """Something that repeats a step, such as `fgtrain.forward_ad.compiled_steps.CompiledSteps`."""

    def run(self, step: Callable[[Any], Any], state: Any, num_steps: int) -> Any: ...


_counted: ContextVar[list[int] | None] = ContextVar("_counted", default=None)
_runner: ContextVar[Runs | None] = ContextVar("_runner", default=None)


def repeat(step: Callable[[Any], Any], state: Any, num_steps: int) -> Any:
    """step(step(.. step(state))), `num_steps` times.

    Inside `checkpointed`, as under `CheckpointedBackprop`, only every sqrt(num_steps)-th state is stored, or every
    eighth of fewer than 64, and the backward sweep runs the steps between them again. Inside `run_by`, the steps are
    compiled.
    """
    counted, runner = _counted.get(), _runner.get()
    run = _run if runner is None else runner.run
    if counted is None:
        return run(step, state, num_steps)
    if runner is not None:
        run = torch.compiler.set_stance("default")(run)  # CheckpointedBackprop runs modules uncompiled
    length = max(8, isqrt(num_steps))  # storing a state takes as long as some steps
    for first in range(0, num_steps, length):
        state = checkpoint(run, step, state, min(length, num_steps - first), use_reentrant=False)
        counted.append(first)
    return state


def in_segments(run: Callable[[Tensor, Any], tuple[Tensor, Any]], sequence: Tensor) -> Tensor:
    """The outputs (B, T, ...) of a recurrence on a sequence (B, T), of which the states between segments are stored.

    A segment has sqrt(T) steps, or 100 if that is more, since it costs as much time as about 100 small steps.

    Args:
        run: maps a part of the sequence and a state, None at the start, to the outputs and the next state.
        sequence: the inputs.
    """
    counted, state, found = _counted.get(), None, []
    assert counted is not None
    for part in sequence.split(max(100, isqrt(sequence.shape[1])), 1):
        outputs, state = checkpoint(run, part, state, use_reentrant=False)
        found.append(outputs)
        counted.append(len(found))
    return torch.cat(found, 1)


def _run(step: Callable[[Any], Any], state: Any, num_steps: int) -> Any:
    for _ in range(num_steps):
        state = step(state)
    return state


@contextmanager
def run_by(runner: Runs | None) -> Generator[None]:
    """A context in which `runner` repeats steps; None for a plain loop."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


def is_checkpointed() -> bool:
    """Whether the code runs inside `checkpointed`."""
    return _counted.get() is not None


@contextmanager
def checkpointed() -> Generator[list[int]]:
    """A context in which `repeat` stores few states; the list gets one entry for every stored state."""
    counted: list[int] = []
    token = _counted.set(counted)
    try:
        yield counted
    finally:
        _counted.reset(token)

"""A step that is repeated many times, such as a solver's, with or without activation checkpointing."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from math import isqrt
from typing import Any

from torch.utils.checkpoint import checkpoint

_counted: ContextVar[list[int] | None] = ContextVar("_counted", default=None)


def repeat(step: Callable[[Any], Any], state: Any, num_steps: int) -> Any:
    """step(step(.. step(state))), `num_steps` times.

    Inside `checkpointed`, as under `CheckpointedBackprop`, only every sqrt(num_steps)-th state is stored, or every
    eighth of fewer than 64, and the backward sweep runs the steps between them again.
    """
    counted = _counted.get()
    if counted is None:
        return _run(step, state, num_steps)
    length = max(8, isqrt(num_steps))  # storing a state takes as long as some steps
    for first in range(0, num_steps, length):
        state = checkpoint(_run, step, state, min(length, num_steps - first), use_reentrant=False)
        counted.append(first)
    return state


def _run(step: Callable[[Any], Any], state: Any, num_steps: int) -> Any:
    for _ in range(num_steps):
        state = step(state)
    return state


@contextmanager
def checkpointed() -> Generator[list[int]]:
    """A context in which `repeat` stores few states; the list gets one entry for every stored state."""
    counted: list[int] = []
    token = _counted.set(counted)
    try:
        yield counted
    finally:
        _counted.reset(token)

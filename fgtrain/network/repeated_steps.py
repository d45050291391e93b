"""A step that is repeated many times, such as a solver's, with or without activation checkpointing or compilation."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from math import isqrt
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint, set_checkpoint_early_stop

from fgtrain._torch import tree_leaves
from fgtrain.agreement import agree


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
        state = stored_by_input(run, step, state, min(length, num_steps - first))
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
        outputs, state = stored_by_input(run, part, state)
        found.append(outputs)
        counted.append(len(found))
    return torch.cat(found, 1)


def stored_by_input(run: Callable[..., Any], *args: Any, again: AbstractContextManager[Any] | None = None) -> Any:
    """run(*args), of which only `args` is stored; the backward sweep runs it again, inside `again`.

    Raises:
        CheckpointError: the second run computes something else, which the backward sweep finds.
    """
    first: list[list[Tensor]] = []

    def compared(*args: Any) -> Any:
        results = run(*args)
        sums = _sums(results)
        if not first:
            first.append(sums)
        elif not all(map(agree, sums, first[0])):
            raise CheckpointError("the second run computes something else")
        return results

    with set_checkpoint_early_stop(False):  # the second run has results too
        return checkpoint(
            compared, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again or nullcontext())
        )


@torch.no_grad()
def _sums(results: Any) -> list[Tensor]:
    """The sum of the numbers of every tensor, and the sum of their sizes; 0 instead of nan and inf."""
    parts = [torch.view_as_real(x) if x.is_complex() else x for x in tree_leaves(results) if isinstance(x, Tensor)]
    return [torch.stack([x.sum(), x.abs().sum()]).nan_to_num(0, 0, 0) for x in parts if x.is_floating_point()]


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

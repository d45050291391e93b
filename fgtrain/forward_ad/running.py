"""The pass of stacked duals that runs, and what its parts tell it."""

import threading
from collections.abc import Callable, Container
from typing import Any

from torch import Tensor

from fgtrain.forward_ad.passes import TracedDraws
from fgtrain.forward_ad.registry import tables


class running_pass:  # noqa: N801 - a context manager used like a function
    """A context whose duals carry derivatives.

    Args:
        follows: whether to check that results without tangents have not lost them.
        promoted: tracks plain tensors into which duals are written; None if the model does not do this.
        recorded: tracks tensors that require a gradient; None if the model uses none.
        draws: counts draws of random numbers; None unless the pass is traced.

    Attributes:
        rules: the rules that the pass uses: `RULES`, or none inside `without_rules`.
        short: its short rules, likewise.
        widening: its rules for duals of different numbers of directions, likewise.
        width: the number of directions of the loss, if duals may have fewer; else None.
        aliased_memory: {id of a base tensor: the tensor}. Several duals share this memory with their values, but not
            with their tangents.
        watched: functions after whose calls `saw` is called: see `watch`.
    """

    def __init__(
        self, *, follows: bool = True, promoted: Any = None, recorded: Any = None, draws: TracedDraws | None = None
    ) -> None:
        self.recorded = recorded
        self.follows = follows
        self.promoted = promoted
        self.draws = draws
        self.rules, self.short, self.widening = tables.rules, tables.short, tables.widening
        self.width: int | None = None
        self.aliased_memory: dict[int, Tensor] = {}
        self.watched: Container[Any] = ()
        self.saw: Callable[..., None]

    def __enter__(self) -> "running_pass":
        self._outer, current.running = current.running, self
        return self

    def __exit__(self, *_: object) -> None:
        current.running, self._outer = self._outer, None


class _Current(threading.local):
    """The current pass of a thread."""

    running: running_pass | None = None


current = _Current()
"""Its attribute `running` is the pass that runs in this thread, or None."""


def widen(num: int) -> None:
    """Allow duals with fewer than `num` directions; combined with a dual of more, they get zeros for the others."""
    assert current.running is not None
    current.running.width = num


def watch(funcs: Container[Any], saw: Callable[..., None]) -> bool:
    """Call saw(func, args, kwargs, result) after each call of these functions with a dual; False if no pass runs."""
    if current.running is None:
        return False
    current.running.watched, current.running.saw = funcs, saw
    return True


def is_traced() -> bool:
    """Whether a pass runs to be compiled."""
    return current.running is not None and current.running.draws is not None


def num_traced_draws() -> int:
    """The draws of random numbers so far, if the pass is traced; else 0."""
    running = current.running
    return 0 if running is None or running.draws is None else running.draws.count

"""Rules for the functions of PyTorch that are called with a dual, and fallbacks for those without a rule."""

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from fgtrain._torch import FUNCTION_OWNERS

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
"""Rules for values and tangents; they may return NotImplemented."""

SHORT: dict[Any, Rule] = {}
"""Short rules, called with the pass, the positional and the keyword arguments; they are tried first."""

WIDENING: dict[Any, Rule] = {}
"""Rules for duals that differ in their number of directions; they are tried before the duals get as many."""


class Fallback(NamedTuple):
    """The treatment of a function without a rule.

    Args:
        rule: called with the function's arguments.
        is_opened: whether the rule is the function's own body, whose calls are handled in turn.
        reads: whether the results are never differentiable.
        writes: whether the function changes its first argument in place.
    """

    rule: Rule
    is_opened: bool = False
    reads: bool = False
    writes: bool = False


class _Fallbacks(dict[Any, Fallback]):
    """{function: its fallback}, determined at the first call by `find`, which `rules.fallbacks` sets."""

    find: Callable[[Any], Fallback]

    def __missing__(self, func: Any) -> Fallback:
        self[func] = found = self.find(func)
        return found


FALLBACKS = _Fallbacks()


class _Tables(threading.local):
    """The rules for the passes that a thread starts."""

    rules: Mapping[Any, Rule] = RULES
    short: Mapping[Any, Rule] = SHORT
    widening: Mapping[Any, Rule] = WIDENING


tables = _Tables()


@contextmanager
def without_rules() -> Generator[None]:
    """A context whose passes use no fast rules: slower, with the same results. For tests, and to check a rule.

    Passes of other threads keep their rules.
    """
    before = tables.rules, tables.short, tables.widening
    tables.rules, tables.short, tables.widening = {}, {}, {}
    try:
        yield
    finally:
        tables.rules, tables.short, tables.widening = before


def functions_named(names: str) -> list[Any]:
    """Every function of PyTorch that has one of these names."""
    return [getattr(owner, name) for name in names.split() for owner in FUNCTION_OWNERS if hasattr(owner, name)]


def register(names: str, table: dict[Any, Rule] = RULES) -> Callable[[Rule], Rule]:
    """Make the decorated function the rule of every function of PyTorch with one of these names."""

    def decorate(rule: Rule) -> Rule:
        table.update(dict.fromkeys(functions_named(names), rule))
        return rule

    return decorate

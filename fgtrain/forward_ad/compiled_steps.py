"""A step that a simulation repeats, compiled once together with its derivatives and run in a loop."""

import logging
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, fx

from fgtrain._torch import tree_leaves, tree_map
from fgtrain.agreement import agree
from fgtrain.forward_ad.compiled import CompiledJvp, inductor
from fgtrain.forward_ad.dual import Dual, primal_of, tangent_of
from fgtrain.forward_ad.lost_derivatives import is_differentiable
from fgtrain.forward_ad.passes import UnsupportedByEngine
from fgtrain.network.compilation import OPTIONS

_log = logging.getLogger(__name__)
Step = Callable[[Any], Any]


class CompiledSteps:
    """Runs the steps of simulations compiled; a step that cannot be compiled with its derivatives runs as it is.

    Args:
        backend: as of `CompiledJvp`.
    """

    def __init__(self, backend: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]] = inductor) -> None:
        own = FunctionType(_once.__code__.replace(), _once.__globals__)
        self._plain = torch.compile(own, options=OPTIONS, dynamic=False)
        self._jvp = CompiledJvp(_once, backend)
        self._works = True

    def run(self, step: Step, state: Any, num_steps: int) -> Any:
        """step(step(.. step(state))); the tensors that `step` reads may be duals."""
        tangents: dict[int, Tensor] = {}
        plain = _without_duals(step, tangents)
        if not tangents and not any(isinstance(x, Dual) for x in tree_leaves(state)):
            once = partial(self._plain, step)
        else:
            once = partial(self._along, step, plain, tangents)
        for _ in range(num_steps):
            state = once(state)
        return state

    def _along(self, step: Step, plain: Step, tangents: dict[int, Tensor], state: Any) -> Any:
        """One step of duals. A compiled function is compared with `step` until a finite result has agreed."""
        if not self._works:
            return step(state)
        state = tree_map(lambda x: _as_dual(x, next(iter(tangents.values()))), state) if tangents else state
        moving = tangents | {id(x.primal): tangent_of(x) for x in tree_leaves(state) if isinstance(x, Dual)}
        values = tree_map(lambda x: x.primal if isinstance(x, Dual) else x, state)
        try:
            with torch.compiler.set_stance("default"):  # the pass around it is not compiled
                found, computed = self._jvp(moving, plain, values)
            after = {id(value): tangent for value, tangent in computed}
            found = tree_map(lambda x: x if (t := after.get(id(x))) is None else Dual(x, t), found)
            if self._jvp.confirm is None:
                return found
            expected = step(state)
            if _is_finite(expected):
                _compare(found, expected)
                self._jvp.confirm()
            return expected
        except UnsupportedByEngine as reason:
            self._works = False
            _log.warning("steps of the simulation run uncompiled: %s", str(reason).split("\n")[0])
            return step(state)


def _once(step: Step, state: Any) -> Any:
    return step(state)


def _as_dual(x: Any, like: Tensor) -> Any:
    """A constant of a state with the derivative 0 along as many directions, so that one function serves all steps."""
    if type(x) is not Tensor or not x.is_floating_point():
        return x
    return Dual(x, x.new_zeros(len(like), *x.shape))


def _is_finite(state: Any) -> bool:
    """Whether all numbers of a state and their derivatives are finite."""
    numbers = [t for x in tree_leaves(state) for t in (primal_of(x), tangent_of(x)) if is_differentiable(t)]
    return all(bool(t.isfinite().all()) for t in numbers)


def _compare(found: Any, expected: Any) -> None:
    """Refuse compiled states or derivatives that differ from the uncompiled ones."""
    for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if not (_is_same(primal_of(x), primal_of(y)) and _is_same(tangent_of(x), tangent_of(y))):
            raise UnsupportedByEngine("the compiled derivatives differ")


def _is_same(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor):  # an object may hold tensors, whose derivatives would be lost
        return isinstance(expected, (int, float, complex, str, NoneType)) and found == expected
    same = agree if is_differentiable(expected) else torch.equal
    return isinstance(found, Tensor) and same(found, expected)


def _without_duals(x: Any, tangents: dict[int, Tensor]) -> Any:
    """A copy of a function that reads values in place of duals, whose tangents go to `tangents`."""
    if isinstance(x, Dual):
        tangents[id(x.primal)] = tangent_of(x)
        return x.primal
    if isinstance(x, partial):
        parts = [_without_duals(part, tangents) for part in (x.func, *x.args)]
        return partial(*parts, **{name: _without_duals(part, tangents) for name, part in x.keywords.items()})
    if isinstance(x, (tuple, list)) and type(x) in (tuple, list):
        return type(x)(_without_duals(part, tangents) for part in x)
    if not isinstance(x, FunctionType) or not (x.__closure__ or x.__defaults__):
        return x
    cells = tuple(CellType(_without_duals(cell.cell_contents, tangents)) for cell in x.__closure__ or ())
    copy = FunctionType(x.__code__, x.__globals__, x.__name__, _without_duals(x.__defaults__, tangents), cells)
    copy.__kwdefaults__ = x.__kwdefaults__
    return copy

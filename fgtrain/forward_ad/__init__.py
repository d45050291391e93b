"""Forward-mode automatic differentiation of a whole loss: one pass returns its value and its derivatives.

There are three engines with the same interface. `stacked` computes the value and all K directions in one pass, with
rules for the usual layers. `compiled` turns that pass into one compiled function, for models that were compiled.
`native` is PyTorch's own forward mode, one pass per direction: slower, and the reference for tests of the others. A
pass runs in the fastest engine that can handle it. If an engine fails, the next one repeats the pass with the same
buffers and random numbers, and the log says so once. If no engine can guarantee a derivative, an error names the cause.
Parameters that FSDP2 shards have an engine of their own, `sharded`, which no other replaces.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain._torch import is_compiled, reentrant_checkpoints_replaced
from fgtrain.agreement import agree, agree_but_for_ties, nudge
from fgtrain.errors import NoTangent
from fgtrain.forward_ad import native, sharded, stacked
from fgtrain.forward_ad.passes import NO_TANGENT, LossFn, Unprepared, UnsupportedByEngine
from fgtrain.memory import is_out_of_memory
from fgtrain.network.parameters import ParameterSlots, one_at_a_time, slots_of
from fgtrain.network.sharding import is_sharded
from fgtrain.network.snapshot import LightSnapshot, Snapshot
from fgtrain.tangents.directions import LastTangent, Tangent, num_in

__all__ = ["directional_derivatives", "jvp"]

_log = logging.getLogger(__name__)
AnySnapshot = Snapshot | LightSnapshot
Engine = Callable[[nn.Module, LossFn, Mapping[str, Tangent], AnySnapshot], tuple[Tensor, Tensor]]


def directional_derivatives(
    model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent]
) -> tuple[Tensor, Tensor]:
    """Losses and the K directional derivatives of their mean along `tangents`, without a backward pass.

    Args:
        model: any module. Its parameters and `.grad` do not change. Its buffers and the global random state change as
            in one forward pass.
        loss_fn: maps the model to losses (B,) or ().
        tangents: {parameter name: (K, *p.shape)}, or low-rank tangents; missing parameters have the direction 0.

    Returns:
        losses (B,) or (), and the derivatives (K,).

    Raises:
        UnsupportedOperation: an operation has no forward-mode derivative; the message says where and what to do.
        LossError: the loss depends on no parameter, or is not of shape (B,) or ().
        ValueError: a name is not that of a parameter, a tangent has another shape than its parameter, or tangents
            differ in K.

    The derivative of x^2 at x = 3 along v = 1 is 6:

    >>> model = nn.ParameterDict({"x": torch.tensor(3.0)})
    >>> directional_derivatives(model, lambda m: m["x"] ** 2, {"x": torch.ones(1)})
    (tensor(9.), tensor([6.]))
    """
    _refuse_other_shapes(model, tangents)
    with one_at_a_time, torch.inference_mode(False), torch.no_grad(), reentrant_checkpoints_replaced():
        losses, derivatives = jvp(model, loss_fn, tangents)
    return losses, derivatives if losses.dim() == 0 else derivatives.mean(1)


def _refuse_other_shapes(model: nn.Module, tangents: Mapping[str, Tangent]) -> None:
    params = slots_of(model).params
    shapes = {n: tuple(t.shape) if isinstance(t, Tensor) else (t.num, *t.shape) for n, t in tangents.items()}
    num = next(iter(shapes.values()), ())[:1]
    for name, shape in shapes.items():
        if isinstance(tangents[name], LastTangent):
            num = shape[:1]  # parameters may differ in it
        if name in params and (not num or shape != (*num, *params[name].shape)):
            raise ValueError(
                f"the tangents of {name} have the shape {shape}; give (K, *p.shape), where K is the same for all "
                f"parameters and p.shape is {tuple(params[name].shape)}"
            )


def jvp(model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent]) -> tuple[Tensor, Tensor]:
    """As `directional_derivatives`, with the derivative of every example: losses (B,), derivatives (K, B).

    For estimators, which call it under torch.no_grad().
    """
    slots = slots_of(model)
    if unknown := [name for name in tangents if name not in slots.params]:
        raise ValueError(f"tangents for {', '.join(sorted(unknown))}, which the model's named_parameters() do not list")
    if not tangents:
        raise NoTangent(NO_TANGENT)
    return slots.cached(_Engines, lambda: _Engines(slots)).run(model, slots, loss_fn, tangents)


@dataclass
class _Plan:
    """The engine with which a pass starts.

    Args:
        first: its index in the list of engines.
        left: the number of passes that still start with it before the fastest engine is tried again.
        wait: the value of `left` after the next failure.
    """

    first: int = 0
    left: int = 0
    wait: int = 1


class _Engines:
    """The engines of a model, fastest first; if one fails, the next one runs the pass.

    The conditions of a pass are the number and kind of the directions, the mode, dtype and layout of the model, and
    whether the model is compiled. An engine that failed is tried again under other conditions, and after a number of
    passes that doubles with each failure.
    """

    def __init__(self, slots: ParameterSlots) -> None:
        self._is_sharded = any(is_sharded(p) for p in slots.params.values())
        self._first = next(iter(slots.params.values()))
        self._plans: dict[Any, _Plan] = {}
        self._compiled: Any = None
        self._warned: set[str] = set()

    def run(
        self, model: nn.Module, slots: ParameterSlots, loss_fn: LossFn, tangents: Mapping[str, Tangent]
    ) -> tuple[Tensor, Tensor]:
        """As `jvp`, for a model with these slots."""
        conditions = self._conditions(model, tangents)
        engines, plan = self._engines(compiled=conditions[-1]), self._plans.get(conditions)
        first = plan.first if plan is not None and plan.left else 0
        # If an engine is likely to fail, the state that a pass can change is saved; this takes longer than a step of a
        # small model.
        before = Snapshot(model) if plan is None or first < plan.first else LightSnapshot(slots)
        failures: list[tuple[str, str]] = []
        for i in range(first, len(engines)):
            engine, failure = engines[i]
            try:
                found = engine(model, loss_fn, tangents, before)
            except Exception as reason:
                if i + 1 == len(engines) or is_out_of_memory(reason):
                    raise
                before.restore()
                cause = str(reason).split("\n")[0].partition(", which has no")[0]  # without the advice
                failures.append((failure, cause))
            else:
                for message, cause in failures:
                    self._warn_once(message, type(model).__name__, cause)
                self._plans[conditions] = plan = plan or _Plan()
                if i > first:
                    plan.first, plan.left, plan.wait = i, plan.wait, 2 * plan.wait
                elif i:
                    plan.left -= 1
                else:
                    plan.first = 0
                return found
        raise AssertionError("the last engine returns or raises")

    def _conditions(self, model: nn.Module, tangents: Mapping[str, Tangent]) -> tuple[Any, ...]:
        """The conditions that decide which engines can run, as far as they are known before the pass."""
        first, p = next(iter(tangents.values())), self._first
        return type(first), num_in(first), model.training, p.dtype, p.stride(), is_compiled(model)

    def _engines(self, *, compiled: bool) -> list[tuple[Engine, str]]:
        """(engine, log message for its failure), fastest first."""
        if self._is_sharded:
            return [(_sharded, "")]
        engines = [(_stacked, "%s runs through the slower reference engine: %s"), (_native, "")]
        if not compiled:
            return engines
        if self._compiled is None:
            from fgtrain.forward_ad.compiled import CompiledPass  # importing the compiler takes seconds

            self._compiled = CompiledPass()
        return [(self._run_compiled, "the derivatives of %s are computed uncompiled: %s"), *engines]

    def _run_compiled(
        self, model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent], before: AnySnapshot
    ) -> tuple[Tensor, Tensor]:
        """Run the compiled engine; it is compared with the stacked engine until a finite result has agreed."""
        found = self._compiled(model, loss_fn, tangents, lambda: before.complete(model))
        confirm, dtype = self._compiled.confirm, self._compiled.coarsest
        if confirm is None:
            return found
        before.restore()
        expected = _stacked(model, loss_fn, tangents, before)
        if not all(x.isfinite().all() for x in expected):
            return expected
        if not all(map(partial(agree, dtype=dtype), found, expected)):
            nudged = []
            for engine in (lambda *pass_: self._compiled(*pass_[:3]), _stacked):
                before.restore()  # it refuses frozen parameters that have changed, nudged ones too
                with _nudged([slots_of(model).params[name] for name in tangents]):
                    nudged.append(engine(model, loss_fn, tangents, before))
            before.restore()
            expected = _stacked(model, loss_fn, tangents, before)
            if not all(map(partial(agree_but_for_ties, dtype=dtype), *nudged, expected)):
                raise UnsupportedByEngine("the compiled derivatives differ")
        confirm()
        return expected

    def _warn_once(self, message: str, *parts: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _log.warning(message, *parts)


@contextmanager
def _nudged(params: Iterable[Tensor]) -> Generator[None]:
    """In a `with` block, the values of these parameters are nudged."""
    values = [p.detach() for p in params]
    kept = [value.clone() for value in values]
    try:
        for value in values:
            value.copy_(nudge(value))
        yield
    finally:
        for value, before in zip(values, kept, strict=True):
            value.copy_(before)


def _stacked(
    model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent], before: AnySnapshot
) -> tuple[Tensor, Tensor]:
    return _prepared(stacked.jvp, model, loss_fn, tangents, before)


def _native(
    model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent], before: AnySnapshot
) -> tuple[Tensor, Tensor]:
    return _prepared(native.jvp, model, loss_fn, tangents, before)


def _prepared(
    run: Callable[[nn.Module, LossFn, Mapping[str, Tangent]], tuple[Tensor, Tensor]],
    model: nn.Module,
    loss_fn: LossFn,
    tangents: Mapping[str, Tangent],
    before: AnySnapshot,
) -> tuple[Tensor, Tensor]:
    """Run a pass, again if it has found out what it must be prepared for."""
    for _ in range(3):  # there are at most three such things
        try:
            return run(model, loss_fn, tangents)
        except Unprepared:
            before.restore()
    return run(model, loss_fn, tangents)


def _sharded(
    model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent], _: AnySnapshot
) -> tuple[Tensor, Tensor]:
    return sharded.jvp(model, loss_fn, tangents)

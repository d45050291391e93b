"""Forward-mode automatic differentiation of a whole loss: one pass returns its value and its derivatives.

Three engines answer the same call. `stacked` carries the value and all K directions through one pass, with rules for
the layers networks are made of. `compiled` makes one compiled function of that pass, for models that were compiled.
`native` is PyTorch's own forward mode, one pass per direction: slower, and the reference the others are tested against.
What cannot be compiled is stacked; what stacked duals cannot follow runs through the reference engine.
"""

import logging
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fgtrain.directions import Tangent
from fgtrain.errors import UserError
from fgtrain.forward_ad import native, sharded, stacked
from fgtrain.forward_ad.native import LossFn
from fgtrain.forward_ad.passes import Buffers, NotIntercepted, RandomState, RepeatedPass
from fgtrain.parameters import slots_of
from fgtrain.sharding import is_sharded

__all__ = ["directional_derivatives", "jvp"]

_log = logging.getLogger(__name__)
Engine = Callable[[nn.Module, LossFn, Mapping[str, Tangent]], tuple[Tensor, Tensor]]
_engines: WeakKeyDictionary[nn.Module, Engine] = WeakKeyDictionary()


def directional_derivatives(
    model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent]
) -> tuple[Tensor, Tensor]:
    """Losses and the K directional derivatives of their mean along `tangents`, without a backward pass.

    Args:
        model: any module. Its parameters, `.grad` and the global random state stay as they are; its buffers change as
            by one forward pass.
        loss_fn: maps the model to losses (B,) or ().
        tangents: {parameter name: (K, *p.shape)}, or low-rank forms; parameters left out have the direction 0.

    Returns:
        losses (B,) or (), and the derivatives (K,).

    Raises:
        UnsupportedOperation: an operation has no forward-mode derivative; says where and what to do.
        LossError: the loss depends on no parameter, or is not of shape (B,) or ().
        ValueError: a name that is no parameter.

    The derivative of x^2 at x = 3 along v = 1 is 6:

    >>> model = nn.ParameterDict({"x": torch.tensor(3.0)})
    >>> directional_derivatives(model, lambda m: m["x"] ** 2, {"x": torch.ones(1)})
    (tensor(9.), tensor([6.]))
    """
    losses, derivatives = jvp(model, loss_fn, tangents)
    return losses, derivatives if losses.dim() == 0 else derivatives.mean(1)


def jvp(model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent]) -> tuple[Tensor, Tensor]:
    """As `directional_derivatives`, with the derivative of every example: losses (B,), derivatives (K, B)."""
    slots = slots_of(model)
    if unknown := [name for name in tangents if name not in slots.params]:
        raise ValueError(f"tangents for {', '.join(sorted(unknown))}, which the model's named_parameters() do not list")
    with torch.inference_mode(False), torch.no_grad():
        engine = _engines.get(model)
        if engine is None:
            engine = _engines[model] = _choose_engine(model, loss_fn, tangents, compiled=_is_compiled(model))
        # Kept at every step, so without NumPy's and Python's random states: those take longer than a small model.
        before = Buffers(slots), RandomState({p.device for p in slots.params.values()})
        try:
            return engine(model, loss_fn, tangents)
        except NotIntercepted as reason:  # the model took another path than at its first pass
            for state in before:
                state.restore()
            _warn("the derivatives of %s are taken in a slower way from here on: %s", model, reason)
            engine = _engines[model] = _choose_engine(model, loss_fn, tangents, compiled=False)
            return engine(model, loss_fn, tangents)


def _choose_engine(model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent], *, compiled: bool) -> Engine:
    """The fastest engine that the model's pass goes through; the trials leave no trace."""
    if any(is_sharded(p) for p in slots_of(model).params.values()):
        return sharded.jvp
    before = RepeatedPass(model)

    def trial(engine: Engine) -> tuple[Tensor, Tensor]:
        try:
            return engine(model, loss_fn, tangents)
        finally:
            before.rewind()

    try:
        expected = trial(stacked.jvp)
    except UserError:
        raise
    except Exception as reason:  # whatever stands in the fast engine's way, the reference decides what is wrong
        _warn("%s runs through the slower reference engine: %s", model, reason)
        return native.jvp
    if not compiled:
        return stacked.jvp
    from fgtrain.forward_ad.compiled import CompiledPass  # importing the compiler takes seconds

    engine = CompiledPass()
    try:
        found = trial(engine)
    except Exception as reason:
        _warn("the derivatives of %s are taken uncompiled: %s", model, reason)
        return stacked.jvp
    if not all(map(_agree, found, expected)):
        _warn("the derivatives of %s are taken uncompiled: %s", model, "compiled, they are others")
        return stacked.jvp
    return engine


def _is_compiled(model: nn.Module) -> bool:
    """Whether the user asked for it: `model.compile()` or `torch.compile(model)`."""
    return model._compiled_call_impl is not None or hasattr(model, "_orig_mod")


def _warn(message: str, model: nn.Module, reason: object) -> None:
    _log.warning(message, type(model).__name__, str(reason).split("\n")[0])


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether they differ by what rounding can do in half precision at most."""
    return found.shape == expected.shape and bool((found - expected).norm() <= 0.05 * expected.norm())

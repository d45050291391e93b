"""The fast engine: one pass of stacked dual numbers for the value and all K directions."""

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fgtrain.forward_ad.rules.arithmetic
import fgtrain.forward_ad.rules.composed_lists
import fgtrain.forward_ad.rules.composed_losses
import fgtrain.forward_ad.rules.composed_scatter
import fgtrain.forward_ad.rules.fallbacks
import fgtrain.forward_ad.rules.last_direction
import fgtrain.forward_ad.rules.layers
import fgtrain.forward_ad.rules.losses
import fgtrain.forward_ad.rules.matrix_products
import fgtrain.forward_ad.rules.operations
import fgtrain.forward_ad.rules.sampling
import fgtrain.forward_ad.rules.sequence
import fgtrain.forward_ad.rules.short
import fgtrain.forward_ad.rules.views  # noqa: F401 - these register their rules and bodies
from fgtrain._torch import eager_functions, plain_tensors
from fgtrain.errors import NoTangent
from fgtrain.forward_ad.dual import Dual, primal_of, tangent_of
from fgtrain.forward_ad.named_errors import named_errors
from fgtrain.forward_ad.passes import (
    NO_TANGENT,
    LossFn,
    UnsupportedByEngine,
    UsesRecorded,
    WritesIntoPlain,
    WritesWider,
    check_losses,
)
from fgtrain.forward_ad.promoted import PromotedTensors
from fgtrain.forward_ad.recorded import RecordedTensors, depends_on_duals
from fgtrain.forward_ad.running import running_pass
from fgtrain.forward_ad.stale import as_stale, release
from fgtrain.network.parameters import ParameterSlots, slots_of
from fgtrain.tangents.directions import Tangent, all_dense, padded, width_of


@dataclass
class _Known:
    """Facts about a model from its earlier passes.

    Args:
        duals: {name: parameter as a dual}.
        uses_recorded: whether the model uses plain tensors that require a gradient.
        writes_into_plain: whether the model writes duals into plain tensors.
        writes_wider: whether it writes duals into those of fewer directions.
    """

    duals: dict[str, Dual] = field(default_factory=dict)
    uses_recorded: bool = False
    writes_into_plain: bool = False
    writes_wider: bool = False


def jvp(model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent]) -> tuple[Tensor, Tensor]:
    """Losses (B,) or () and their derivatives (K, B) or (K,), as `fgtrain.forward_ad.jvp`.

    Raises:
        Unprepared: the model does something for the first time that the next pass, which is prepared, handles.
        UnsupportedByEngine: the model does something that stacked duals cannot handle.
    """
    values, derivatives = evaluate(model, loss_fn, tangents)
    if derivatives is None:
        raise NoTangent(NO_TANGENT)
    return values, derivatives


def evaluate(
    model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Any], *, follows: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As `jvp`; the derivatives are None if the loss carries none.

    Args:
        model: as in `jvp`.
        loss_fn: as in `jvp`.
        tangents: as in `jvp`, or other objects that rules can handle.
        follows: as in `running_pass`.
    """
    slots = slots_of(model)
    known = slots.cached(_Known, _Known)
    promoted = PromotedTensors() if known.writes_into_plain else None
    recorded = RecordedTensors() if known.uses_recorded else None
    with running_pass(follows=follows, promoted=promoted, recorded=recorded) as running:
        running.width = width_of(tangents)
        if running.width is not None and known.writes_wider:
            tangents = all_dense(tangents)
        duals = _parameter_duals(slots, known.duals, tangents)
        references = sys.getrefcount(running)
        try:
            with (
                named_errors(model),
                eager_functions(),
                slots.params_replaced(duals),
                torch.enable_grad(),  # so that a custom autograd.Function is detected, see `primal_of`
                promoted or nullcontext(),
                recorded or nullcontext(),
            ):
                found = loss_fn(model)
            found = found if promoted is None else promoted.dual_of(found)
            if recorded is not None and isinstance(found, Tensor):
                found = recorded.dual_of(found)
            with plain_tensors():
                losses, derivatives = check_losses(primal_of(found)), tangent_of(found)
            if derivatives is not None and running.width is not None:
                derivatives = padded(derivatives, running.width)
            del found
        except UsesRecorded as reason:
            if known.uses_recorded:
                raise UnsupportedByEngine(str(reason)) from reason
            known.uses_recorded = True
            raise
        except WritesIntoPlain:
            known.writes_into_plain = True
            raise
        except WritesWider:
            known.writes_wider = True
            raise
        finally:
            if known.uses_recorded or sys.getrefcount(running) > references:  # duals of this pass are still alive
                _release(model, slots, duals)
            for dual in duals.values():
                dual.tangent = None  # duals are cached, directions are freed
    return losses, derivatives


def _release(model: nn.Module, slots: ParameterSlots, duals: Mapping[str, Dual]) -> None:
    """Replace duals that the model has stored: by its parameters if they stand for these, else by marked values."""
    names = {id(dual): name for name, dual in duals.items()}

    def replacement(x: Tensor) -> Tensor | None:
        if not isinstance(x, Dual):
            return as_stale(x) if depends_on_duals(x) else None
        return slots.params[names[id(x)]] if id(x) in names else as_stale(x.primal)

    release(model, replacement)


def _parameter_duals(slots: ParameterSlots, cache: dict[str, Dual], tangents: Mapping[str, Any]) -> dict[str, Dual]:
    """The parameters as duals; only those whose memory has moved are created again."""
    for name, tangent in tangents.items():
        p, dual = slots.params[name], cache.get(name)
        if dual is None or dual.primal.data_ptr() != p.data_ptr():
            cache[name] = dual = Dual(p.detach(), tangent)
        dual.renew(tangent)
    return {name: cache[name] for name in tangents}

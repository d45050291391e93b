"""The fast engine: one pass of stacked dual numbers for the value and all K directions."""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import fgtrain.forward_ad.layers
import fgtrain.forward_ad.losses
import fgtrain.forward_ad.products
import fgtrain.forward_ad.sequence  # noqa: F401 - these four register their rules
from fgtrain.directions import Tangent
from fgtrain.errors import LossError
from fgtrain.forward_ad.dual import Dual, primal_of, tangent_of
from fgtrain.forward_ad.native import NO_TANGENT, eager_functions, named_errors
from fgtrain.forward_ad.passes import check_losses
from fgtrain.parameters import ParameterSlots, slots_of


def jvp(model: nn.Module, loss_fn: Callable[[Any], Tensor], tangents: Mapping[str, Tangent]) -> tuple[Tensor, Tensor]:
    """Losses (B,) or () and their derivatives (K, B) or (K,), as `fgtrain.forward_ad.jvp`.

    Raises:
        NotIntercepted: the model does what stacked duals cannot follow.
    """
    values, derivatives = evaluate(model, loss_fn, tangents)
    if derivatives is None:
        raise LossError(NO_TANGENT)
    return values, derivatives


def evaluate(
    model: nn.Module, loss_fn: Callable[[Any], Tensor], tangents: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """As `jvp`; None for the derivatives where the loss carries none."""
    slots = slots_of(model)
    duals = _parameter_duals(slots, tangents)
    try:
        with named_errors(model), eager_functions(), slots.exchanged(duals), torch.enable_grad():
            # Gradients are enabled so that a custom autograd.Function leaves its mark, see `primal_of`.
            found = loss_fn(model)
        with torch._C.DisableTorchFunctionSubclass():
            return check_losses(primal_of(found)), tangent_of(found)
    finally:
        for dual in duals.values():
            dual.tangent = None  # the duals are kept, the directions are not


def _parameter_duals(slots: ParameterSlots, tangents: Mapping[str, Any]) -> dict[str, Dual]:
    """The parameters as duals; made anew only for those that have moved in memory."""
    kept = _duals.setdefault(slots, {})
    for name, tangent in tangents.items():
        p, dual = slots.params[name], kept.get(name)
        if dual is None or dual.primal.data_ptr() != p.data_ptr():
            kept[name] = dual = Dual(p.detach(), tangent)
        dual.tangent, dual.aliased = tangent, False
    return {name: kept[name] for name in tangents}


_duals: WeakKeyDictionary[ParameterSlots, dict[str, Dual]] = WeakKeyDictionary()

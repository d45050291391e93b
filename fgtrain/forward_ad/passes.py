"""What all passes of a loss function share: the checks of its result, and the errors of an engine."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain._torch import TorchDispatchMode
from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.forward_ad.named_errors import named_errors
from fgtrain.forward_ad.stale import graph_of
from fgtrain.network.as_parameter import as_parameter
from fgtrain.network.parameters import slots_of

LossFn = Callable[[Any], Tensor]
"""Maps a model to per-example losses (B,), or to a scalar ()."""

NO_TANGENT = (
    "the loss carries no tangent: it depends on no trainable parameter, or the model left PyTorch's forward-mode AD "
    "(.detach(), .item(), NumPy); check that loss_fn uses the model it is given"
)

LOSS_SHAPE = "loss_fn must return per-example losses of shape (B,) or a scalar ()"


def check_losses(losses: object) -> Tensor:
    """Return `losses` if they are a floating-point tensor (B,) or ().

    Raises:
        LossError: they are not.
    """
    if not isinstance(losses, Tensor):
        raise LossError(f"{LOSS_SHAPE}, got a {type(losses).__name__}")
    if losses.dim() > 1 or losses.numel() == 0:
        remedy = "reduce it, for example with .flatten(1).mean(1)" if losses.numel() else "the batch is empty"
        raise LossError(f"{LOSS_SHAPE}, got shape {tuple(losses.shape)}; {remedy}")
    if not losses.is_floating_point():
        raise LossError(f"{LOSS_SHAPE} of a floating dtype, got {losses.dtype}")
    return losses


def require_repetition(before: Tensor | None, now: Tensor) -> None:
    """Refuse losses that differ from those of the pass before, which had other directions; None before the first.

    Raises:
        UnsupportedOperation: they differ by more than rounding.
    """
    if before is None:
        return
    tolerance = torch.finfo(now.dtype).eps ** 0.5
    if before.shape != now.shape or not torch.allclose(before, now, rtol=tolerance, equal_nan=True):
        raise UnsupportedOperation(
            "the loss changes when its pass is repeated: the model or loss_fn changes its inputs or a state, such as "
            "the position of an iterator; let one pass carry all directions (num_tangents=1, or chunk_size=None)"
        )


def plain_losses(model: nn.Module, loss_fn: LossFn, values: Mapping[str, Tensor] | None = None) -> Tensor:
    """Losses (B,) or () of the model without a graph, with `values` in place of some of its parameters.

    Gradients are enabled, as in training, so the loss itself may differentiate with respect to its inputs.

    Raises:
        UnsupportedOperation: the loss uses parameters past the model, or changes their `requires_grad`.
    """
    slots = slots_of(model)
    stand_ins = {name: as_parameter(value, name, slots.params[name]) for name, value in (values or {}).items()}
    with torch.enable_grad(), slots.params_replaced(stand_ins), named_errors(model) if values else nullcontext():
        losses = check_losses(loss_fn(model))
    if values and losses.requires_grad:
        _refuse_originals(losses, slots.params)
    return losses.detach()


def _refuse_originals(losses: Tensor, params: Mapping[str, Tensor]) -> None:
    """Refuse losses that depend on the parameters themselves and not only on what stands for them."""
    names = {id(p): name for name, p in params.items()}
    for node in graph_of(losses, set()):
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            raise UnsupportedOperation(
                f"the loss function uses '{name}' past the model, where this method cannot move it; read it "
                "from the model that loss_fn is given, inside loss_fn, or train with ForwardGradient"
            )


class UnsupportedByEngine(Exception):
    """The pass does something that this engine cannot handle; a slower one may."""


class Unprepared(UnsupportedByEngine):
    """The pass does something that the engine can handle only if it knows beforehand; the next pass is prepared."""


class UsesRecorded(Unprepared):
    """The pass uses a plain tensor that requires a gradient, such as the result of a custom autograd.Function."""


class Differentiates(Unprepared):
    """The loss differentiates with respect to parameters, or to what depends on them."""


class WritesIntoPlain(Unprepared):
    """The pass writes a dual into a tensor without a tangent."""


class WritesWider(Unprepared):
    """The pass writes a dual into one with fewer directions, whose memory other duals may share."""


class TracedDraws(TorchDispatchMode):
    """Counts draws of random numbers while a pass is traced, since they cannot be repeated then.

    Attributes:
        count: the number of draws so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))

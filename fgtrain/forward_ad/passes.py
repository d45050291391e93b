"""Checks of a loss function for every engine, and repeated passes that leave the state of a single pass."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain._torch import TorchDispatchMode, foreach_norm
from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.forward_ad.kept import Attributes
from fgtrain.network.parameters import ParameterSlots, slots_of
from fgtrain.network.sharding import is_sharded
from fgtrain.random import random_state, set_random_state

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


def plain_losses(
    model: nn.Module, loss_fn: Callable[[Any], Tensor], values: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Losses (B,) or () of the model without a graph, with `values` in place of some of its parameters.

    Gradients are enabled, as in training, so the loss itself may differentiate with respect to its inputs.
    """
    with torch.enable_grad(), slots_of(model).exchanged(values or {}):
        return check_losses(loss_fn(model)).detach()


class NotIntercepted(Exception):
    """The pass does something that this engine cannot handle; a slower one may."""


class Unprepared(NotIntercepted):
    """The pass does something that the engine can handle only if it knows beforehand; the next pass is prepared."""


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


class TorchRandomState:
    """PyTorch's global random state, of the CPU and of the CUDA devices in `devices`."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class Buffers:
    """The buffers of a model (BatchNorm statistics) and their values."""

    def __init__(self, slots: ParameterSlots) -> None:
        self._buffers = [(held, dict(held)) for held in slots.buffers if held]
        self._values = [b.clone() for _, buffers in self._buffers for b in buffers.values() if b is not None]

    def restore(self) -> None:
        """Restore the values; `.data` avoids a version change, which autograd would report as an in-place change."""
        values = iter(self._values)
        for held, buffers in self._buffers:
            held.update(buffers)
            for buffer in buffers.values():
                if buffer is not None:
                    buffer.data.copy_(next(values))


class LightPass:
    """As `RepeatedPass`, but does not restore attributes or the random states of NumPy and Python."""

    def __init__(self, slots: ParameterSlots) -> None:
        self._buffers = Buffers(slots)
        self._random_state = TorchRandomState({p.device for p in slots.params.values()})

    def rewind(self) -> None:
        self._buffers.restore()
        self._random_state.restore()


class RepeatedPass:
    """Lets a model run several times with the side effects of one run.

    Each `rewind` restores the buffers (BatchNorm statistics), the modules' other attributes and the random state
    (Dropout masks) from construction. So every pass evaluates the same function, and the last one leaves the state that
    a single forward pass leaves.

    Frozen parameters are not copied, so a pass that changes one, such as the weights of a teacher, is refused.
    """

    def __init__(self, model: nn.Module) -> None:
        self._frozen = {
            name: p
            for name, p in slots_of(model).params.items()
            if not p.requires_grad and p.is_floating_point() and not is_sharded(p)
        }
        self._norms = self._norms_of_frozen()
        self._buffers = Buffers(slots_of(model))
        self._attributes = Attributes(model)
        self._random_state = random_state()

    def rewind(self) -> None:
        """Restore the state.

        Raises:
            UnsupportedOperation: a pass has changed a frozen parameter.
        """
        self._attributes.restore()
        self._buffers.restore()
        self.rewind_random_state()
        changed = [
            (now != before) & ~now.isnan() for before, now in zip(self._norms, self._norms_of_frozen(), strict=True)
        ]
        if changed and torch.stack([c.to(changed[0].device) for c in changed]).any():  # one synchronisation
            name = next(name for name, is_changed in zip(self._frozen, changed, strict=True) if is_changed)
            raise UnsupportedOperation(
                f"the loss function changes '{name}', which is not trained, but this method calls it several times "
                "a step; change it after the step, for example in on_train_batch_end"
            )

    def _norms_of_frozen(self) -> Sequence[Tensor]:
        return foreach_norm([p.detach() for p in self._frozen.values()], 2) if self._frozen else ()

    def rewind_random_state(self) -> None:
        set_random_state(self._random_state)

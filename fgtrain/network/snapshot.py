"""A snapshot of what a forward pass may change in a model: buffers, other attributes, random states.

A loss that runs several times starts each time from the same snapshot. So every pass evaluates the same function, and
the last one leaves the state that a single forward pass leaves.
"""

import functools
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain._torch import foreach_copy, foreach_norm
from fgtrain.errors import UnsupportedOperation
from fgtrain.network.parameters import ParameterSlots, slots_of
from fgtrain.network.sharding import is_sharded
from fgtrain.random import random_state, set_random_state, states_of

OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_buffers"}
"""The names of the attributes that every module has."""


class Snapshot:
    """The state of a model: buffers (BatchNorm statistics), other attributes, and the random state (Dropout masks).

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

    def restore(self) -> None:
        """Restore the state.

        Raises:
            UnsupportedOperation: a pass has changed a frozen parameter.
        """
        self._attributes.restore()
        self._buffers.restore()
        self.restore_random_state()
        changed = [
            (now != before) & ~now.isnan() for before, now in zip(self._norms, self._norms_of_frozen(), strict=True)
        ]
        if changed and torch.stack([c.to(changed[0].device) for c in changed]).any():  # one synchronisation
            name = next(name for name, is_changed in zip(self._frozen, changed, strict=True) if is_changed)
            raise UnsupportedOperation(
                f"the loss function changes '{name}', which is not trained, but this method calls it several times "
                "a step; change it after the step, for example in on_train_batch_end"
            )

    def complete(self, model: nn.Module) -> None:
        """As `LightSnapshot.complete`; nothing is missing."""

    def _norms_of_frozen(self) -> Sequence[Tensor]:
        return foreach_norm([p.detach() for p in self._frozen.values()], 2) if self._frozen else ()

    def restore_random_state(self) -> None:
        set_random_state(self._random_state)


class LightSnapshot:
    """As `Snapshot`, but does not restore attributes or the random states of NumPy and Python, unless completed."""

    def __init__(self, slots: ParameterSlots) -> None:
        self._buffers = Buffers(slots)
        self._random_state = TorchRandomState({p.device for p in slots.params.values()})
        self._rest: Snapshot | None = None

    def complete(self, model: nn.Module) -> None:
        """Save the rest of the state, too, before any of it has changed."""
        self._rest = Snapshot(model)

    def restore(self) -> None:
        if self._rest is not None:
            self._rest.restore()
        self._buffers.restore()
        self._random_state.restore()


class Buffers:
    """The buffers of a model (BatchNorm statistics) and their values."""

    def __init__(self, slots: ParameterSlots) -> None:
        self._buffers = [(held, dict(held)) for held in slots.buffers if held]
        present = [b for _, buffers in self._buffers for b in buffers.values() if b is not None]
        self._values = [torch.empty_like(b) for b in present]
        if present:
            foreach_copy(self._values, present)

    def restore(self) -> None:
        """Restore the values; `.data` avoids a version change, which autograd would report as an in-place change."""
        values = iter(self._values)
        for held, buffers in self._buffers:
            held.update(buffers)
            for buffer in buffers.values():
                if buffer is not None:
                    buffer.data.copy_(next(values))


class TorchRandomState:
    """PyTorch's global random state, of the CPU and of the CUDA devices in `devices`."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class Attributes:
    """A copy of the attributes of a model's modules, with the contents of their containers, tensors and generators.

    An object of a user's own class, such as a schedule or an average, is copied in the same way.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (attributes, {name: attributes[name] for name in attributes.keys() - OF_EVERY_MODULE})
            for attributes in map(vars, model.modules())
        ]
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._objects: set[int] = set()
        self._note([value for _, before in self._before for value in before.values()])
        values = [value for _, before in self._before for value in before.values()]
        self._generators = [(restore, state) for x in values for restore, state in states_of(x)]
        self._tensors = [(x, x._version, x.detach().clone()) for x in values if type(x) is Tensor and x.grad_fn is None]

    def _note(self, found: list[Any]) -> None:
        """Note the contents of the containers and of the user's objects found, and of those in them."""
        for x in found:  # which grows
            if type(x) in _ATOMS:
                continue
            if isinstance(x, (dict, list, set, deque)):
                if id(x) not in self._containers:
                    self._containers[id(x)] = x, dict(x) if isinstance(x, dict) else list(x)
                    found += x.values() if isinstance(x, dict) else x
            elif id(x) not in self._objects and _is_of_user(type(x)) and hasattr(x, "__dict__"):
                self._objects.add(id(x))
                self._before.append((vars(x), dict(vars(x))))
                found += vars(x).values()

    def restore(self) -> None:
        """Restore the attributes that have changed."""
        for attributes, before in self._before:
            for name in attributes.keys() - OF_EVERY_MODULE - before.keys():
                del attributes[name]
            for name, value in before.items():
                if attributes.get(name, attributes) is not value:
                    attributes[name] = value
        for container, content in self._containers.values():
            if not _same(container, content):
                container.clear()
                container.update(content) if isinstance(container, (dict, set)) else container.extend(content)
        for restore, state in self._generators:
            restore(state)
        for x, version, value in self._tensors:
            if x._version != version:
                x.data.copy_(value)


_ATOMS = frozenset({bool, int, float, str, type(None)})
_LIBRARIES = sys.stdlib_module_names | {"fgtrain", "lightning", "torch"}
_WITHOUT_STATE = {"abc", "collections.abc", "typing"}  # bases of a user's classes


@functools.cache
def _is_of_user(cls: type) -> bool:
    """Whether a user wrote a class and its bases: none with a state is of Python or of an installed package."""
    return not any(map(_is_of_library, cls.__mro__[:-1]))


def _is_of_library(cls: type) -> bool:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
    is_known = cls.__module__.partition(".")[0] in _LIBRARIES and cls.__module__ not in _WITHOUT_STATE
    return is_known or "-packages" in file


def _same(now: Any, before: Any) -> bool:
    """Whether a container holds the objects of a dictionary or, if it is not one itself, of a list."""
    if isinstance(now, dict):
        return len(now) == len(before) and all(key in before and before[key] is value for key, value in now.items())
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))

"""The parameters of a model, found once and exchanged for a forward pass.

Walking a model's modules costs more than a small layer's arithmetic, so what was found is kept for as long as the model
is built the same way.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fgtrain.errors import ModelError

T = TypeVar("T")

one_at_a_time = threading.RLock()
"""Held during an estimate: levels of forward mode and random numbers belong to the process, not to a thread."""


class ParameterSlots:
    """Where a model keeps its parameters.

    Args:
        model: any module.

    Attributes:
        params: {name: parameter}, as named_parameters() lists them: tied ones once.
        buffers: {name: buffer} of every module, the dictionaries in which the modules hold them.

    Raises:
        ModelError: a parameter has no numbers yet: that of a lazy module, or on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.params: dict[str, nn.Parameter] = dict(model.named_parameters())
        _require_numbers(model, self.params)
        names = {id(p): name for name, p in self.params.items()}
        # The dictionaries, not the modules: what is kept here must not keep the model alive.
        self.buffers: list[dict[str, Tensor | None]] = [module._buffers for module in model.modules()]
        self._parts = [(module._parameters, module._modules) for module in model.modules()]
        self._places = [
            (held, key, names[id(p)]) for held, _ in self._parts for key, p in held.items() if p is not None
        ]
        self._fingerprint = self._take_fingerprint()
        self._kept: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def _take_fingerprint(self) -> list[str | int]:
        """What is where: taken at every step, so names and ids in one flat list."""
        found: list[str | int] = []
        for held, children in self._parts:
            if held:
                found += held
                found += map(id, held.values())
            if children:
                found += children
                # A module is known by its dictionary, which is kept here: the id of one that is gone may come again.
                found += [id(child if child is None else child._parameters) for child in children.values()]
        return found

    def is_current(self) -> bool:
        """Whether the model still has the same parameters in the same places."""
        return self._take_fingerprint() == self._fingerprint

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters with requires_grad=True."""
        return {name: p for name, p in self.params.items() if p.requires_grad}

    def kept(self, owner: Any, make: Callable[[], T]) -> T:
        """What `owner` knows about this model: made at the first call, forgotten when the model changes.

        Args:
            owner: a function, class or estimator.
            make: called once for it.
        """
        try:
            return self._kept[owner]
        except KeyError:
            return self._kept.setdefault(owner, make())

    def exchanged(self, values: Mapping[str, Tensor]) -> "_Exchanged":
        """A context in which the model has `values` for parameters; those left out are detached."""
        return _Exchanged(self._places, self.params, values)


class _Exchanged:
    def __init__(self, places: Any, params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        self._places = places
        self._params = params
        self._values = values

    def __enter__(self) -> None:
        values = {name: self._values[name] if name in self._values else p.detach() for name, p in self._params.items()}
        for held, key, name in self._places:
            held[key] = values[name]

    def __exit__(self, *_: object) -> None:
        for held, key, name in self._places:
            held[key] = self._params[name]


_slots: WeakKeyDictionary[nn.Module, ParameterSlots] = WeakKeyDictionary()


def slots_of(model: nn.Module) -> ParameterSlots:
    """The model's slots, found anew only when the model has changed."""
    slots = _slots.get(model)
    if slots is None or not slots.is_current():
        slots = _slots[model] = ParameterSlots(model)
    return slots


def trainable_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained: requires_grad=True, tied ones once.

    Raises:
        ModelError: there is none, or the parameters, also those that are not trained, are on several devices.
    """
    slots = slots_of(model)
    params = slots.trainable()
    if not params:
        raise ModelError(f"{type(model).__name__} has no parameter with requires_grad=True: nothing to train")
    devices = {p.device for p in slots.params.values()}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise ModelError(f"the parameters must be on one device, got {names}; move the model with .to()")
    return params


def _require_numbers(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    for name, p in params.items():
        if is_lazy(p):
            raise ModelError(
                f"{type(model).__name__} has not been run: '{name}' has no shape yet; call it on a batch first"
            )
        if p.is_meta:
            raise ModelError(
                f"'{name}' of {type(model).__name__} is on the meta device; give it numbers with .to_empty()"
            )

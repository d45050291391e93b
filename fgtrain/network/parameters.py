"""The parameters of a model, found once and replaced during a forward pass.

A walk over a model's modules takes longer than the arithmetic of a small layer, so its result is kept until the
structure of the model changes.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fgtrain._torch import GLOBAL_BACKWARD_HOOKS, backward_hooks, gradient_hooks
from fgtrain.errors import ModelError
from fgtrain.network.as_parameter import as_parameter, is_held_constant, refuse_freezing

T = TypeVar("T")

one_at_a_time = threading.RLock()
"""Held during an estimate, because forward-mode levels and random states belong to the process, not to a thread."""


class ParameterSlots:
    """The places where a model stores its parameters.

    Args:
        model: any module.

    Attributes:
        params: {name: parameter} from named_parameters(), tied parameters once.
        buffers: {name: buffer} of every module, the dictionaries in which the modules store them.

    Raises:
        ModelError: a parameter has no values yet: it belongs to a lazy module or is on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.params: dict[str, nn.Parameter] = dict(model.named_parameters())
        _require_numbers(model, self.params)
        names = {id(p): name for name, p in self.params.items()}
        # The dictionaries, not the modules, so that the model can be freed.
        self.buffers: list[dict[str, Tensor | None]] = [module._buffers for module in model.modules()]
        self._backward_hooks = [
            *GLOBAL_BACKWARD_HOOKS,
            *(d for module in model.modules() for d in backward_hooks(module)),
        ]
        self._parts: list[tuple[dict[str, Any], Any]] = [
            (module._parameters, module._modules) for module in model.modules()
        ]
        self._places = [
            (held, key, names[id(p)]) for held, _ in self._parts for key, p in held.items() if p is not None
        ]
        self._held = [held for held, _ in self._parts]
        self._num_held = sum(map(len, self._held))
        self._fingerprint = self._take_fingerprint()
        self._cache: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def _take_fingerprint(self) -> list[str | int]:
        """The names and ids of all parts; one flat list, because it is made at every step."""
        found: list[str | int] = []
        for held, children in self._parts:
            if held:
                found += held.keys()
                found += map(id, held.values())
            if children:
                found += children.keys()
                # A module is identified by its dictionary, which is kept here, since the id of a freed module may
                # recur.
                found += [id(child if child is None else child._parameters) for child in children.values()]
        return found

    def is_current(self) -> bool:
        """Whether the model still has the same parameters in the same places."""
        return self._take_fingerprint() == self._fingerprint

    def has_backward_hooks(self) -> bool:
        """Whether a backward pass through a module would call a hook."""
        return any(self._backward_hooks)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters with requires_grad=True."""
        return {name: p for name, p in self.params.items() if p.requires_grad}

    def cached(self, owner: Any, make: Callable[[], T]) -> T:
        """A value that `owner` caches with this model: computed at the first call, discarded when the model changes.

        Args:
            owner: a function, class or estimator.
            make: computes the value.
        """
        try:
            return self._cache[owner]
        except KeyError:
            return self._cache.setdefault(owner, make())

    def params_replaced(self, values: Mapping[str, Tensor]) -> "_ParamsReplaced":
        """A context in which `values` replace the model's parameters, and constants those without a value.

        Raises:
            UnsupportedOperation: within it, `requires_grad` of a parameter was changed.
        """
        return _ParamsReplaced(self, values)

    def replace_by(self, values: Mapping[str, Tensor]) -> None:
        """Store `values` in the places of the parameters; a pass may have stored others under more names."""
        for held, key, name in self._places:
            held[key] = values[name]
        if sum(map(len, self._held)) != self._num_held:
            for held in self._held:
                for key in [key for key, p in held.items() if hasattr(p, "param_name")]:
                    del held[key]


class _ParamsReplaced:
    def __init__(self, slots: ParameterSlots, values: Mapping[str, Tensor]) -> None:
        self._slots = slots
        self._params = slots.params
        self._values = values

    def __enter__(self) -> None:
        self._trained = [p.requires_grad for p in self._params.values()]
        for name, value in self._values.items():
            if not isinstance(value, nn.Parameter):  # it is from now on, by the mark `_is_param`
                vars(value).update(vars(self._params[name]), _is_param=True, param_name=name)
        self._slots.replace_by(
            {
                name: self._values[name] if name in self._values else as_parameter(p.detach(), name, p)
                for name, p in self._params.items()
            }
        )

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._slots.replace_by(self._params)
        if error is None:  # the loss may hold the parameters themselves
            for (name, p), trained in zip(self._params.items(), self._trained, strict=True):
                if p.requires_grad != trained:
                    p.requires_grad = trained
                    if not is_held_constant(p):
                        refuse_freezing(name, not trained)


_slots: WeakKeyDictionary[nn.Module, ParameterSlots] = WeakKeyDictionary()


def slots_of(model: nn.Module) -> ParameterSlots:
    """The model's slots, rebuilt only when the model has changed."""
    slots = _slots.get(model)
    if slots is None or not slots.is_current():
        slots = _slots[model] = ParameterSlots(model)
    return slots


def trainable_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained: requires_grad=True, tied ones once.

    Raises:
        ModelError: there is none, or the parameters, trained or not, are on several devices.
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


def require_estimable(model: nn.Module, *, by_backward_pass: bool) -> None:
    """Refuse parameters whose gradient an estimator would get wrong.

    Args:
        model: owner of the parameters.
        by_backward_pass: whether the estimator takes a whole backward pass.

    Raises:
        ModelError: a trainable parameter has a hook that only `.backward()` calls; or, without a backward pass, it is
            complex or has a hook on its gradient, or a module has a backward hook.
    """
    slots = slots_of(model)
    if slots.has_backward_hooks() and not by_backward_pass:
        names = [name for name, module in model.named_modules() if any(backward_hooks(module))]
        owner = f"module {names[0]!r} of {type(model).__name__}" if names else "every module (torch.nn.modules.module)"
        raise ModelError(
            f"{owner} has a backward hook, which only a backward pass calls: remove it and change the estimated "
            "gradients instead, or train with Backprop"
        )
    for name, p in slots.trainable().items():
        on_gradient, after_backward = gradient_hooks(p)
        if after_backward:
            raise ModelError(
                f"'{name}' of {type(model).__name__} has a hook that runs after .backward(), which fgtrain does not "
                "call: remove it and do its work after write_grads"
            )
        if by_backward_pass:
            continue
        if p.is_complex():
            raise ModelError(
                f"'{name}' of {type(model).__name__} is complex, but directions are real: store it as pairs of real "
                "numbers and use torch.view_as_complex in forward, or train with Backprop"
            )
        if on_gradient:
            raise ModelError(
                f"'{name}' of {type(model).__name__} has a hook on its gradient, which only a backward pass calls: "
                "remove it and change the estimated gradients instead, or train with Backprop"
            )


def _require_numbers(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    for name, p in params.items():
        if is_lazy(p):
            raise ModelError(
                f"{type(model).__name__} has not been called: '{name}' has no shape yet; call it on a batch first"
            )
        if p.is_meta:
            raise ModelError(
                f"'{name}' of {type(model).__name__} is on the meta device; give it values with .to_empty()"
            )

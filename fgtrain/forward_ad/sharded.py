"""The stacked engine for parameters sharded by FSDP2: a module's parameters are whole only during its forward pass.

FSDP2 gathers them in a hook before the forward pass and frees them in a hook after it. Between the two, hooks of this
engine replace them by duals. There is no gradient, so none is gathered or scattered.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain._torch import eager_functions, set_grad_enabled
from fgtrain.errors import NoTangent, UnsupportedOperation
from fgtrain.forward_ad.dual import Dual, primal_of, tangent_of
from fgtrain.forward_ad.named_errors import named_errors
from fgtrain.forward_ad.passes import NO_TANGENT, LossFn, UnsupportedByEngine, check_losses
from fgtrain.forward_ad.running import running_pass
from fgtrain.network.sharding import is_sharded
from fgtrain.tangents.directions import LowRankTangent, Tangent, dense


def jvp(model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent]) -> tuple[Tensor, Tensor]:
    """Losses (B,) or () and their derivatives (K, B) or (K,), as `fgtrain.forward_ad.jvp`.

    Raises:
        UnsupportedOperation: the directions are dense, or stacked duals cannot handle the model's pass.
    """
    for name, tangent in tangents.items():
        if not isinstance(tangent, LowRankTangent) and dense(tangent)[0].dim() > 1:
            raise UnsupportedOperation(
                f"a dense direction of the sharded parameter {name} would be as large as the whole parameter on every "
                "rank; use LowRank"
            )
    try:
        with running_pass(), named_errors(model), eager_functions():
            with _DualsInForward(model, tangents), torch.enable_grad():
                found = loss_fn(model)
            values, derivatives = check_losses(primal_of(found)), tangent_of(found)
    except UnsupportedByEngine as reason:
        raise UnsupportedOperation(
            f"sharded parameters need the stacked engine, which cannot run this model: {reason}"
        ) from None
    if derivatives is None:
        raise NoTangent(NO_TANGENT)
    return values, derivatives


class _DualsInForward:
    """A context in which duals replace the gathered parameters of modules."""

    def __init__(self, model: nn.Module, tangents: Mapping[str, Tangent]) -> None:
        self._model = model
        self._tangents = tangents
        self._hooks = ExitStack()

    def __enter__(self) -> None:
        for path, unit in self._model.named_modules():
            if not hasattr(unit, "unshard"):
                continue
            places = [
                (part._parameters, key, f"{path}.{name}" if path else name)
                for prefix, part in unit.named_modules()
                for key, p in part._parameters.items()
                if p is not None and is_sharded(p)
                for name in [f"{prefix}.{key}" if prefix else key]
            ]
            if unit is self._model:  # of the root, only parameters that no unit below gathers
                places = [place for place in places if "." not in place[2]]
            self._hook(unit, places)

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        modules: Any = self._model.modules()
        for unit in modules:  # the root keeps its parameters gathered for a backward pass
            if hasattr(unit, "unshard"):
                unit.reshard()

    def _hook(self, unit: nn.Module, places: list[tuple[Any, str, str]]) -> None:
        gathered: list[Any] = []

        def put_duals(*_: Any) -> None:
            for held, key, name in places:
                gathered.append(held[key])
                value = held[key].detach()
                held[key] = Dual(value, self._tangents[name]) if name in self._tangents else value
            set_grad_enabled(True)

        def take_duals(*_: Any) -> None:
            for (held, key, _name), p in zip(places, gathered, strict=True):
                held[key] = p
            gathered.clear()
            set_grad_enabled(False)

        # FSDP2's own hooks run between these two without grad mode, so that they do not prepare a backward pass.
        before = unit.register_forward_pre_hook(lambda *_: set_grad_enabled(False), prepend=True)
        after = unit.register_forward_hook(lambda *_: set_grad_enabled(True))
        for handle in (
            before,
            unit.register_forward_pre_hook(put_duals),
            unit.register_forward_hook(take_duals, prepend=True),
            after,
        ):
            self._hooks.callback(handle.remove)

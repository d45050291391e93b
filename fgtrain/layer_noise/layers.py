"""The layers of a model that can be perturbed at their outputs, found in a trial pass."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fgtrain.errors import UnsupportedOperation
from fgtrain.forward_ad import stacked
from fgtrain.forward_ad.passes import LossFn, UnsupportedByEngine, UsesRecorded, WritesIntoPlain, WritesWider
from fgtrain.layer_noise.noise import WITHOUT_HEAD, LayerNoise, PerturbedPass, UsedElsewhere
from fgtrain.network.parameters import slots_of
from fgtrain.network.snapshot import Snapshot

T = TypeVar("T")

PERTURBED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PerturbedLayers(NamedTuple):
    """Layers whose outputs get noise.

    Args:
        biases: {name of the weight: name of the bias or None}.
        last: name of the weight that is used last in the pass.
        rectified: names of the weights whose output only a ReLU uses.
    """

    biases: dict[str, str | None]
    last: str
    rectified: frozenset[str]

    def others(self, params: Mapping[str, T]) -> dict[str, T]:
        """The parameters that do not belong to these layers."""
        own = {*self.biases, *self.biases.values()}
        return {name: p for name, p in params.items() if name not in own}


def perturbed_layers(model: nn.Module, loss_fn: LossFn) -> PerturbedLayers:
    """Linear layers and convolutions whose weight is trained and not used elsewhere, found in a trial pass.

    Raises:
        UnsupportedOperation: there is none.
    """
    slots = slots_of(model)
    cache, trained = slots.cached(perturbed_layers, dict), frozenset(slots.trainable())
    if trained not in cache:
        cache[trained] = find_layers(model, loss_fn, PERTURBED)
    return cache[trained]


def find_layers(model: nn.Module, loss_fn: LossFn, kinds: tuple[type[nn.Module], ...]) -> PerturbedLayers:
    """As `perturbed_layers`, for layers of these kinds; nothing is cached."""
    biases, used_elsewhere = candidates(model, kinds), ""
    before = Snapshot(model)
    while biases:
        trial = PerturbedPass(1, seed=0)
        try:
            run_perturbed(model, loss_fn, {name: LayerNoise(name, trial) for name in biases})
        except UsedElsewhere as use:
            del biases[use.name]
            used_elsewhere = (
                f" ({use.name} is also used outside its layer; instead of a penalty on weights, use weight_decay)"
            )
            continue
        except (UsesRecorded, WritesIntoPlain):
            continue
        finally:
            before.restore()
        used = [call.name for call in trial.calls]
        if used:
            rectified = frozenset(call.name for call in trial.calls if call.is_rectified)
            found = PerturbedLayers({name: biases[name] for name in biases if name in used}, used[-1], rectified)
            _try_other_parameters(model, loss_fn, found, before)
            return found
        break
    raise UnsupportedOperation(
        f"{type(model).__name__} has no trained Linear or convolution with a weight of its own to perturb"
        f"{used_elsewhere}; use ForwardGradient"
    )


def _try_other_parameters(model: nn.Module, loss_fn: LossFn, layers: PerturbedLayers, before: Snapshot) -> None:
    """A pass with tangents of the parameters outside the layers, since the model may write these into plain tensors.

    `evaluate` keeps that in mind. The pass of an estimate, which cannot be repeated, is then prepared for it.
    """
    others = layers.others(slots_of(model).trainable())
    if others:
        # The pass of the estimate names what it cannot follow.
        with suppress(UsesRecorded, WritesIntoPlain, UnsupportedOperation):
            run_perturbed(model, loss_fn, {name: torch.zeros_like(p)[None] for name, p in others.items()})
        before.restore()


def candidates(model: nn.Module, kinds: tuple[type[nn.Module], ...] = PERTURBED) -> dict[str, str | None]:
    """{name of the weight: name of the bias or None} of the layers of these kinds whose weight is trained."""
    names = {id(p): name for name, p in slots_of(model).trainable().items()}
    owned = [(module, key, id(p)) for module in model.modules() for key, p in module._parameters.items()]
    times_owned = {key: sum(at == key for _, _, at in owned) for key in names}
    biases: dict[str, str | None] = {}
    for module in model.modules():
        if isinstance(module, kinds):
            weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
            if weight is not None and times_owned.get(id(weight)) == 1:
                bias_name = names.get(id(bias)) if times_owned.get(id(bias)) == 1 else None
                biases[names[id(weight)]] = bias_name
    return biases


def run_perturbed(
    model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Any], *, follows: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Losses and derivatives of a pass with noise; `follows` is False if its layers give no tangents.

    Raises:
        UnsupportedOperation: the engine cannot handle the pass.
        UsesRecorded: the pass uses the result of a custom autograd.Function for the first time.
        WritesIntoPlain: the pass writes into plain tensors for the first time.
    """
    try:
        return stacked.evaluate(model, loss_fn, tangents, follows=follows)
    except (UsesRecorded, WritesIntoPlain):
        raise
    except WritesWider as reason:
        raise UnsupportedOperation(
            f"the exact gradient of the last layer cannot follow this model: {reason}; use the out-of-place form, or "
            f"{WITHOUT_HEAD}"
        ) from reason
    except UnsupportedByEngine as reason:
        raise UnsupportedOperation(
            f"activity perturbation cannot follow this model: {reason}; use ForwardGradient"
        ) from reason

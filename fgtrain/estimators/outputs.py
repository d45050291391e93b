"""The outputs of a model that its loss uses, and the curvature of the loss in these outputs.

One pass gives the outputs, their derivatives along K directions, and the losses. If the loss function is the mean of a
loss whose Hessian has a closed form, the output is the input of that loss. For any other loss function, the outputs are
the values that modules with trained parameters return to it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fgtrain._torch import call_of, calls_replaced, is_inside_transform, tree_flatten, tree_unflatten
from fgtrain.agreement import agree
from fgtrain.errors import NoTangent
from fgtrain.estimators.second_order import curvature_in_span
from fgtrain.forward_ad import jvp
from fgtrain.forward_ad.known_losses import KnownLoss, RecordedLosses, carries_tangent
from fgtrain.forward_ad.passes import NO_TANGENT, LossFn, check_losses
from fgtrain.network.parameters import slots_of
from fgtrain.network.snapshot import LightSnapshot, Snapshot, TorchRandomState
from fgtrain.tangents.directions import Tangent, dense


class Linearized(NamedTuple):
    """A loss and its derivatives along K directions.

    Args:
        loss: mean loss, ().
        slopes: grad f . v_k, (K,).
        curvature: T_j . H T_k, (K, K), where T_k = J v_k are the derivatives of the outputs and H is the Hessian of the
            mean loss in the outputs.
    """

    loss: Tensor
    slopes: Tensor
    curvature: Tensor


def linearized(model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent]) -> Linearized:
    """The loss and its derivatives from one pass of the model, with the effects of one plain pass.

    If the loss calls no module with trained parameters, or calls one inside torch.vmap or another transform, the
    parameters are the outputs.

    Raises:
        LossError: the loss carries no tangent.
    """
    before, seen = LightSnapshot(slots_of(model)), _SeenLoss(model, loss_fn)
    found, derivatives = jvp(model, seen, tangents)
    *outputs, losses = found.split(seen.sizes)
    *output_slopes, slopes = derivatives.split(seen.sizes, 1)
    loss, slopes = losses.mean(), slopes.mean(1)
    if seen.known is not None:
        mean, mean_slopes = (loss, slopes) if seen.known_is_all else (outputs.pop().mean(), output_slopes.pop().mean(1))
        if agree(mean, loss) and agree(mean_slopes, slopes):
            return Linearized(loss, slopes, seen.known.curvature(outputs[-1], output_slopes[-1]))
        del outputs[-1], output_slopes[-1]  # the loss is not the mean of the known one
    if not outputs or seen.is_inside_transform:
        before.restore()
        everything = {name: dense(tangent) for name, tangent in tangents.items()}
        return Linearized(loss, slopes, curvature_in_span(model, loss_fn, everything)[2])
    return Linearized(loss, slopes, seen.curvature(outputs, output_slopes))


class _Call(NamedTuple):
    """The value that a call of a module has returned.

    Args:
        leaves: its leaves, if it is nested; `_OUTPUT` in place of an output.
        spec: its structure.
        random_state: the random state after the call.
    """

    leaves: list[Any]
    spec: Any
    random_state: TorchRandomState


class _SeenLoss:
    """A loss function that returns the outputs and losses of a pass as one vector.

    The parts of the vector are the outputs of modules and the losses. If the loss function calls one loss with a closed
    form, such as F.cross_entropy, the parts are the outputs of modules, the input of this known loss, its result and
    the losses; or, if its result is the losses themselves, its input and the losses.

    Args:
        model: the model that the loss function is called with.
        loss_fn: the loss function.

    Attributes:
        sizes: the sizes of the parts.
        known: the loss with a closed form; None if there is none.
        known_is_all: whether its result is the losses.
        is_inside_transform: whether a module was called inside a transform of torch.func, such as vmap.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._modules = {module: call_of(module) for module in _trained(model)}
        self._device = next(model.parameters()).device
        self._shapes: list[torch.Size] = []
        self._calls: list[_Call] = []
        self.sizes: list[int] = []
        self.known: KnownLoss | None = None
        self.known_is_all = self.is_inside_transform = False

    def __call__(self, model: nn.Module) -> Tensor:
        outputs: list[Tensor] = []
        with self._kept(outputs), RecordedLosses() as recorded:
            losses = self._loss_fn(model)
        check_losses(losses)
        parts = [losses.flatten()]
        if not carries_tangent(parts[0]):
            raise NoTangent(NO_TANGENT)
        found = recorded.only()
        if found is None:
            self.known, parts = None, [*outputs, *parts]
        else:
            self.known, z, result = found
            self.known_is_all = result is losses
            parts = [z, *parts] if self.known_is_all else [*outputs, z, result, *parts]
        self._shapes = [x.shape for x in outputs]
        self.sizes = [part.numel() for part in parts]
        return torch.cat([part.flatten() for part in parts])

    def _kept(self, outputs: list[Tensor]) -> Any:
        """A context in which the outermost calls are kept, and their results put into `outputs`."""
        depth, self.is_inside_transform = 0, False
        self._calls.clear()

        def kept(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal depth
                depth += 1
                try:
                    result = call(*args, **kwargs)
                finally:
                    depth -= 1
                if not depth:
                    leaves, spec = tree_flatten(result)
                    if any(isinstance(leaf, Tensor) and is_inside_transform(leaf) for leaf in leaves):
                        self.is_inside_transform = True
                        return result
                    outputs.extend(filter(_is_output, leaves))
                    others = [_OUTPUT if _is_output(leaf) else leaf for leaf in leaves]
                    self._calls.append(_Call(others, spec, TorchRandomState([self._device])))
                return result

            return run

        return calls_replaced({module: kept(call) for module, call in self._modules.items()})

    def curvature(self, outputs: list[Tensor], slopes: list[Tensor]) -> Tensor:
        """T_j . H T_k, (K, K), for a loss without a closed form; the effects of the last pass are kept.

        Args:
            outputs: the outputs, as vectors (N,).
            slopes: their derivatives, (K, N).
        """
        after = Snapshot(self._model)
        self._calls[-1].random_state.restore()
        given = nn.ParameterList([x.view(shape) for x, shape in zip(outputs, self._shapes, strict=True)])
        along = {str(i): t.view(len(t), *shape) for i, (t, shape) in enumerate(zip(slopes, self._shapes, strict=True))}
        with slots_of(self._model).params_replaced({}):
            _, _, curvature = curvature_in_span(given, self._of_outputs, along)
        after.restore()
        return curvature

    def _of_outputs(self, given: Any) -> Tensor:
        """The losses as a function of the outputs, which are given in the order in which modules returned them."""
        outputs = iter(given)
        results = [
            tree_unflatten([next(outputs).clone() if leaf is _OUTPUT else leaf for leaf in call.leaves], call.spec)
            for call in self._calls
        ]
        turn = iter(results)
        with calls_replaced(dict.fromkeys(self._modules, lambda *_, **__: next(turn))):
            return self._loss_fn(self._model)


def _is_output(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


_OUTPUT = object()
"""Stands for an output of a call, which may also hold other objects, such as None."""


def _trained(module: nn.Module) -> list[nn.Module]:
    """The modules that hold parameters with requires_grad=True, themselves or in their children."""
    below = [found for child in module.children() for found in _trained(child)]
    return [*below, module] if below or any(p.requires_grad for p in module.parameters(recurse=False)) else []

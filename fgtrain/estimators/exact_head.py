"""The exact gradient of the last layer and an estimate for the other parameters, from one pass."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.estimators.base import Estimate, Reduce
from fgtrain.estimators.gradients import average_grads
from fgtrain.forward_ad.passes import LossFn
from fgtrain.forward_ad.row_losses import Evaluated
from fgtrain.layer_noise.layers import perturbed_layers
from fgtrain.layer_noise.noise import LayerNoise, PerturbedPass
from fgtrain.layer_noise.rows import ExaminedPass, gradient_of_head
from fgtrain.network.parameters import slots_of
from fgtrain.network.snapshot import Snapshot
from fgtrain.tangents.directions import Tangent, num_of

Jvp = Callable[[nn.Module, LossFn, Mapping[str, Tangent]], tuple[Tensor, Tensor]]


def with_exact_head(
    estimate: Callable[[Mapping[str, Tensor], Jvp], Estimate],
    model: nn.Module,
    loss_fn: LossFn,
    params: Mapping[str, Tensor],
    reduce: Reduce | None,
) -> Estimate:
    """An estimate for all parameters except those of the last layer, and the exact gradient for these.

    C unit directions of the last layer's outputs go through the loss, in the same pass as the estimate's directions.
    About log2 of the number of rows more test that every loss depends on one row.

    Args:
        estimate: maps parameters and a function like `fgtrain.forward_ad.jvp` to an estimate for these parameters.
        model: a model whose last layer is a Linear.
        loss_fn: maps the model to losses (B,), each of which depends on one row of the last layer; or to the mean of
            one F.cross_entropy or F.mse_loss of all rows.
        params: the trained parameters.
        reduce: mean over ranks.
    """
    head, grads = _head_of(model, loss_fn), dict[str, Tensor]()

    def jvp(model: nn.Module, loss_fn: LossFn, directions: Mapping[str, Tangent]) -> tuple[Tensor, Tensor]:
        found, of_head = _pass_with_head(model, loss_fn, directions, head)
        grads.update(of_head)
        return found.losses, found.derivatives[: num_of(directions)]

    others = {name: p for name, p in params.items() if name not in head}
    found = estimate(others, jvp) if others else Estimate(jvp(model, loss_fn, {})[0].mean(), {})
    return found._replace(grads=found.grads | average_grads(grads, grads, reduce))


def gradient_of_last_layer(model: nn.Module, loss_fn: LossFn) -> dict[str, Tensor]:
    """The exact gradient of the last layer alone; empty if no layer has one, which is remembered."""
    refused: set[frozenset[str]] = slots_of(model).cached(gradient_of_last_layer, set)
    trained, snapshot = frozenset(slots_of(model).trainable()), Snapshot(model)
    if trained and trained not in refused:
        try:
            return _pass_with_head(model, loss_fn, {}, _head_of(model, loss_fn))[1]
        except (LossError, UnsupportedOperation):
            refused.add(trained)
            snapshot.restore()
    return {}


def _head_of(model: nn.Module, loss_fn: LossFn) -> list[str]:
    """The names of the last layer's weight and bias."""
    layers = perturbed_layers(model, loss_fn)
    return [name for name in (layers.last, layers.biases[layers.last]) if name is not None]


def _pass_with_head(
    model: nn.Module, loss_fn: LossFn, directions: Mapping[str, Tangent], head: Sequence[str]
) -> tuple[Evaluated, dict[str, Tensor]]:
    """What a pass gives along directions, followed by those of the head; and the head's gradient."""
    perturbed = PerturbedPass(num_of(directions), seed=0, head=head[0])
    examined = ExaminedPass(model, loss_fn)
    found = examined.run({**directions, head[0]: LayerNoise(head[0], perturbed)})
    grad_output = gradient_of_head(examined, perturbed.calls, head[0], found)
    local_grads = perturbed.calls[0].local_grads
    assert local_grads is not None
    found_grads, params = local_grads(grad_output), slots_of(model).params
    return found, {name: g.to(params[name].dtype) for name, g in zip(head, found_grads, strict=False)}

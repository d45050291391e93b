"""The exact gradient of the last layer and an estimate for the other parameters, from one pass."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fgtrain.estimators.base import Estimate, Reduce, average_grads
from fgtrain.layer_noise.layers import perturbed_layers
from fgtrain.layer_noise.noise import LayerNoise, PerturbedPass
from fgtrain.layer_noise.rows import ExaminedPass, gradient_of_head
from fgtrain.network.parameters import slots_of
from fgtrain.tangents.directions import Tangent, num_of

Jvp = Callable[[nn.Module, Callable[[Any], Tensor], Mapping[str, Tangent]], tuple[Tensor, Tensor]]


def with_exact_head(
    estimate: Callable[[Mapping[str, Tensor], Jvp], Estimate],
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    params: Mapping[str, Tensor],
    reduce: Reduce | None,
) -> Estimate:
    """An estimate for all parameters except those of the last layer, and the exact gradient for these.

    C unit directions of the last layer's outputs go through the loss, in the same pass as the estimate's directions.

    Args:
        estimate: maps parameters and a function like `fgtrain.forward_ad.jvp` to an estimate for these parameters.
        model: a model whose last layer is a Linear.
        loss_fn: maps the model to losses (B,), each of which depends on one row of the last layer; or to the mean of
            one F.cross_entropy or F.mse_loss of all rows.
        params: the trained parameters.
        reduce: mean over ranks.
    """
    layers = perturbed_layers(model, loss_fn)
    bias = layers.biases[layers.last]
    head = [layers.last] if bias is None else [layers.last, bias]
    grads: dict[str, Tensor] = {}

    def jvp(
        model: nn.Module, loss_fn: Callable[[Any], Tensor], directions: Mapping[str, Tangent]
    ) -> tuple[Tensor, Tensor]:
        num = num_of(directions)
        perturbed, examined = PerturbedPass(num, seed=0, head=head[0]), ExaminedPass(model, loss_fn)
        found = examined.run({**directions, head[0]: LayerNoise(head[0], perturbed)})
        grad_output = gradient_of_head(examined, perturbed.calls, head[0], found)
        local_grads = perturbed.calls[0].local_grads
        assert local_grads is not None
        found_grads, dtypes = local_grads(grad_output), slots_of(model).params
        grads.update({name: g.to(dtypes[name].dtype) for name, g in zip(head, found_grads, strict=False)})
        return found.losses, found.derivatives[:num]

    others = {name: p for name, p in params.items() if name not in head}
    found = estimate(others, jvp) if others else Estimate(jvp(model, loss_fn, {})[0].mean(), {})
    return found._replace(grads=found.grads | average_grads(grads, reduce))

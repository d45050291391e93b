"""Rules for layers whose parameters move only in the last direction, with inputs that have fewer directions.

The layer is called three times: for the value, for the tangents of the input, and for its own direction.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fgtrain.forward_ad.dual import Dual, dual, primal_of, tangent_of
from fgtrain.forward_ad.registry import WIDENING, register
from fgtrain.forward_ad.rules.matrix_products import CONVOLUTIONS
from fgtrain.tangents.directions import LastTangent

Layer = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _in_last_direction(layer: Layer, along: Layer, x: Any, weight: Any, bias: Any) -> Any:
    """The output of a layer whose parameters move only in the last direction; its input may have fewer directions.

    Since layer(x, weight, bias) is linear in weight and bias together, its derivative is layer(x, last, last of bias).

    Args:
        layer: the layer.
        along: maps the tangents (K, *x.shape) of the input to those of the output, with the same arguments.
        x: the input.
        weight: the weight.
        bias: the bias, or None.
    """
    if not isinstance(weight, Dual) or not isinstance(weight.tangent, LastTangent):
        return NotImplemented
    at, last_of_bias = weight.tangent.num - 1, None
    if isinstance(bias, Dual):
        if not isinstance(bias.tangent, LastTangent) or bias.tangent.num != at + 1:
            return NotImplemented
        last_of_bias = bias.tangent.last
    px, pw = primal_of(x), primal_of(weight)
    primal, own, xt = layer(px, pw, primal_of(bias)), layer(px, weight.tangent.last, last_of_bias), tangent_of(x)
    earlier = 0 if xt is None else len(xt)
    total = own.new_zeros(max(earlier, at + 1), *own.shape)
    if xt is not None:
        total[:earlier] = along(xt, pw, None)
    total[at] += own
    return dual(primal, total)


@register("linear", WIDENING)
def _linear_in_last_direction(x: Any, weight: Any, bias: Any = None) -> Any:
    return _in_last_direction(F.linear, F.linear, x, weight, bias)


@register("conv1d conv2d conv3d", WIDENING)
def _conv_in_last_direction(x: Any, weight: Any, bias: Any = None, *options: Any, **more: Any) -> Any:
    if x.dim() != weight.dim():
        return NotImplemented
    conv = CONVOLUTIONS[weight.dim() - 3]

    def layer(inputs: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
        return conv(inputs, filters, bias, *options, **more)

    def along(tangents: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
        return layer(tangents.flatten(0, 1), filters, bias).unflatten(0, tangents.shape[:2])

    return _in_last_direction(layer, along, x, weight, bias)

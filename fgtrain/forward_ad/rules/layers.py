"""Rules for activations, dropout, pooling and normalisation."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fgtrain.forward_ad.dual import Dual, dual, joint_of, primal_of, tangent_of
from fgtrain.forward_ad.registry import RULES, register
from fgtrain.forward_ad.rules.arithmetic import aligned, each, stacked

aten = torch.ops.aten


# --- activations, dropout, pooling --------------------------------------------------------------------------------


def _relu(x: Dual, inplace: bool = False) -> Any:
    if inplace:
        return _relu_in_place(x)
    primal, tangent, joint = primal_of(x), tangent_of(x), joint_of(x)
    if joint is None:
        primal = torch.relu(primal)
        return dual(primal, aten.threshold_backward.default(tangent, primal, 0))
    result = torch.empty_like(joint)
    primal = torch.clamp_min(primal, 0, out=result[0])
    return dual(primal, aten.threshold_backward.grad_input(tangent, primal, 0, grad_input=result[1:]))


def _relu_in_place(x: Dual) -> Any:
    if x.aliased:
        return NotImplemented
    primal, tangent = primal_of(x).relu_(), tangent_of(x)
    aten.threshold_backward.grad_input(tangent, primal, 0, grad_input=tangent)
    return x


RULES.update(dict.fromkeys((torch.relu, torch.Tensor.relu, F.relu), _relu))
RULES.update(dict.fromkeys((torch.relu_, torch.Tensor.relu_), _relu_in_place))


@register("dropout")
def _dropout(x: Dual, p: float, train: bool) -> Any:
    if not train or p == 0:
        return x
    if p == 1:  # as in torch, no random number is drawn
        return dual(primal_of(x) * 0, tangent_of(x) * 0)
    primal, mask = torch.native_dropout(primal_of(x), p, train)
    return dual(primal, tangent_of(x) * mask.to(primal.dtype).mul_(1 / (1 - p)))


@register("feature_dropout")
def _feature_dropout(x: Dual, p: float, train: bool) -> Any:
    if not train:
        return NotImplemented
    scale = torch.feature_dropout(torch.ones_like(primal_of(x)), p, train)  # the same random numbers as for x
    return dual(primal_of(x) * scale, tangent_of(x) * scale)


def _max_pool(with_indices: Any, spatial: int) -> Any:
    def rule(x: Dual, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
        px, xt = primal_of(x), tangent_of(x)
        if return_indices or px.dim() != spatial + 2:
            return NotImplemented
        primal, index = with_indices(px, *args, **kwargs)
        index = index.flatten(2).expand(len(xt), -1, -1, -1)
        return dual(primal, xt.flatten(3).gather(3, index).view(len(xt), *primal.shape))

    return rule


for _spatial in (1, 2, 3):
    RULES[getattr(F, f"max_pool{_spatial}d")] = _max_pool(getattr(F, f"max_pool{_spatial}d_with_indices"), _spatial)
    _adaptive = getattr(F, f"adaptive_max_pool{_spatial}d_with_indices")
    RULES[getattr(F, f"adaptive_max_pool{_spatial}d")] = _max_pool(_adaptive, _spatial)


# --- normalisation: the Jacobian of x -> (x - mean) / std is symmetric, so its backward kernel pushes tangents too ---


@register("batch_norm")
def _batch_norm(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    px, xt = primal_of(x), tangent_of(x)
    pw, wt, bt = primal_of(weight), tangent_of(weight), tangent_of(bias)
    primal, mean, scale = torch.native_batch_norm(
        px, pw, primal_of(bias), running_mean, running_var, training, momentum, eps
    )
    if not training:
        mean, scale = running_mean, (running_var + eps).rsqrt()
    # A tangent t becomes t * slope + x * factor * scale + shift per channel; two sums of t determine the factors.
    slope = scale if pw is None else scale * pw
    factor, shift = wt, bt  # (K, C)
    if training and xt is not None:
        per_example = slope * (-px.shape[1] / max(px.numel(), 1))
        ones = torch.ones_like(scale)  # CUDA's kernel needs a weight; the two sums do not depend on it
        sums = [
            aten.native_batch_norm_backward.default(
                t, px, ones, running_mean, running_var, mean, scale, True, eps, [False, True, True]
            )[1:]
            for t in xt.unbind()
        ]
        with_x, alone = map(stacked, zip(*sums, strict=True))
        factor = _plus_product(factor, with_x, per_example)
        shift = _plus_product(shift, alone, per_example)
    if factor is not None:
        factor = factor * scale
        shift = _plus_product(shift, factor, mean, -1)

    def channels(values: Tensor) -> Tensor:
        return values.to(px.dtype).view(*values.shape[:-1], 1, -1, *[1] * (px.dim() - 2))

    if factor is not None and shift is not None:
        tangent = torch.addcmul(channels(shift), px, channels(factor))
        return dual(primal, tangent if xt is None else tangent.addcmul_(xt, channels(slope)))
    if xt is None:
        assert shift is not None  # the weight or the bias moves
        return dual(primal, channels(shift).clone())  # may be changed in place
    moved = xt * channels(slope)
    return dual(primal, moved if shift is None else moved.add_(channels(shift)))


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, sign: int = 1) -> Tensor:
    """total + sign a b, in the dtype of a; `total` may be None."""
    b = b.to(a.dtype)
    return sign * a * b if total is None else torch.addcmul(total.to(a.dtype), a, b, value=sign)


@register("layer_norm")
def _layer_norm(
    x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enable: bool = True
) -> Any:
    if _mixes_dtypes(x, weight):
        return NotImplemented
    px, xt = _as_autocast(primal_of(x)), _as_autocast(tangent_of(x))
    unit, mean, scale = torch.native_layer_norm(px, shape, None, None, eps)

    def push(t: Tensor) -> Tensor:
        return aten.native_layer_norm_backward.default(t, px, shape, mean, scale, None, None, [True, False, False])[0]

    moved = None if xt is None else each(push, xt)
    return _affine(unit, moved, weight, bias, lambda values: aligned(values, px.dim()))


@register("group_norm")
def _group_norm(
    x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    if _mixes_dtypes(x, weight):
        return NotImplemented
    px, xt = _as_autocast(primal_of(x)).contiguous(), _as_autocast(tangent_of(x))
    sizes = (px.shape[0], px.shape[1], math.prod(px.shape[2:]), groups)
    unit, mean, scale = torch.native_group_norm(px, None, None, *sizes, eps)

    def push(t: Tensor) -> Tensor:
        only_input = [True, False, False]
        return aten.native_group_norm_backward.default(t.contiguous(), px, mean, scale, None, *sizes, only_input)[0]

    moved, spatial = None if xt is None else each(push, xt), [1] * (px.dim() - 2)
    return _affine(unit, moved, weight, bias, lambda values: values.view(len(values), 1, -1, *spatial))


def _mixes_dtypes(x: Tensor, weight: Any) -> bool:
    """Whether a kernel of the CPU gets inputs and weights of different dtypes, as under autocast there."""
    return x.device.type == "cpu" and weight is not None and weight.dtype != x.dtype


def _as_autocast(x: Any) -> Any:
    """The input of a normalisation under autocast, which computes it in float32, except on the CPU; or None."""
    if x is None:
        return None
    device = x.device.type
    is_half = x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if is_half and device != "cpu" and torch.is_autocast_enabled(device) else x


def _affine(unit: Tensor, tangent: Tensor | None, weight: Any, bias: Any, place: Any) -> Tensor:
    """The tangents of unit * weight + bias; `place` shapes K values per parameter for (K, *unit.shape)."""
    primal, wt, bt = unit, tangent_of(weight), tangent_of(bias)
    if weight is not None:
        scale = place(primal_of(weight)[None])
        primal = primal * scale[0] if bias is None else torch.addcmul(place(primal_of(bias)[None])[0], primal, scale[0])
        tangent = None if tangent is None else tangent * scale
    elif bias is not None:
        primal = primal + place(primal_of(bias)[None])[0]
    if wt is not None:
        tangent = unit * place(wt) if tangent is None else tangent.addcmul_(unit, place(wt))
    if bt is not None:
        tangent = place(bt).expand(-1, *unit.shape).clone() if tangent is None else tangent.add_(place(bt))
    return dual(primal, tangent)

"""Rules for the layers that networks are made of, where the stack of K directions pays.

Shapes: K directions, B or N examples, C channels, r the rank of a low-rank tangent. A layer linear in its input treats
the K tangents as K times as many examples. A low-rank tangent V = sum_a u_a z_a^T of a weight costs a thin product:
x V^T = (x z) u^T.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fgtrain.directions import LowRankTangent
from fgtrain.forward_ad.dual import Dual, dual, num_directions, primal_of, tangent_of
from fgtrain.forward_ad.perturbation import LayerNoise
from fgtrain.forward_ad.rules import RULES, aligned, register

aten = torch.ops.aten


# --- linear and convolution ---------------------------------------------------------------------------------------


@register("linear")
def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    px, pw, xt, bt = primal_of(x), primal_of(weight), tangent_of(x), tangent_of(bias)
    if isinstance(weight, Dual) and isinstance(weight.tangent, LayerNoise):
        output = _linear(x, pw, bias) if isinstance(x, Dual) else F.linear(x, pw, bias)
        return weight.tangent.perturb(px, output, partial(_linear_grads, px), -1)
    primal = F.linear(px, pw, primal_of(bias))
    rows = px if px.dim() == 2 else px.reshape(-1, px.shape[-1])
    fixed = _of_weight(rows, weight, bt).to(primal.dtype) if isinstance(weight, Dual) else None  # (K B, out)
    if xt is None:
        total = bt.unsqueeze(1).expand(-1, rows.shape[0], -1) if fixed is None else fixed
    elif fixed is None:
        total = F.linear(xt, pw)
        if bt is not None:
            total.view(bt.shape[0], -1, bt.shape[1]).add_(bt.unsqueeze(1))
    else:  # the product is added to what stands there already: a sweep over the result less
        moving = xt.reshape(-1, xt.shape[-1]).to(primal.dtype)
        total = fixed.addmm_(moving, pw.t().to(primal.dtype))
    return dual(primal, total.reshape(num_directions(x, weight, bias), *primal.shape))


def _linear_grads(x: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias from that of the output."""
    rows = grad_output.reshape(-1, grad_output.shape[-1])
    return rows.T @ x.reshape(-1, x.shape[-1]).to(rows.dtype), rows.sum(0)


def _of_weight(rows: Tensor, weight: Dual, bias: Tensor | None) -> Tensor:
    """(K B, out): rows (B, in) times the tangents of the weight, plus the tangents (K, out) of the bias."""
    tangent = weight.tangent
    if isinstance(tangent, LowRankTangent) and tangent.rank == 1:
        left, right = F.linear(rows, tangent.right), tangent.left  # (B, K), (K, out): outer products
        if left.shape[1] > 1:
            left, right = left.t().contiguous().unsqueeze(2), right.unsqueeze(1)
            bias = None if bias is None else bias.unsqueeze(1)
        right = right.to(left.dtype)
        product = left * right if bias is None else torch.addcmul(bias.to(left.dtype), left, right)
        return product.view(-1, right.shape[-1])
    if isinstance(tangent, LowRankTangent):
        right, left = tangent.factors
        left = F.linear(rows, left.flatten(0, 1)).unflatten(1, left.shape[:2]).transpose(0, 1)  # (K, B, r)
    else:
        left, right = rows.expand(tangent.shape[0], -1, -1), tangent.mT
    right = right.to(left.dtype)
    product = torch.bmm(left, right) if bias is None else torch.baddbmm(bias.unsqueeze(1).to(left.dtype), left, right)
    return product.flatten(0, 1)


@register("conv1d conv2d conv3d")
def _conv(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    px, pw = primal_of(x), primal_of(weight)
    spatial = pw.dim() - 2
    if px.dim() != spatial + 2:
        return NotImplemented
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[spatial - 1]

    def convolve(inputs: Tensor, filters: Tensor, bias: Tensor | None = None, groups: int = groups) -> Tensor:
        return conv(inputs, filters, bias, stride, padding, dilation, groups)

    if isinstance(weight, Dual) and isinstance(weight.tangent, LayerNoise):
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        output = _conv(x, pw, bias, **options) if isinstance(x, Dual) else convolve(px, pw, bias)
        return weight.tangent.perturb(px, output, partial(_conv_grads, px, pw, options), 1)
    primal = convolve(px, pw, primal_of(bias))
    xt, bt = tangent_of(x), tangent_of(bias)
    total = None if xt is None else convolve(xt.flatten(0, 1), pw).unflatten(0, xt.shape[:2])
    if isinstance(weight, Dual):
        term = _convolve_tangents(convolve, px, weight, groups)
        total = term if total is None else total.add_(term)
    if bt is not None:
        bt = bt.view(len(bt), 1, -1, *[1] * spatial)
        total = bt if total is None else total.add_(bt)
    return dual(primal, total)


def _conv_grads(x: Tensor, weight: Tensor, options: dict[str, Any], grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias from that of the output."""
    spatial = weight.dim() - 2
    stride, padding, dilation = (
        [value] * spatial if isinstance(value, int) else value
        for value in (options["stride"], options["padding"], options["dilation"])
    )
    if isinstance(padding, str):
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if padding == "same" and any(t % 2 for t in total):
            x = F.pad(x, [n for t in reversed(total) for n in (t // 2, t - t // 2)])
            padding = "valid"
        padding = [0 if padding == "valid" else t // 2 for t in total]
    only_weight = [False, True, False]
    _, grad, _ = aten.convolution_backward(
        grad_output, x, weight, None, stride, padding, dilation, False, [0] * spatial, options["groups"], only_weight
    )
    return grad, grad_output.transpose(0, 1).flatten(1).sum(1)


def _convolve_tangents(convolve: Any, x: Tensor, weight: Dual, groups: int) -> Tensor:
    """(K, N, out, ..): x convolved with the tangents of the weight."""
    tangent = weight.tangent
    if not isinstance(tangent, LowRankTangent):
        return torch.stack([convolve(x, v) for v in tangent])
    left, right = tangent.factors
    num, rank, out = left.shape
    filters = right.reshape(num * rank, *tangent.shape[1:])
    maps = convolve(x, filters.repeat(groups, *[1] * (filters.dim() - 1)))  # (N, groups K r, ..)
    maps = maps.view(len(x), groups, num, rank, 1, *maps.shape[2:])
    left = left.reshape(num, rank, groups, out // groups).permute(2, 0, 1, 3)  # (groups, K, r, out / groups)
    left = left.reshape(1, *left.shape, *[1] * (maps.dim() - 5)).to(maps.dtype)
    product = maps * left if rank == 1 else (maps * left).sum(3, keepdim=True)  # (N, groups, K, 1, out / groups, ..)
    return product.squeeze(3).transpose(1, 2).flatten(2, 3).transpose(0, 1)


# --- activations, dropout, pooling --------------------------------------------------------------------------------


def _relu(x: Dual, inplace: bool = False) -> Any:
    if inplace and not x.aliased:
        return _relu_in_place(x)
    if inplace:
        return NotImplemented
    primal = torch.relu(primal_of(x))
    tangent = tangent_of(x)
    return dual(primal, aten.threshold_backward(tangent, primal, 0))


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
    if p == 1:  # torch too draws no random number for it
        return dual(primal_of(x) * 0, tangent_of(x) * 0)
    primal, mask = torch.native_dropout(primal_of(x), p, train)
    return dual(primal, tangent_of(x) * mask.to(primal.dtype).mul_(1 / (1 - p)))


@register("feature_dropout")
def _feature_dropout(x: Dual, p: float, train: bool) -> Any:
    if not train:
        return NotImplemented
    scale = torch.feature_dropout(torch.ones_like(primal_of(x)), p, train)  # the random numbers are the same on ones
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
    # A tangent t becomes t * slope + x * factor + shift, channel by channel: two sums of t decide the factors.
    slope = scale if pw is None else scale * pw
    factor, shift = scale.new_zeros(2, num_directions(x, weight, bias), len(scale))
    if training and xt is not None:
        per_channel = px.numel() // px.shape[1]
        for k, t in enumerate(xt):
            _, with_x, alone = aten.native_batch_norm_backward(
                t, px, None, running_mean, running_var, mean, scale, True, eps, [False, True, True]
            )
            factor[k], shift[k] = -slope * with_x / per_channel, -slope * alone / per_channel
    factor = (factor if wt is None else factor + wt) * scale
    shift = (shift if bt is None else shift + bt) - factor * mean

    def channels(values: Tensor) -> Tensor:
        return values.to(px.dtype).view(*values.shape[:-1], 1, -1, *[1] * (px.dim() - 2))

    moving = 0 if xt is None else xt * channels(slope)
    return dual(primal, moving + px * channels(factor) + channels(shift))


@register("layer_norm")
def _layer_norm(
    x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enable: bool = True
) -> Any:
    px, xt = primal_of(x), tangent_of(x)
    if xt is None or torch.is_autocast_enabled(px.device.type):
        return NotImplemented
    unit, mean, scale = torch.native_layer_norm(px, shape, None, None, eps)
    only_input = [True, False, False]
    pushed = [aten.native_layer_norm_backward(t, px, shape, mean, scale, None, None, only_input)[0] for t in xt]
    return _affine(unit, torch.stack(pushed), weight, bias, lambda values: aligned(values, px.dim()))


@register("group_norm")
def _group_norm(
    x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    px, xt = primal_of(x), tangent_of(x)
    if xt is None or torch.is_autocast_enabled(px.device.type):
        return NotImplemented
    px = px.contiguous()
    sizes = (px.shape[0], px.shape[1], math.prod(px.shape[2:]), groups)
    unit, mean, scale = torch.native_group_norm(px, None, None, *sizes, eps)
    only_input = [True, False, False]
    pushed = [aten.native_group_norm_backward(t.contiguous(), px, mean, scale, None, *sizes, only_input)[0] for t in xt]
    spatial = [1] * (px.dim() - 2)
    return _affine(unit, torch.stack(pushed), weight, bias, lambda values: values.view(len(values), 1, -1, *spatial))


def _affine(unit: Tensor, tangent: Tensor, weight: Any, bias: Any, place: Any) -> Tensor:
    """Unit * weight + bias, where `place` shapes K values per parameter to multiply (K, *unit.shape)."""
    primal, wt, bt = unit, tangent_of(weight), tangent_of(bias)
    if weight is not None:
        scale = place(primal_of(weight)[None])
        primal, tangent = primal * scale[0], tangent * scale
    if bias is not None:
        primal = primal + place(primal_of(bias)[None])[0]
    if wt is not None:
        tangent = tangent.addcmul_(unit, place(wt))
    if bt is not None:
        tangent = tangent.add_(place(bt))
    return dual(primal, tangent)

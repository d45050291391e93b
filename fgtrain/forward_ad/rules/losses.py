"""Rules for softmax and the losses of classification and regression."""

from typing import Any

import torch
from torch import Tensor

from fgtrain.forward_ad.dual import Dual, dual, primal_of, tangent_of
from fgtrain.forward_ad.registry import register
from fgtrain.forward_ad.rules.arithmetic import aligned, each

aten = torch.ops.aten
_MEAN, _SUM = 1, 2  # torch.nn._reduction


@register("softmax")
def _softmax(x: Dual, dim: int, dtype: Any = None) -> Any:
    if dtype is not None or x.dim() == 0:
        return NotImplemented
    primal = torch.softmax(primal_of(x), dim)
    tangent = tangent_of(x).to(primal.dtype)  # autocast may have changed it

    def push(t: Tensor) -> Tensor:  # the Jacobian is symmetric
        return aten._softmax_backward_data.default(t, primal, dim, primal.dtype)

    return dual(primal, each(push, tangent))


@register("log_softmax")
def _log_softmax(x: Dual, dim: int, dtype: Any = None) -> Any:
    if dtype is not None or x.dim() == 0:
        return NotImplemented
    primal = torch.log_softmax(primal_of(x), dim)
    tangent = tangent_of(x)
    return dual(primal, tangent - (tangent * primal.exp()).sum(_after_k(dim, primal), keepdim=True))


def _after_k(dim: int, primal: Tensor) -> int:
    """The index in the tangents of a dimension of the value."""
    return dim % primal.dim() + 1


@register("cross_entropy_loss")
def _cross_entropy(
    x: Dual, target: Tensor, weight: Any, reduction: int, ignore_index: int, label_smoothing: float
) -> Any:
    px, tangent = primal_of(x), tangent_of(x)
    if target.is_floating_point() or label_smoothing or px.dim() != 2 or tangent is None or isinstance(weight, Dual):
        return NotImplemented
    if torch.is_autocast_enabled(px.device.type):  # which does not know the functions below
        px, weight = (x if x is None else x.to(torch.promote_types(x.dtype, torch.float)) for x in (px, weight))
    log_p = torch.log_softmax(px, 1)
    primal, total_weight = aten.nll_loss_forward.default(log_p, target, weight, reduction, ignore_index)
    slope = aten.nll_loss_backward.default(
        torch.ones_like(primal), log_p, target, weight, reduction, ignore_index, total_weight
    )
    slope = aten._log_softmax_backward_data.default(slope, log_p, 1, log_p.dtype)  # of each loss in its logits
    return dual(primal, (tangent * slope).sum((1, 2) if primal.dim() == 0 else 2))


@register("mse_loss")
def _mse(x: Any, target: Any, reduction: int) -> Any:
    px, py = primal_of(x), primal_of(target)
    primal = aten.mse_loss(px, py, reduction)
    difference = px - py
    xt, yt = (aligned(tangent_of(t), difference.dim()) for t in (x, target))
    moved = (0 if xt is None else xt) - (0 if yt is None else yt)
    return dual(primal, _reduced((2 * difference * moved).expand(-1, *difference.shape), reduction))


@register("binary_cross_entropy_with_logits")
def _bce_with_logits(x: Dual, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = _MEAN) -> Any:
    if isinstance(target, Dual) or weight is not None or pos_weight is not None or isinstance(reduction, str):
        return NotImplemented
    px = primal_of(x)
    primal = torch.binary_cross_entropy_with_logits(px, target, None, None, reduction)
    return dual(primal, _reduced((torch.sigmoid(px) - target) * tangent_of(x), reduction))


def _reduced(tangents: Tensor, reduction: int) -> Tensor:
    """The tangents (K, ..) of losses, reduced as the losses are."""
    if reduction == _MEAN:
        return tangents.unsqueeze(-1).flatten(1).mean(1)
    return tangents.unsqueeze(-1).flatten(1).sum(1) if reduction == _SUM else tangents

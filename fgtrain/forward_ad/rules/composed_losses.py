"""Compositions of losses, see `fgtrain.forward_ad.rules.compositions`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fgtrain.forward_ad.rules.compositions import COMPOSITIONS, change_of, composition_of
from fgtrain.forward_ad.rules.opened import opened


def _reduced(losses: Tensor, reduction: int) -> Tensor:
    return (losses, losses.mean(), losses.sum())[reduction]  # torch.nn._reduction


@composition_of("binary_cross_entropy")
def _binary_cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1) -> Tensor:
    """-y log x - (1 - y) log(1 - x); PyTorch's forward mode gives nan where x is 0 or 1, as of a saturated sigmoid.

    There the logarithms are at least -100, and the derivative is that of backpropagation, about (x - y) / 1e-12.
    """
    at = x.detach()
    F.binary_cross_entropy(at, target.detach())  # refuses an x outside of [0, 1]
    flat = at * (1 - at) < 1e-12
    inside = x.masked_fill(flat, 0.5)
    log_x = torch.where(flat, at.log().clamp(min=-100), inside.log())
    log_rest = torch.where(flat, (1 - at).log().clamp(min=-100), (1 - inside).log())
    slope = torch.ops.aten.binary_cross_entropy_backward(torch.ones_like(at), at, target.detach(), None, 0)
    near_0, near_1 = at + 1e-12, 1 - at + 1e-12  # as in the second derivative of backpropagation
    curvature = ((at * at + (1 - 2 * at) * target.detach()) / (near_0 * near_1).square()).nan_to_num()
    change = torch.where(flat, (x - at) * (slope + (x - at) * curvature / 2), 0)
    losses = change - target * log_x - (1 - target) * log_rest
    return _reduced(losses if weight is None else losses * weight, reduction)


@composition_of("kl_div")
def _kl_div(x: Tensor, target: Tensor, reduction: int = 1, *, log_target: bool = False) -> Tensor:
    """y (log y - x), also where y is 0 and does not move; there PyTorch's forward mode gives nan."""
    losses = target.exp() * (target - x) if log_target else torch.xlogy(target, target) - target * x
    return _reduced(losses, reduction)


@composition_of("multi_margin_loss")
def _multi_margin_loss(
    x: Tensor, target: Tensor, p: float = 1, margin: float = 1, weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    """(1/C) sum over i != y of max(0, margin - x_y + x_i)^p, times the weight of y."""
    rows, labels = (x, target) if x.dim() == 2 else (x.reshape(1, -1), target.reshape(1))
    right = rows.gather(1, labels.unsqueeze(1))
    excess = (margin - right + rows).clamp(min=0)
    excess = excess if p == 1 else excess * excess
    if weight is not None:
        excess = excess * weight[labels].unsqueeze(1)
    others = torch.ones_like(rows.detach(), dtype=torch.bool).scatter(1, labels.unsqueeze(1), False)
    losses = torch.where(others, excess, 0).sum(1) / rows.shape[1]
    return _reduced(losses if x.dim() == 2 or reduction else losses.reshape(()), reduction)


@composition_of("multilabel_margin_loss")
def _multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """(1/C) sum over labels y and others i of max(0, 1 - x_y + x_i); the labels of a row end with the first -1."""
    rows, labels = (x, target) if x.dim() == 2 else (x.reshape(1, -1), target.reshape(1, -1))
    named = (labels >= 0).cumprod(1).bool()
    labels = labels.masked_fill(~named, 0)
    is_label = torch.zeros_like(named, dtype=torch.int64).scatter_add(1, labels, named.long()).bool()
    excess = (1 - rows.gather(1, labels).unsqueeze(2) + rows.unsqueeze(1)).clamp(min=0)  # (rows, labels, others)
    losses = torch.where(named.unsqueeze(2) & ~is_label.unsqueeze(1), excess, 0).sum((1, 2)) / rows.shape[1]
    return _reduced(losses if x.dim() == 2 or reduction else losses.reshape(()), reduction)


def _linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Any:
    """Cross-entropy of a linear layer, without the chunks of `options`, whose kernel has only a backward pass."""
    body = opened(F.linear_cross_entropy)
    assert body is not None
    return body(*args, **kwargs)


if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    COMPOSITIONS[F.linear_cross_entropy] = _linear_cross_entropy


@composition_of("ctc_loss")
def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> Tensor:
    """The value of the kernel, moved along the gradient that the kernel has for backpropagation."""
    with torch.enable_grad():
        leaf = log_probs.detach().requires_grad_()
        found = torch.ctc_loss(leaf, targets, input_lengths, target_lengths, blank, 0, zero_infinity)
        (slopes,) = torch.autograd.grad(found.sum(), leaf)
    losses = found.detach()
    losses = torch.where(losses.isfinite(), losses + (slopes * change_of(log_probs)).sum((0, -1)), losses)
    if reduction == 1:
        return (losses / torch.as_tensor(target_lengths, device=losses.device).clamp_min(1)).mean()
    return losses.sum() if reduction == 2 else losses

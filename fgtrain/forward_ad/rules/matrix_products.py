"""Rules for linear layers, embeddings and convolutions, where stacking K directions saves the most time.

Shapes: K directions, B or N examples, C channels, r the rank of a low-rank tangent. A layer that is linear in its input
treats the K tangents as K times as many examples. A low-rank tangent V = sum_a u_a z_a^T of a weight needs only a thin
product: x V^T = (x z) u^T.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fgtrain.forward_ad.dual import Dual, dual, joint_of, num_directions, primal_of, tangent_of
from fgtrain.forward_ad.output_tangent import OutputTangent
from fgtrain.forward_ad.registry import RULES, register
from fgtrain.forward_ad.rules.arithmetic import aligned
from fgtrain.forward_ad.rules.per_direction import per_direction
from fgtrain.tangents.directions import LowRankTangent

aten = torch.ops.aten
CONVOLUTIONS = torch.conv1d, torch.conv2d, torch.conv3d
"""By their number of spatial dimensions, less 1."""


@register("linear")
def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if _goes_jointly(x, weight, bias):
        return dual(*_linear_jointly(x, weight, bias))
    px, pw = primal_of(x), primal_of(weight)
    if isinstance(weight, Dual) and isinstance(weight.tangent, OutputTangent):
        output = _linear(x, pw, bias) if isinstance(x, Dual) else F.linear(x, pw, bias)
        return weight.tangent.perturb(px, output, partial(_linear_grads, px), -1)
    return dual(*_linear_apart(x, weight, bias))


def _linear_apart(x: Any, weight: Any, bias: Any) -> tuple[Tensor, Tensor]:
    """Value (.., out) and tangents (K, .., out) of a linear layer, by separate products."""
    px, pw, xt, bt = primal_of(x), primal_of(weight), tangent_of(x), tangent_of(bias)
    primal = F.linear(px, pw, primal_of(bias))
    rows = px if px.dim() == 2 else px.reshape(-1, px.shape[-1])
    fixed = _of_weight(rows, weight, bt).to(primal.dtype) if isinstance(weight, Dual) else None  # (K B, out)
    if xt is None:
        total = bt.unsqueeze(1).repeat(1, rows.shape[0], 1) if fixed is None else fixed  # may be changed in place
    elif fixed is None:
        total = F.linear(xt, pw)
        if bt is not None:
            total.view(bt.shape[0], -1, bt.shape[1]).add_(bt.unsqueeze(1))
    else:  # adding the product in place saves a pass over the result
        moving = xt.reshape(-1, xt.shape[-1]).to(primal.dtype)
        total = fixed.addmm_(moving, pw.t().to(primal.dtype))
    return primal, total.reshape(num_directions(x, weight, bias), *primal.shape)


def _goes_jointly(x: Tensor, weight: Any, bias: Any) -> bool:
    """Whether `_linear_jointly` can be used: rows of one dtype, a rank-1 tangent, no bias or one with a tangent."""
    if not isinstance(weight, Dual) or not isinstance(weight.tangent, LowRankTangent) or weight.tangent.rank > 1:
        return False
    if bias is not None and not (isinstance(bias, Dual) and bias.dtype == weight.dtype):
        return False
    return x.dim() == 2 and x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)


def _linear_jointly(x: Any, weight: Dual, bias: Dual | None) -> tuple[Tensor, Tensor]:
    """Value (B, out) and tangents (K, B, out), joint in memory; a joint input needs one product for both."""
    px, transposed, tangent = primal_of(x), weight.primal.t(), weight.tangent
    result = px.new_empty(1 + tangent.num, px.shape[0], transposed.shape[1])
    value, moved = result[0], result[1:]
    left, right = tangent.left.unsqueeze(1), (tangent.right @ px.t()).unsqueeze(2)  # (K, 1, out), (K, B, 1)
    if bias is None:
        torch.mul(left, right, out=moved)
    else:
        torch.addcmul(tangent_of(bias).unsqueeze(1), left, right, out=moved)
    joint = joint_of(x)
    if joint is not None:
        value.zero_() if bias is None else value.copy_(bias.primal)
        result.flatten(0, 1).addmm_(joint.flatten(0, 1), transposed)
        return value, moved
    if bias is None:
        torch.mm(px, transposed, out=value)
    else:
        torch.addmm(bias.primal, px, transposed, out=value)
    if isinstance(x, Dual):
        moved.flatten(0, 1).addmm_(tangent_of(x).reshape(-1, px.shape[1]), transposed)
    return value, moved


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


@register("embedding")
def _embedding(
    weight: Any, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    if not isinstance(weight, Dual) or scale_grad_by_freq:
        return NotImplemented
    primal = torch.embedding(primal_of(weight), indices)
    tangent = weight.tangent
    if isinstance(tangent, OutputTangent):
        return tangent.perturb(indices, primal, partial(_embedding_grads, indices, len(weight), padding_idx), -1)
    if isinstance(tangent, LowRankTangent):
        left, right = tangent.factors
        moved = torch.einsum("k...a,kan->k...n", left.mT[:, indices], right)
    else:
        tangent = tangent_of(weight)
        moved = tangent[:, indices.flatten()].view(len(tangent), *primal.shape)  # a copy for a single index too
    if padding_idx >= 0:  # the padding row is not trained
        moved = moved.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    return dual(primal, moved)


def _embedding_grads(indices: Tensor, size: int, padding_idx: int, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the weight from that of the output; there is no bias."""
    grad = aten.embedding_dense_backward(grad_output, indices, size, padding_idx, False)
    return grad, grad_output.flatten(0, -2).sum(0)


@register("conv1d conv2d conv3d")
def _conv(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    px, pw = primal_of(x), primal_of(weight)
    spatial = pw.dim() - 2
    if px.dim() != spatial + 2:
        return NotImplemented
    conv = CONVOLUTIONS[spatial - 1]

    def convolve(inputs: Tensor, filters: Tensor, bias: Tensor | None = None, groups: int = groups) -> Tensor:
        return conv(inputs, filters, bias, stride, padding, dilation, groups)

    if isinstance(weight, Dual) and isinstance(weight.tangent, OutputTangent):
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        output = _conv(x, pw, bias, **options) if isinstance(x, Dual) else convolve(px, pw, bias)
        return weight.tangent.perturb(px, output, partial(_conv_grads, px, pw, options), 1)
    primal = convolve(px, pw, primal_of(bias))
    xt, bt = tangent_of(x), tangent_of(bias)
    total = None if xt is None else convolve(xt.flatten(0, 1), pw).unflatten(0, xt.shape[:2])
    if isinstance(weight, Dual):
        total = _add_convolved(total, convolve, px, weight, groups)
    if bt is not None:
        bt = bt.view(len(bt), 1, -1, *[1] * spatial)
        total = bt.clone() if total is None else total.add_(bt)  # may be changed in place
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
    x, weight = x.to(grad_output.dtype), weight.to(grad_output.dtype)  # autocast has rounded the output
    only_weight = [False, True, False]
    _, grad, _ = aten.convolution_backward(
        grad_output, x, weight, None, stride, padding, dilation, False, [0] * spatial, options["groups"], only_weight
    )
    return grad, grad_output.transpose(0, 1).flatten(1).sum(1)


def _add_convolved(total: Tensor | None, convolve: Any, x: Tensor, weight: Dual, groups: int) -> Tensor:
    """`total`, if any, plus (K, N, out, ..): x convolved with the tangents of the weight."""
    tangent = weight.tangent
    if not isinstance(tangent, LowRankTangent):
        term = torch.stack([convolve(x, v) for v in tangent])
        return term if total is None else total.add_(term)
    left, right = tangent.factors
    num, rank, out = left.shape
    filters = right.reshape(num * rank, *tangent.shape[1:])
    if groups > 1:
        maps = convolve(x, filters.repeat(groups, *[1] * (filters.dim() - 1)))  # (N, groups K r, ..)
    else:
        maps = _convolved_by_few(convolve, x, filters)
    maps = maps.view(len(x), groups, num, rank, 1, *maps.shape[2:]).movedim((2, 3), (0, 1))
    left = left.reshape(num, rank, 1, groups, out // groups, *[1] * (x.dim() - 2)).to(maps.dtype)
    for r in range(rank):  # (K, N, groups, 1, ..) * (K, 1, groups, out / groups, ..)
        term = (maps[:, r], left[:, r])
        if total is None:
            total = torch.mul(*term).flatten(2, 3)
        else:
            total.unflatten(2, (groups, -1)).addcmul_(*term)
    assert total is not None
    return total


def _convolved_by_few(convolve: Any, x: Tensor, filters: Tensor) -> Tensor:
    """(N, F, ..): x (N, C, ..) convolved with the filters (F, C, *taps).

    A CPU's kernels compute at least 16 channels, so one filter takes up to 0.4 of the time of 64. If there are fewer
    taps in all filters than channels, each tap is multiplied with the channels, and one filter of ones sums the shifted
    products: 0.05 to 0.1 of that time.
    """
    num, channels, *size = filters.shape
    taps = math.prod(size)
    if taps == 1 or num * taps > channels:
        return convolve(x, filters)
    of_taps = filters.flatten(2).transpose(1, 2).reshape(num * taps, channels)
    products = torch.matmul(of_taps, x.flatten(2)).view(x.shape[0] * num, taps, *x.shape[2:])
    shifts = torch.eye(taps, dtype=products.dtype, device=x.device).view(1, taps, *size)
    maps = convolve(products, shifts)
    return maps.view(x.shape[0], num, *maps.shape[2:])


_PER_DIRECTION_MATMUL = per_direction(torch.matmul)


@register("matmul __matmul__ mm bmm spmm")
def _matmul(x: Any, y: Any) -> Any:
    px, py = primal_of(x), primal_of(y)
    if px.layout != torch.strided or py.layout != torch.strided:
        return _with_sparse(torch.matmul, x, y)
    if px.dim() < 2 or py.dim() < 2:
        return _PER_DIRECTION_MATMUL(x, y)
    primal = torch.matmul(px, py)
    if px.dim() > 2 and px.shape[:-2] == py.shape[:-2]:
        return dual(primal, _batched_products(x, y, primal))
    total = None
    if isinstance(x, Dual):
        total = torch.matmul(aligned(tangent_of(x), primal.dim()), py)
    if isinstance(y, Dual):
        term = _times_matrix(px, y, primal.dim())
        total = term if total is None else total + term
    return dual(primal, total)


def _batched_products(x: Any, y: Any, primal: Tensor) -> Tensor:
    """The tangents (K, ..., n, m) of products of as many matrices; broadcasting would copy the values K times."""
    total = primal.new_empty(num_directions(x, y), *primal.shape)
    left, right = (primal_of(t).to(primal.dtype).flatten(0, -3) for t in (x, y))
    for k, out in enumerate(total.flatten(1, -3)):
        if isinstance(x, Dual):
            torch.bmm(tangent_of(x)[k].to(primal.dtype).flatten(0, -3), right, out=out)
        if isinstance(y, Dual):
            moving = tangent_of(y)[k].to(primal.dtype).flatten(0, -3)
            out.baddbmm_(left, moving) if isinstance(x, Dual) else torch.bmm(left, moving, out=out)
    return total


def _with_sparse(func: Any, x: Any, y: Any, *options: Any) -> Any:
    """One matrix is sparse and constant: K directions become K times as many columns or rows of the other."""
    px, py = primal_of(x), primal_of(y)
    if px.dim() != 2 or py.dim() != 2 or options:
        return NotImplemented
    primal = func(px, py)
    if isinstance(y, Dual):
        tangent = tangent_of(y)
        moved = func(px, tangent.transpose(0, 1).flatten(1)).unflatten(1, (len(tangent), py.shape[1])).transpose(0, 1)
    else:
        tangent = tangent_of(x)
        moved = func(tangent.flatten(0, 1), py).unflatten(0, (len(tangent), px.shape[0]))
    return dual(primal, moved)


def _times_matrix(x: Tensor, y: Dual, ndim: int) -> Tensor:
    """x times the tangents of y, (K, ..)."""
    tangent = y.tangent
    if isinstance(tangent, LowRankTangent) and len(tangent.shape) == 2:
        left, right = (aligned(factor, ndim) for factor in tangent.factors)
        return torch.matmul(torch.matmul(x, left.mT), right)
    return torch.matmul(x, aligned(tangent_of(y), ndim))


RULES[torch.Tensor.__rmatmul__] = lambda y, x: _matmul(x, y)
RULES[torch.sparse.mm] = partial(_with_sparse, torch.sparse.mm)

"""Compositions: functions of PyTorch written with others, since their own forward-mode derivative is missing or wrong.

All engines run a composition instead of its function, because the calls in it have derivatives. A composition may
return NotImplemented if the function itself can be used.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fgtrain._torch import FOREACH, standard_gamma, standard_gamma_grad
from fgtrain.forward_ad.registry import register
from fgtrain.forward_ad.rules.opened import opened

COMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""{function of PyTorch: its composition}."""

composition_of = partial(register, table=COMPOSITIONS)
"""Makes the decorated function the composition of every function of PyTorch with one of the given names."""


def by_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the first tensors by place, since rules and bodies have other names for them."""
    names = ("condition", "input", "other") if "mat1" in kwargs else ("condition", "input", "other", "mat2")
    moved = tuple(kwargs[name] for name in names if name in kwargs)
    return ((*args, *moved), {k: x for k, x in kwargs.items() if k not in names}) if moved else (args, kwargs)


def _change(x: Tensor) -> Tensor:
    """0 with the derivative of x, also where x is infinite."""
    return (x - x.detach()).nan_to_num(0.0, 0.0, 0.0)


def no_backward(*_: Any, **__: Any) -> Any:
    """Refuse Tensor.register_hook and Tensor.retain_grad, since there is no backward pass."""
    raise NotImplementedError("forward AD with a hook on the gradient of a tensor that only a backward pass would call")


# --- weights ------------------------------------------------------------------------------------------------------


@composition_of("_weight_norm")
def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """v with its norms over all dimensions but `dim` replaced by g."""
    others = [d for d in range(v.dim()) if d != dim] if dim != -1 else list(range(v.dim()))
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))


@composition_of("embedding")
def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    """With the derivative of backpropagation: 0 for the padding row, and divided by the frequency of a row."""
    if padding_idx < 0 and not scale_grad_by_freq:
        return NotImplemented
    out = torch.embedding(weight, indices)
    if scale_grad_by_freq:
        out = out.detach() + _change(out) / _frequencies(indices, len(weight)).unsqueeze(-1)
    return torch.where((indices == padding_idx).unsqueeze(-1), out.detach(), out)


def _frequencies(indices: Tensor, size: int) -> Tensor:
    """For each index, below `size`, how often it occurs."""
    return indices.flatten().bincount(minlength=size)[indices]


@composition_of("embedding_bag")
def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Sums (mode 0), means (1) or maxima (2) of the rows of each bag; (bags, bag of each index, bag sizes, maxima)."""
    plain = torch.embedding_bag(
        weight.detach(),
        indices,
        offsets,
        scale_grad_by_freq,
        mode,
        sparse,
        None if per_sample_weights is None else per_sample_weights.detach(),
        include_last_offset,
        padding_idx,
    )
    starts = offsets[:-1] if include_last_offset else offsets
    bag = torch.searchsorted(starts.contiguous(), torch.arange(len(indices), device=indices.device), right=True) - 1
    counts = (
        torch.ones_like(indices) if padding_idx is None else (indices != padding_idx % len(weight)).to(indices.dtype)
    )
    if mode == 2:
        best = plain[3]  # (bags, features): the index of the row with the maximum; -1 in an empty bag
        rows = torch.gather(weight, 0, best.clamp(min=0))
        return rows.masked_fill(best < 0, 0), *plain[1:]
    rows = torch.embedding(weight, indices, -1, scale_grad_by_freq) * counts.unsqueeze(-1).to(weight.dtype)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    sums = torch.index_add(rows.new_zeros(len(starts), rows.shape[1]), 0, bag, rows)
    if mode == 1:
        sizes = torch.zeros(len(starts), dtype=counts.dtype, device=counts.device).index_add(0, bag, counts)
        sums = sums / sizes.clamp(min=1).unsqueeze(-1).to(sums.dtype)
    return sums, *plain[1:]


@composition_of("fill_diagonal_")
def _fill_diagonal(x: Tensor, value: float, wrap: bool = False) -> Any:
    if x.dim() != 2 or wrap:
        return NotImplemented
    x.diagonal().fill_(value)
    return x


@composition_of("broadcast_tensors")
def _broadcast_tensors(*tensors: Any) -> list[Any]:
    """The tensors as views of one shape."""
    tensors = tensors[0] if len(tensors) == 1 and not isinstance(tensors[0], Tensor) else tensors
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return [x.expand(shape) for x in tensors]


# --- random numbers -----------------------------------------------------------------------------------------------


@composition_of("normal")
def _normal(mean: Any, std: Any, *args: Any, **kwargs: Any) -> Any:
    """A constant, as for backpropagation; PyTorch's forward mode fails if one of the two is expanded."""
    values = [x.detach() if isinstance(x, Tensor) else x for x in (mean, std)]
    sample = torch.normal(*values, *args, **kwargs)
    return sample + sum((x - x.detach()) * 0 for x in (mean, std) if isinstance(x, Tensor))


@composition_of("_standard_gamma")
def _standard_gamma(concentration: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A sample and its derivative at a fixed value of the distribution function, as in backpropagation."""
    at = concentration.detach()
    sample = standard_gamma(at, generator)
    return sample + standard_gamma_grad(at, sample) * (concentration - at)


# --- distances ----------------------------------------------------------------------------------------------------


@composition_of("cdist")
def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """||x_i - y_j||_p, with the gradient 0 where it is 0."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


@composition_of("pdist")
def _pdist(x: Tensor, p: float = 2.0) -> Tensor:
    """||x_i - x_j||_p for i < j."""
    left, right = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return torch.linalg.vector_norm(x[left] - x[right], p, -1)


# --- matrices -----------------------------------------------------------------------------------------------------


class _SparseTimes(torch.autograd.Function):
    """A constant sparse matrix times a dense one; PyTorch's forward mode requires a tangent of the sparse matrix."""

    is_linear = True

    @staticmethod
    def forward(func: Any, x: Tensor, y: Tensor) -> Tensor:
        return func(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004 - torch's signature
        ctx.func, ctx.matrix, _ = inputs

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return ctx.func(ctx.matrix, tangents[2])


def _times(func: Any) -> Callable[..., Any]:
    def body(x: Tensor, y: Tensor, *options: Any) -> Any:
        return NotImplemented if x.layout == torch.strided or options else _SparseTimes.apply(func, x, y)

    return body


for _func in (torch.sparse.mm, torch.mm, torch.matmul, torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.__matmul__):
    COMPOSITIONS[_func] = _times(_func)


@composition_of("cholesky_inverse")
def _cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:
    """(L L^T)^-1, or (U^T U)^-1; the derivative of PyTorch's forward mode differs from backpropagation's."""
    unit = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand(factor.shape)
    inverse = torch.linalg.solve_triangular(factor, unit, upper=upper)  # of L, or of U
    return inverse @ inverse.mH if upper else inverse.mH @ inverse


@composition_of("logcumsumexp")
def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """PyTorch's forward mode adds 1e-13 to each sum, more than the value of sums far below the greatest term."""
    if x.dim() == 0:
        return x.clone()
    rows = x.movedim(dim, -1)
    later = torch.ones(rows.shape[-1], rows.shape[-1], dtype=torch.bool, device=x.device).triu(1)
    return torch.logsumexp(rows.unsqueeze(-2).masked_fill(later, -torch.inf), -1).movedim(-1, dim)


@composition_of("logsumexp")
def _logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Any:
    """PyTorch's forward mode gives nan where all terms are -inf, as in a masked row, and backpropagation gives 0."""
    if x.is_complex() or not x.numel():
        return NotImplemented
    greatest = x.detach().amax(dim, keepdim=True)
    greatest = greatest.masked_fill(greatest.isinf(), 0)
    total = (x - greatest).exp().sum(dim, keepdim=keepdim)
    is_empty = total == 0
    found = total.masked_fill(is_empty, 1).log() + (greatest if keepdim else greatest.sum(dim))
    return found.masked_fill(is_empty, -torch.inf).to(x.dtype)


COMPOSITIONS[torch.special.logsumexp] = _logsumexp


@composition_of("logaddexp")
def _logaddexp(x: Tensor, y: Tensor) -> Any:
    """As logsumexp."""
    return torch.logsumexp(torch.stack(torch.broadcast_tensors(x, y)), 0)


# --- losses -------------------------------------------------------------------------------------------------------


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
    change = torch.where(flat, (x - at) * slope, 0)
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
    losses = torch.where(losses.isfinite(), losses + (slopes * _change(log_probs)).sum((0, -1)), losses)
    if reduction == 1:
        return (losses / torch.as_tensor(target_lengths, device=losses.device).clamp_min(1)).mean()
    return losses.sum() if reduction == 2 else losses


# --- scatter ------------------------------------------------------------------------------------------------------


@composition_of("scatter_reduce")
def _scatter_reduce(x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    """The mean, product, maximum or minimum of the values scattered to each position."""
    if reduce not in ("mean", "prod", "amax", "amin"):
        return NotImplemented
    if x.dim() == 0:
        options = {"include_self": include_self}
        return _scatter_reduce(x.reshape(1), 0, index.reshape(-1), src.reshape(-1), reduce, **options).reshape(())
    src = src[tuple(slice(n) for n in index.shape)]
    old, new = x.detach(), src.detach()
    counts = torch.ones_like(old) if include_self else 1 - torch.zeros_like(old).scatter(dim, index, 1)  # the old value
    if reduce == "mean":
        kept = torch.where(counts > 0, x, 0)
        return kept.scatter_add(dim, index, src) / counts.scatter_add(dim, index, torch.ones_like(new))
    result = torch.scatter_reduce(old, dim, index, new, reduce, include_self=include_self)
    if reduce == "prod":
        slope_old, slope_new = _products_of_others(old, dim, index, new, counts)
    else:
        slope_old = ((old == result) * counts).to(old.dtype)
        slope_new = (new == result.gather(dim, index)).to(new.dtype)
        ties = slope_old.scatter_add(dim, index, slope_new)  # ties share the derivative
        slope_old, slope_new = slope_old / ties, slope_new / ties.gather(dim, index)
    return (result + slope_old * _change(x)).scatter_add(dim, index, slope_new * _change(src))


def _products_of_others(x: Tensor, dim: int, index: Tensor, src: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """For every factor of the products at the positions of x, old or scattered, the product of the other factors."""
    factors = torch.where(counts > 0, x, 1)
    zeros = (factors == 0).to(x.dtype).scatter_add(dim, index, (src == 0).to(x.dtype))
    rest = torch.where(factors == 0, 1, factors)
    rest = torch.scatter_reduce(rest, dim, index, torch.where(src == 0, 1, src), "prod")  # of all nonzero factors

    def of_others(x: Tensor, rest: Tensor, zeros: Tensor) -> Tensor:
        return torch.where(x == 0, torch.where(zeros == 1, rest, 0), torch.where(zeros == 0, rest / x, 0))

    return of_others(factors, rest, zeros) * counts, of_others(src, rest.gather(dim, index), zeros.gather(dim, index))


@composition_of("index_reduce")
def _index_reduce(x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    """As scatter_reduce, with one index per slice."""
    if x.dim() == 0:
        source = source.reshape(index.shape)
        return torch.scatter_reduce(x.expand(1), 0, index, source, reduce, include_self=include_self).reshape(())
    places = [1] * x.dim()
    places[dim] = len(index)
    index = index.view(places).expand(source.shape)
    return torch.scatter_reduce(x, dim, index, source, reduce, include_self=include_self)


# --- lists of tensors ---------------------------------------------------------------------------------------------


def _of_each(name: str) -> Callable[..., Any] | None:
    """The function of lists of tensors that calls the function `name` with the first parts of all lists, and so on."""
    plain = name.removesuffix("_")
    of_one = _OF_ONE.get(plain) or getattr(torch, plain, None)
    if of_one is None:
        return None

    def composition(*args: Any, **kwargs: Any) -> Any:
        leaves = [*args, *kwargs.values()]
        num = next(len(x) for x in leaves if isinstance(x, (tuple, list)))
        results = []
        for i in range(num):
            parts = [x[i] if isinstance(x, (tuple, list)) else x for x in leaves]
            found = of_one(*parts[: len(args)], **dict(zip(kwargs, parts[len(args) :], strict=True)))
            results.append(parts[0].copy_(found) if name.endswith("_") else found)
        return None if name.endswith("_") else results

    return composition


_OF_ONE: dict[str, Callable[..., Any]] = {  # where its arguments are not those of torch.<name>
    "norm": torch.linalg.vector_norm,
    "copy": lambda _, source, *__: source,
    "zero": torch.zeros_like,
    "addcmul": lambda x, a, b, value=1: torch.addcmul(x, a, b, value=value),
    "addcdiv": lambda x, a, b, value=1: torch.addcdiv(x, a, b, value=value),
    "maximum": lambda x, y: torch.maximum(x, y) if isinstance(y, Tensor) else x.clamp_min(y),
    "minimum": lambda x, y: torch.minimum(x, y) if isinstance(y, Tensor) else x.clamp_max(y),
}
COMPOSITIONS |= {of_lists: made for name, of_lists in FOREACH.items() if (made := _of_each(name))}

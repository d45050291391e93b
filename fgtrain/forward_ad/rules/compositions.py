"""Compositions: functions of PyTorch written with others, since their own forward-mode derivative is missing or wrong.

All engines run a composition instead of its function, because the calls in it have derivatives. A composition may
return NotImplemented if the function itself can be used.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fgtrain._torch import standard_gamma, standard_gamma_grad
from fgtrain.forward_ad.registry import functions_named, register

COMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""{function of PyTorch: its composition}."""

composition_of = partial(register, table=COMPOSITIONS)
"""Makes the decorated function the composition of every function of PyTorch with one of the given names."""


def by_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the first tensors by place, since rules and bodies have other names for them."""
    names = ("condition", "input", "other") if "mat1" in kwargs else ("condition", "input", "other", "mat2")
    moved = tuple(kwargs[name] for name in names if name in kwargs)
    return ((*args, *moved), {k: x for k, x in kwargs.items() if k not in names}) if moved else (args, kwargs)


@cache
def composed_out_of_place(func: Any) -> Any:
    """For a function that changes its first argument in place, the form that makes a new tensor if it is composed."""
    name = getattr(func, "__name__", "")
    if func in COMPOSITIONS or not name.endswith("_") or name.startswith("_"):
        return None
    if name == "normal_":  # x.normal_(mean, std) does not read x, unlike torch.normal(x, std)
        return None
    return next((outside for outside in functions_named(name[:-1]) if outside in COMPOSITIONS), None)


def change_of(x: Tensor) -> Tensor:
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
        out = out.detach() + change_of(out) / _frequencies(indices, len(weight)).unsqueeze(-1)
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


class _Times(torch.autograd.Function):
    """The product with a constant sparse matrix; PyTorch's forward mode requires a tangent of the sparse matrix."""

    is_linear = True

    @staticmethod
    def forward(times: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return times(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004 - torch's signature
        ctx.times, _ = inputs

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Times.apply(ctx.times, tangents[1])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:  # noqa: ARG004 - torch's signature
        times, x = args
        columns = x.movedim(in_dims[1], -1)  # (n, directions) or (n, columns, directions)
        return _Times.apply(times, columns.flatten(1)).unflatten(1, columns.shape[1:]), columns.dim() - 1


def _times(func: Any) -> Callable[..., Any]:
    def body(x: Tensor, y: Tensor, *options: Any) -> Any:
        # The matrix is no argument, since transforms of torch.func do not take all layouts.
        return NotImplemented if x.layout == torch.strided or options else _Times.apply(partial(func, x), y)

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


@composition_of("nan_to_num")
def _nan_to_num(x: Tensor, *values: Any, **named: Any) -> Tensor:
    """PyTorch's forward mode multiplies a derivative of nan by 0, and backpropagation drops it."""
    return torch.where(x.isfinite(), x, torch.nan_to_num(x.detach(), *values, **named))


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

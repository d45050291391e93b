"""Compositions of functions that write to positions given by indices, see `fgtrain.forward_ad.rules.compositions`."""

from typing import Any

import torch
from torch import Tensor

from fgtrain.forward_ad.rules.compositions import change_of, composition_of


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
    return (result + slope_old * change_of(x)).scatter_add(dim, index, slope_new * change_of(src))


def _products_of_others(x: Tensor, dim: int, index: Tensor, src: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """For every factor of the products at the positions of x, old or scattered, the product of the other factors."""
    factors = torch.where(counts > 0, x, 1)
    zeros = (factors == 0).to(x.dtype).scatter_add(dim, index, (src == 0).to(x.dtype))
    rest = torch.where(factors == 0, 1, factors)
    rest = torch.scatter_reduce(rest, dim, index, torch.where(src == 0, 1, src), "prod")  # of all nonzero factors

    def of_others(x: Tensor, rest: Tensor, zeros: Tensor) -> Tensor:
        return torch.where(x == 0, torch.where(zeros == 1, rest, 0), torch.where(zeros == 0, rest / x, 0))

    return of_others(factors, rest, zeros) * counts, of_others(src, rest.gather(dim, index), zeros.gather(dim, index))


@composition_of("segment_reduce")
def _segment_reduce(
    x: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: float | None = None,
) -> Any:
    """The sum, mean, maximum, minimum or product of every run of rows."""
    lengths = offsets.diff() if lengths is None and offsets is not None else lengths
    if lengths is None or lengths.dim() > 1 or indices is not None or axis or initial is not None:
        return NotImplemented
    starts = {"sum": 0.0, "mean": 0.0, "max": -torch.inf, "min": torch.inf, "prod": 1.0}
    out = x.new_full((len(lengths), *x.shape[1:]), starts[reduce])
    index = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)
    if reduce in ("max", "min", "prod"):
        return torch.index_reduce(out, 0, index, x, {"max": "amax", "min": "amin", "prod": "prod"}[reduce])
    out = out.index_add(0, index, x)
    return out / lengths.view(-1, *[1] * (x.dim() - 1)) if reduce == "mean" else out


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

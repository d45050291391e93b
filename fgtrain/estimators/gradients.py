"""Gradients by the names of parameters: their sums, their mean over ranks, and where they are written."""

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fgtrain._torch import foreach_norm
from fgtrain.errors import DivergenceError
from fgtrain.estimators.base import Reduce
from fgtrain.network.parameters import slots_of


def add_grad(grads: dict[str, Tensor], name: str, grad: Tensor) -> None:
    """Add the gradient of a parameter that is used several times to `grads`."""
    grads[name] = grads[name] + grad if name in grads else grad


def average_grads(grads: dict[str, Tensor], params: Mapping[str, Tensor], reduce: Reduce | None) -> dict[str, Tensor]:
    """The mean over ranks of all gradients, sent in one flat bucket; sparse ones, as of an embedding, stay sparse.

    Args:
        grads: the gradients of this rank.
        params: the parameters with a gradient on any rank. The gradient is 0 on a rank whose loss does not use them.
        reduce: mean over ranks.
    """
    if reduce is None or not params:
        return grads
    every = {name: grads[name] if name in grads else torch.zeros_like(p) for name, p in params.items()}
    flat = reduce(torch.cat([g.to_dense().flatten() for g in every.values()]))
    pieces = dict(zip(every, flat.split([g.numel() for g in every.values()]), strict=True))
    unused = unused_by_all_ranks({name: name in grads for name in without_numbers(pieces)}, flat, reduce)
    means = {}
    for name, g in every.items():
        if name not in unused:
            mean = pieces[name].view(g.shape).to(g.dtype)
            means[name] = mean.to_sparse(g.sparse_dim()) if g.is_sparse else mean
    return means


def without_numbers(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors whose numbers are all 0."""
    sizes = torch.stack(norms(list(tensors.values()))).tolist()
    return [name for name, size in zip(tensors, sizes, strict=True) if size == 0]


def unused_by_all_ranks(uses: Mapping[str, bool], like: Tensor, reduce: Reduce | None) -> list[str]:
    """The names of the parameters that the loss of no rank uses.

    Args:
        uses: {name of a parameter: whether the loss of this rank uses it}, with the same names on all ranks.
        like: a tensor of the dtype and device in which ranks exchange numbers.
        reduce: mean over ranks.
    """
    shares = list(uses.values())
    if reduce is not None and uses:
        shares = reduce(torch.tensor(shares).to(like)).tolist()
    return [name for name, share in zip(uses, shares, strict=True) if not share]


def of_mean_loss(losses: Tensor, derivatives: Tensor, reduce: Reduce | None, *, rowwise: bool = False) -> Tensor:
    """The derivatives (K,) of the mean loss of all ranks; if `rowwise`, its parts (K, B) from the row of each example.

    Args:
        losses: (B,) or ().
        derivatives: their derivatives, (K, B) or (K,).
        reduce: mean over ranks.
        rowwise: whether example i of the loss depends only on row i of every parameter.
    """
    if rowwise:
        derivatives = derivatives / losses.numel()
    elif losses.dim():
        derivatives = derivatives.mean(1)
    return derivatives if reduce is None else reduce(derivatives)


def write_grads(
    model: nn.Module, grads: Mapping[str, Tensor], *, accumulate: bool = False, check_finite: bool = True
) -> None:
    """Write gradients to `.grad`; no other function of fgtrain does this.

    Gradients with a nan or inf are refused, and `.grad` is not changed. To skip such a batch, catch the error and
    continue with the next one.

    Args:
        model: owner of the parameters.
        grads: {parameter name: tensor like the parameter}.
        accumulate: add to `.grad`, as backward() does, instead of replacing it (by None if `grads` has no entry).
        check_finite: check the norm of each gradient for nan and inf; on a GPU this waits for the gradients.

    Raises:
        ValueError: a name in `grads` is not that of a parameter.
        DivergenceError: a gradient is not finite.
    """
    params = slots_of(model).params
    if not grads.keys() <= params.keys():
        unknown = grads.keys() - params.keys()
        raise ValueError(
            f"gradients for {', '.join(sorted(unknown))}, which the model's named_parameters() do not list; write "
            "them to the model that the estimator was called with"
        )
    if check_finite:
        _refuse_non_finite(grads)
    for name, p in params.items():
        if name in grads:
            p.grad = grads[name] if p.grad is None or not accumulate else p.grad.add_(grads[name])
        elif not accumulate:
            p.grad = None


def _refuse_non_finite(grads: Mapping[str, Tensor]) -> None:
    tensors = list(grads.values())
    if tensors and not math.isfinite(torch.stack(norms(tensors)).amax()):  # amax of nan is nan
        name = next(name for name, g in grads.items() if not norms([g])[0].isfinite())
        raise DivergenceError(
            f"the gradient of {name!r} is not finite (so the loss or a derivative was not): nothing was written; skip "
            "this batch, look for nan in it, lower lr, or cap the derivative (clip_derivative=...)"
        )


def norms(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The norms, not finite if an entry is not; half precision is squared in single, to avoid overflow."""
    dtypes = {x.dtype for x in tensors}
    has_half = any(dtype.itemsize < 4 for dtype in dtypes)
    widest = functools.reduce(torch.promote_types, dtypes, torch.float32) if has_half else None
    return foreach_norm(tensors, 2, dtype=widest) if tensors else ()

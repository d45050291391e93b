"""Rules for whole families of functions: linear, multilinear and elementwise ones.

Each family knows one way to push (K, *shape) tangents through a function, whatever the function is.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fgtrain.directions import LowRankTangent
from fgtrain.forward_ad.dual import COMPOSITES, RULES, Dual, Rule, dual, per_direction, primal_of, tangent_of

_OWNERS = (torch, torch.Tensor, torch._C._nn)  # torch.nn.functional's own are written in Python and opened


def register(names: str) -> Callable[[Rule], Rule]:
    """Make the decorated function the rule of every function of PyTorch with one of these names."""

    def decorate(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(_functions(names), rule))
        return rule

    return decorate


def register_composite(names: str) -> Callable[[Rule], Rule]:
    """Make the decorated function stand for every function of PyTorch with one of these names."""

    def decorate(rule: Rule) -> Rule:
        COMPOSITES.update(dict.fromkeys(_functions(names), rule))
        return rule

    return decorate


def _register_family(names: str, family: Callable[[Any], Rule]) -> None:
    RULES.update({func: family(func) for func in _functions(names)})


def _functions(names: str) -> Iterator[Any]:
    return (getattr(owner, name) for name in names.split() for owner in _OWNERS if hasattr(owner, name))


# --- linear in all their dual arguments together ------------------------------------------------------------------


def linear(func: Any, of_tangents: Any = None) -> Rule:
    """f(v_1, .., v_K): the function itself, or the one named for it, applied to the tangents."""
    of_tangents = of_tangents or func

    def rule(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        sources = [leaf for leaf in leaves if isinstance(leaf, Dual)]
        values = [primal_of(leaf) for leaf in leaves]
        positional, keywords = tree_unflatten(values, spec)
        primal = func(*positional, **keywords)
        is_dual = [isinstance(leaf, Dual) for leaf in leaves]
        constant = [None if dual else _derivative_of_constant(v) for v, dual in zip(values, is_dual, strict=True)]

        def along(*tangents: Tensor) -> Any:
            moving = iter(tangents)
            moved = [next(moving) if dual else c for dual, c in zip(is_dual, constant, strict=True)]
            positional, keywords = tree_unflatten(moved, spec)
            return of_tangents(*positional, **keywords)

        return _zip_duals(primal, _map_directions(along, sources), sources)

    return rule


def _derivative_of_constant(value: Any) -> Any:
    """Tensors that are values have the derivative 0; masks, indices and sizes choose, and stay."""
    return torch.zeros_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _map_directions(along: Any, sources: list[Dual]) -> Any:
    """along(v_1, v_2, ..) for every direction; views stay views."""
    tangents = [tangent_of(source) for source in sources]
    if tangents[0].shape[0] == 1:
        return tree_map(lambda out: out.unsqueeze(0), along(*(t[0] for t in tangents)))
    return torch.vmap(along)(*tangents)


def _zip_duals(primals: Any, tangents: Any, sources: list[Dual]) -> Any:
    """One dual per output."""
    values, spec = tree_flatten(primals)
    moved, _ = tree_flatten(tangents)
    return tree_unflatten([dual(p, t, *sources) for p, t in zip(values, moved, strict=True)], spec)


_register_family(
    """
    reshape flatten unflatten permute transpose swapaxes swapdims movedim t unsqueeze squeeze expand expand_as
    reshape_as ravel
    contiguous clone narrow select unbind chunk split split_with_sizes tensor_split flip roll rot90 repeat tile
    repeat_interleave broadcast_to index_select gather take take_along_dim masked_select diagonal diag diag_embed tril
    triu unfold fold __getitem__ cat concat stack hstack vstack dstack sum mean cumsum trace neg
    pixel_shuffle pixel_unshuffle channel_shuffle to float double half bfloat16 type
    type_as as_strided real
    """,
    linear,
)
RULES[torch.Tensor.view] = linear(torch.Tensor.view, torch.Tensor.reshape)  # tangents may be laid out otherwise
RULES[torch.Tensor.view_as] = linear(torch.Tensor.view_as, torch.Tensor.reshape_as)
for _name in ("T", "mT"):
    _get = getattr(torch.Tensor, _name).__get__
    RULES[_get] = linear(_get)


def _over_examples(func: Any) -> Rule:
    """For functions linear in (N, C, ..) that act on every example alike: K directions are K times as many examples."""
    spatial = int(func.__name__[-2])

    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        primal, tangent = primal_of(x), tangent_of(x)
        if primal.dim() != spatial + 2:
            return NotImplemented
        return dual(
            func(primal, *args, **kwargs), func(tangent.flatten(0, 1), *args, **kwargs).unflatten(0, tangent.shape[:2])
        )

    return rule


_register_family(
    """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d upsample_trilinear3d upsample_bicubic2d
    """,
    _over_examples,
)


@register("masked_fill")
def _masked_fill(x: Any, mask: Tensor, value: Any) -> Any:
    if isinstance(value, Tensor) or not isinstance(x, Dual):
        return NotImplemented
    primal, tangent = primal_of(x), tangent_of(x)
    return dual(primal.masked_fill(mask, value), tangent.masked_fill(aligned(mask[None], primal.dim()), 0))


@register("where")
def _where(condition: Tensor, x: Any, y: Any) -> Any:
    primal = torch.where(condition, primal_of(x), primal_of(y))
    xt, yt = (0 if t is None else aligned(t, primal.dim()) for t in (tangent_of(x), tangent_of(y)))
    return dual(primal, torch.where(condition, xt, yt))


@register("pad constant_pad_nd")
def _pad(x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    def along(tangent: Tensor) -> Tensor:
        return F.pad(tangent, pad, mode)

    return dual(F.pad(primal_of(x), pad, mode, value), _map_directions(along, [x]))


# --- linear in each dual argument by itself -----------------------------------------------------------------------


def multilinear(func: Any) -> Rule:
    """sum_i f(x_1, .., v_i, .., x_n): the product rule."""

    def rule(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        values = [primal_of(leaf) for leaf in leaves]
        positional, keywords = tree_unflatten(values, spec)
        primal, total = func(*positional, **keywords), None
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Dual):

                def along(tangent: Tensor, i: int = i) -> Any:
                    positional, keywords = tree_unflatten([*values[:i], tangent, *values[i + 1 :]], spec)
                    return func(*positional, **keywords)

                term = _map_directions(along, [leaf])
                total = term if total is None else total + term
        return dual(primal, total)

    return rule


_register_family("mv dot outer inner tensordot kron vdot einsum", multilinear)


# --- elementwise --------------------------------------------------------------------------------------------------


def elementwise(func: Any) -> Rule:
    """f'(x) v_k, with f'(x) from one pass of PyTorch's forward mode for all directions."""

    def rule(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        (first, *others), x = leaves, args[0] if args else None
        if not isinstance(x, Dual) or first is not x or any(isinstance(leaf, Tensor) for leaf in others):
            return NotImplemented
        if x.is_complex():  # |z| has no derivative to multiply with
            return NotImplemented
        with fwAD.dual_level():
            primal = primal_of(x)
            positional, keywords = tree_unflatten([fwAD.make_dual(primal, torch.ones_like(primal)), *others], spec)
            value, slope = fwAD.unpack_dual(func(*positional, **keywords))
        return dual(value, None if slope is None else tangent_of(x) * slope)

    return rule


_register_family(
    """
    abs exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan asin acos atan sinh cosh tanh
    asinh acosh atanh sigmoid logit erf erfc erfinv lgamma digamma clamp clip pow gelu silu mish elu selu celu
    leaky_relu relu6 hardtanh hardswish hardsigmoid hardshrink softshrink softplus softsign logsigmoid tanhshrink
    threshold sinc frac floor ceil round trunc sign nan_to_num
    """,
    elementwise,
)


# --- sums and products of two --------------------------------------------------------------------------------------


def aligned(tangent: Any, ndim: int) -> Any:
    """(K, *shape) with as many dimensions after K as the value it will be added to or multiplied with."""
    if tangent is None or tangent.dim() == ndim + 1:
        return tangent
    return tangent.reshape(tangent.shape[0], *[1] * (ndim + 1 - tangent.dim()), *tangent.shape[1:])


@register("add __add__ __radd__")
def _add(x: Any, y: Any, *, alpha: float = 1) -> Any:
    return _sum(torch.add(primal_of(x), primal_of(y), alpha=alpha), x, y, alpha)


@register("sub __sub__ subtract")
def _sub(x: Any, y: Any, *, alpha: float = 1) -> Any:
    return _sum(torch.sub(primal_of(x), primal_of(y), alpha=alpha), x, y, -alpha)


@register("rsub")
def _rsub(x: Any, y: Any, *, alpha: float = 1) -> Any:
    return _sum(torch.rsub(primal_of(x), primal_of(y), alpha=alpha), y, x, -alpha)


def _sum(primal: Tensor, x: Any, y: Any, scale: float) -> Tensor:
    xt, yt = aligned(tangent_of(x), primal.dim()), aligned(tangent_of(y), primal.dim())
    if xt is None or yt is None:
        return dual(primal, xt if yt is None else yt * scale if scale != 1 else yt)
    return dual(primal, torch.add(xt, yt, alpha=scale))


@register("add_ __iadd__")
def _add_in_place(x: Any, y: Any, *, alpha: float = 1) -> Any:
    xt, yt = tangent_of(x), tangent_of(y)
    if xt is None or yt is None or x.aliased or yt.shape != xt.shape:
        return NotImplemented
    primal_of(x).add_(primal_of(y), alpha=alpha)
    xt.add_(yt, alpha=alpha)
    return x


@register("mul __mul__ __rmul__ multiply")
def _mul(x: Any, y: Any) -> Any:
    px, py = primal_of(x), primal_of(y)
    primal = torch.mul(px, py)
    xt, yt = aligned(tangent_of(x), primal.dim()), aligned(tangent_of(y), primal.dim())
    left, right = (None if xt is None else xt * py), (None if yt is None else yt * px)
    return dual(primal, left if right is None else right if left is None else left + right)


@register("div __truediv__ true_divide divide")
def _div(x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return NotImplemented
    px, py = primal_of(x), primal_of(y)
    primal = torch.div(px, py)
    xt, yt = aligned(tangent_of(x), primal.dim()), aligned(tangent_of(y), primal.dim())
    if yt is None:
        return dual(primal, xt / py)
    return dual(primal, ((0 if xt is None else xt) - primal * yt) / py)


_PER_DIRECTION_MATMUL = per_direction(torch.matmul)


@register("matmul __matmul__ __rmatmul__ mm bmm")
def _matmul(x: Any, y: Any) -> Any:
    px, py = primal_of(x), primal_of(y)
    if px.dim() < 2 or py.dim() < 2:
        return _PER_DIRECTION_MATMUL(x, y)
    primal = torch.matmul(px, py)
    total = None
    if isinstance(x, Dual):
        total = torch.matmul(aligned(tangent_of(x), primal.dim()), py)
    if isinstance(y, Dual):
        term = _times_matrix(px, y, primal.dim())
        total = term if total is None else total + term
    return dual(primal, total)


def _times_matrix(x: Tensor, y: Dual, ndim: int) -> Tensor:
    """(K, ..): x times the tangents of y."""
    tangent = y.tangent
    if isinstance(tangent, LowRankTangent) and len(tangent.shape) == 2:
        left, right = (aligned(factor, ndim) for factor in tangent.factors)
        return torch.matmul(torch.matmul(x, left.mT), right)
    return torch.matmul(x, aligned(tangent_of(y), ndim))

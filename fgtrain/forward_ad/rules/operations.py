"""Rules for whole families of functions: linear, multilinear and elementwise ones.

Each family has one way to push (K, *shape) tangents through any of its functions.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn import functional as F

from fgtrain._torch import tree_flatten, tree_map, tree_unflatten
from fgtrain.forward_ad.dual import Dual, dual, primal_of, tangent_of
from fgtrain.forward_ad.registry import RULES, Rule, functions_named, register
from fgtrain.forward_ad.rules.arithmetic import aligned
from fgtrain.forward_ad.steep import STEEP, where_moved
from fgtrain.forward_ad.transposed import laid_out


def _register_family(names: str, family: Callable[[Any], Rule]) -> None:
    RULES.update({func: family(func) for func in functions_named(names)})


# --- linear in the first argument ---------------------------------------------------------------------------------


def linear(func: Any, of_tangents: Any = None) -> Rule:
    """f(v_1), .., f(v_K) for an f that is linear in its first argument, a tensor.

    The other arguments (an index, a mask, a size, a tensor of which only the shape or dtype is used) have no tangents;
    their values are used.

    Args:
        func: the function.
        of_tangents: the function to apply to the tangents, if not `func`.
    """
    of_tangents = of_tangents or func

    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _plain(args, kwargs)
        primal = func(primal_of(x), *args, **kwargs)
        if not isinstance(x, Dual):
            return primal
        return _zip_duals(primal, map_directions(lambda v: of_tangents(v, *args, **kwargs), [x]), [x])

    return rule


def linear_in_list(func: Any) -> Rule:
    """As `linear`, for an f of a list of tensors; those without tangents get zeros."""

    def rule(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _plain(args, kwargs)
        primals = [primal_of(x) for x in tensors]
        primal, sources = func(primals, *args, **kwargs), [x for x in tensors if isinstance(x, Dual)]
        if not sources:
            return primal
        still = [None if isinstance(x, Dual) else torch.zeros_like(p) for x, p in zip(tensors, primals, strict=True)]

        def along(*tangents: Tensor) -> Any:
            moving = iter(tangents)
            return func([next(moving) if zero is None else zero for zero in still], *args, **kwargs)

        return _zip_duals(primal, map_directions(along, sources), sources)

    return rule


def _plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with every dual among them replaced by its value."""
    named = {name: x.primal if isinstance(x, Dual) else x for name, x in kwargs.items()}
    return tuple(x.primal if isinstance(x, Dual) else x for x in args), named


def map_directions(along: Any, sources: list[Dual]) -> Any:
    """Stack the results of along(v_1, v_2, ..) for every direction; views stay views."""
    tangents = [tangent_of(source) for source in sources]
    num = tangents[0].shape[0]
    if num == 1:
        return tree_map(lambda out: out.unsqueeze(0), along(*(t[0] for t in tangents)))
    try:
        return torch.vmap(along)(*tangents)
    except RuntimeError:  # vmap does not support every function
        results = [along(*(t[k] for t in tangents)) for k in range(num)]
        return tree_map(lambda *outs: torch.stack(outs), *results)


def _zip_duals(primals: Any, tangents: Any, sources: list[Dual]) -> Any:
    """One dual per output."""
    if isinstance(primals, Tensor):
        return dual(primals, tangents, *sources)
    values, spec = tree_flatten(primals)
    moved, _ = tree_flatten(tangents)
    return tree_unflatten([dual(p, t, *sources) for p, t in zip(values, moved, strict=True)], spec)


_register_family(
    """
    reshape flatten unflatten permute transpose swapaxes swapdims movedim t unsqueeze squeeze expand expand_as
    reshape_as ravel
    contiguous clone narrow select unbind chunk split split_with_sizes tensor_split flip rot90 repeat tile
    repeat_interleave broadcast_to index_select gather take take_along_dim masked_select diagonal diag diag_embed tril
    triu unfold fold __getitem__ sum mean cumsum trace neg
    pixel_shuffle pixel_unshuffle channel_shuffle to float double half bfloat16 type
    type_as as_strided real adjoint hsplit vsplit dsplit view_as_complex view_as_real
    """,
    linear,
)
_register_family("cat concat stack hstack vstack dstack", linear_in_list)


@register("roll")
def _roll(x: Dual, *args: Any, **kwargs: Any) -> Any:
    if x.dim() == 0:  # here vmap would roll the directions
        return x
    return _ROLL(x, *args, **kwargs)


_ROLL = linear(torch.roll)
RULES[torch.constant_pad_nd] = linear(torch.constant_pad_nd, lambda v, pad, *_: torch.constant_pad_nd(v, pad))
RULES[torch.Tensor.view] = linear(torch.Tensor.view, torch.Tensor.reshape)  # tangents may have other strides
RULES[torch.Tensor.view_as] = linear(torch.Tensor.view_as, torch.Tensor.reshape_as)
for _name in ("T", "mT", "H", "mH"):
    _get = getattr(torch.Tensor, _name).__get__
    RULES[_get] = linear(_get)


def _over_examples(func: Any) -> Rule:
    """A rule for functions linear in (N, C, ..) that act on each example: K directions are K times as many examples."""
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


@register("grid_sampler grid_sampler_2d grid_sampler_3d")
def _grid_sampler(x: Any, grid: Any, *options: Any) -> Any:
    """At constant positions it is linear in the image: K directions become K times as many channels."""
    if isinstance(grid, Dual):
        return NotImplemented
    primal, tangent = primal_of(x), tangent_of(x)
    moved = torch.grid_sampler(tangent.transpose(0, 1).flatten(1, 2), grid, *options)  # (N, K C, ..)
    return dual(torch.grid_sampler(primal, grid, *options), moved.unflatten(1, (len(tangent), -1)).transpose(0, 1))


@register("masked_fill")
def _masked_fill(x: Any, mask: Tensor, value: Any) -> Any:
    if isinstance(value, Tensor) or not isinstance(x, Dual):
        return NotImplemented
    primal = torch.masked_fill(primal_of(x), mask, value)
    return dual(primal, torch.masked_fill(aligned(tangent_of(x), primal.dim()), mask, 0))


def _where(condition: Any, x: Any, y: Any) -> Any:
    condition = primal_of(condition)
    primal = torch.where(condition, primal_of(x), primal_of(y))
    xt, yt = (0 if t is None else aligned(t, primal.dim()) for t in (tangent_of(x), tangent_of(y)))
    return dual(primal, torch.where(condition, xt, yt))


def _where_method(x: Any, condition: Any, y: Any) -> Any:
    return _where(condition, x, y)


RULES[torch.where] = _where
RULES[torch.Tensor.where] = _where_method


@register("pad")
def _pad(x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    def along(tangent: Tensor) -> Tensor:
        return F.pad(tangent, pad, mode)

    return dual(F.pad(primal_of(x), pad, mode, value), map_directions(along, [x]))


# --- linear in each dual argument separately ----------------------------------------------------------------------


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

                term = map_directions(along, [leaf])
                total = term if total is None else total + term
        return dual(primal, total)

    return rule


_register_family("mv dot outer inner tensordot kron vdot einsum", multilinear)


# --- elementwise --------------------------------------------------------------------------------------------------


def elementwise(func: Any) -> Rule:
    """f'(x) v_k for all directions, with f'(x) from one pass of PyTorch's forward mode."""

    def rule(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        (first, *others), x = leaves, args[0] if args else None
        if not isinstance(x, Dual) or first is not x or any(isinstance(leaf, Tensor) for leaf in others):
            return NotImplemented
        if x.is_complex():  # |z| is not complex differentiable
            return NotImplemented
        with fwAD.dual_level():
            primal = laid_out(primal_of(x))
            positional, keywords = tree_unflatten([fwAD.make_dual(primal, torch.ones_like(primal)), *others], spec)
            value, slope = fwAD.unpack_dual(func(*positional, **keywords))
        if slope is None:
            return value
        tangent = tangent_of(x)
        return dual(value, where_moved(tangent * slope, tangent) if func in STEEP else tangent * slope)

    return rule


_register_family(
    """
    abs exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan asin acos atan sinh cosh tanh
    asinh acosh atanh sigmoid logit erf erfc erfinv lgamma digamma clamp clip pow gelu silu mish elu selu celu
    leaky_relu relu6 hardtanh hardswish hardsigmoid hardshrink softshrink softplus softsign logsigmoid tanhshrink
    threshold sinc frac floor ceil round trunc sign
    """,
    elementwise,
)

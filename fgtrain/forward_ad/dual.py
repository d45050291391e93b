"""Stacked dual numbers: a value together with its derivatives along K directions, all carried by one pass.

PyTorch's own dual tensors hold one tangent. A `Dual` holds K of them as one tensor (K, *shape), so that a layer does
its work for the value and for all directions in a few large operations. It is a tensor without storage: Python calls
reach `__torch_function__` and find a rule there; whatever would slip past it (a compiled extension, say) arrives at
`__torch_dispatch__`, which refuses. So a derivative can be slow to get or refused, but never silently lost.

What is done with a call, in this order:

1. a rule: of `fgtrain.forward_ad.rules`, `.products`, `.layers`, `.losses` or `.sequence`;
2. what only reads the value is asked of the value; what changes its argument in place is computed anew and copied;
3. a function that PyTorch writes in Python is opened: its body runs, and the calls in it are looked up in turn;
4. PyTorch's own forward mode, one direction at a time.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fgtrain.directions import Tangent
from fgtrain.forward_ad.passes import NotIntercepted, RandomState

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
"""Rules that work on values and tangents; they may answer NotImplemented."""

COMPOSITES: dict[Any, Rule] = {}
"""Functions written out in others: their calls are looked up in turn."""

FALLBACKS: dict[Any, tuple[bool, Rule]] = {}
"""What is done where no rule answers, decided at the first call: (is it a composite, the rule)."""


@contextmanager
def without_rules() -> Generator[None]:
    """A context in which no fast rule is used: slower, with the same numbers. For tests, and to suspect a rule."""
    kept = [(table, dict(table)) for table in (RULES, COMPOSITES)]
    try:
        for table, _ in kept:
            table.clear()
        yield
    finally:
        for table, entries in kept:
            table.update(entries)


class Dual(Tensor):
    """A tensor and its derivatives along K directions.

    Args:
        primal: the value.
        tangent: (K, *primal.shape), or a low-rank form of it (weights).
    """

    primal: Tensor
    tangent: Any  # Tangent; a kept parameter has None between two passes
    aliased: bool  # the primal shares memory with another dual's, the tangent does not

    @staticmethod
    def __new__(cls: type, primal: Tensor, tangent: Tangent, *_: Any) -> "Dual":
        # requires_grad: a custom autograd.Function leaves its mark on what it returns, see `primal_of`.
        make: Any = torch.Tensor._make_wrapper_subclass
        return make(
            cls, primal.shape, strides=primal.stride(), dtype=primal.dtype, device=primal.device, requires_grad=True
        )

    def __init__(self, primal: Tensor, tangent: Tangent) -> None:
        self.primal = primal
        self.tangent = tangent
        self.aliased = False

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})

    @classmethod  # torch's stub has the parameters in another order than its callers
    def __torch_dispatch__(  # ty: ignore[incompatible-method-override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotIntercepted(f"{func} was reached past the functions of PyTorch")


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of func(*args, **kwargs), some of whose arguments are duals."""
    if not torch.is_grad_enabled():  # the model's own no_grad: constants to backpropagation, and so here
        with torch._C.DisableTorchFunctionSubclass():
            return func(*values(args), **values(kwargs))
    composite = COMPOSITES.get(func)
    result = NotImplemented if composite is None else _as_user_code(composite, args, kwargs)
    if result is NotImplemented and func in RULES:
        result = _on_values(RULES[func], args, kwargs)
    if result is NotImplemented:
        if func not in FALLBACKS:
            FALLBACKS[func] = _find_fallback(func)
        is_composite, rule = FALLBACKS[func]
        if kwargs.get("out") is not None:
            raise NotIntercepted(f"{getattr(func, '__name__', func)} writes into its argument out")
        result = (_as_user_code if is_composite else _on_values)(rule, args, kwargs)
    return result


def _on_values(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a rule: no graph is recorded, and duals are plain objects to it."""
    torch._C._set_grad_enabled(False)
    try:
        with torch._C.DisableTorchFunctionSubclass():
            return rule(*args, **kwargs)
    finally:
        torch._C._set_grad_enabled(True)


def _as_user_code(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a composite as if its lines stood in the user's model."""
    with torch._C._EnableTorchFunction():
        return rule(*args, **kwargs)


# --- what rules are written with ----------------------------------------------------------------------------------


def primal_of(x: Any) -> Any:
    """The value of a dual, anything else as it is.

    Raises:
        NotIntercepted: a backward pass is prepared for: the tensor comes out of a custom autograd.Function, whose own
            rule was passed by, or the loss takes a derivative in this tensor, by torch.autograd.grad say.
    """
    if isinstance(x, Tensor):
        if x.grad_fn is not None:
            raise NotIntercepted(f"{type(x.grad_fn).__name__} was recorded for a backward pass")
        if isinstance(x, Dual):
            return x.primal
        if x.requires_grad:
            raise NotIntercepted("a tensor that is no parameter of the model requires a gradient")
    return x


def tangent_of(x: Any) -> Any:
    """The tangent of a dual written out, a tensor (K, *shape); None of anything else."""
    if not isinstance(x, Dual):
        return None
    if not isinstance(x.tangent, Tensor):
        x.tangent = x.tangent.dense()
    return x.tangent


def joint_of(x: Any) -> Tensor | None:
    """(1 + K, *shape): the value and the tangents of a dual as one tensor, if they are the parts of one."""
    if not isinstance(x, Dual) or not isinstance(x.tangent, Tensor) or x.primal._base is None:
        return None
    joint, value, moved = x.primal._base, x.primal, x.tangent
    if moved._base is not joint or joint.shape != (1 + len(moved), *value.shape):
        return None
    offsets = [t.storage_offset() - joint.storage_offset() for t in (value, moved)]
    in_order = offsets == [0, value.numel()] and all(t.is_contiguous() for t in (joint, value, moved))
    return joint if in_order else None


def num_directions(*arguments: Any) -> int:
    """K, of the first dual among the arguments."""
    tangent = next(x.tangent for x in arguments if isinstance(x, Dual))
    return tangent.shape[0] if isinstance(tangent, Tensor) else tangent.num


def dual(primal: Tensor, tangent: Tensor | None, *sources: Dual) -> Tensor:
    """A dual; the value itself where there is no tangent.

    Args:
        primal: the value.
        tangent: (K, *primal.shape), or what expands and converts to it.
        sources: duals of which this one may be a view. A value that shares their memory while the tangent does not
            must never be changed in place.
    """
    if tangent is None or not is_differentiable(primal):
        return primal
    if tangent.dtype != primal.dtype:
        tangent = tangent.to(primal.dtype)
    if tangent.shape[1:] != primal.shape:
        tangent = tangent.expand(-1, *primal.shape).contiguous()
    result = Dual(primal, tangent)
    for source in sources:
        if _share_memory(primal, source.primal) and not _share_memory(tangent, tangent_of(source)):
            result.aliased = source.aliased = True
    return result


def is_differentiable(x: Any) -> bool:
    """Whether x is a tensor of real or complex numbers."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _share_memory(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def values(tree: Any) -> Any:
    """A nest of arguments with every dual replaced by its value."""
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([primal_of(leaf) for leaf in leaves], spec)


# --- PyTorch's own forward mode -----------------------------------------------------------------------------------


def per_direction(func: Any) -> Rule:
    """Func by PyTorch's forward mode, once per direction; every repetition sees the same random numbers."""

    def rule(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        sources = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Dual)}
        pairs = [(i, _laid_out(primal_of(source)), tangent_of(source)) for i, source in sources.items()]
        num_tangents = pairs[0][2].shape[0]
        random_state = RandomState({primal.device for _, primal, _ in pairs}) if num_tangents > 1 else None
        plain = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not isinstance(leaf, Dual)]
        untouched = [leaves[i].clone() for i in plain] if num_tangents > 1 else []
        columns, out_spec = [], None
        for k in range(num_tangents):
            if random_state is not None:
                random_state.restore()
            if k:  # running statistics and the like have changed already
                for i, leaf in zip(plain, untouched, strict=True):
                    leaves[i] = leaf.clone()
            with fwAD.dual_level():
                for i, primal, tangent in pairs:
                    leaves[i] = fwAD.make_dual(primal, tangent[k])
                positional, keywords = tree_unflatten(leaves, spec)
                outputs, out_spec = tree_flatten(func(*positional, **keywords))
                columns.append([fwAD.unpack_dual(o) if is_differentiable(o) else (o, None) for o in outputs])
        assert out_spec is not None
        results = []
        for parts in zip(*columns, strict=True):
            primal, tangent = parts[0]
            if tangent is not None:
                tangent = torch.stack([part[1] for part in parts]) if num_tangents > 1 else tangent.unsqueeze(0)
            results.append(dual(primal, tangent, *sources.values()))
        return tree_unflatten(results, out_spec)

    return rule


def _laid_out(primal: Tensor) -> Tensor:
    """An expanded tensor in memory of its own: forward mode wants the tangent in the layout of the value."""
    return primal.contiguous() if 0 in primal.stride() else primal


def _find_fallback(func: Any) -> tuple[bool, Rule]:
    from fgtrain.forward_ad.fallbacks import find_fallback  # it builds on what stands here

    return find_fallback(func)

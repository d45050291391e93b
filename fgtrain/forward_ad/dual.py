"""Stacked dual numbers: a value together with its derivatives along K directions, all carried by one pass.

PyTorch's own dual tensors hold one tangent. A `Dual` holds K of them as one tensor (K, *shape), so that a layer does
its work for the value and for all directions in a few large operations. It is a tensor without storage: Python calls
reach `__torch_function__` and find a rule there; whatever would slip past it (a compiled extension, say) arrives at
`__torch_dispatch__`, which refuses. So a derivative can be slow to get or refused, but never silently lost.

What is done with a call, in this order:

1. a rule: of `fgtrain.forward_ad.rules.operations`, `.products`, `.layers` or `.losses`;
2. a function that is written out in others: the calls in it are looked up in turn;
3. what only reads the value is asked of the value; what changes its argument in place is computed anew and copied;
4. a function that PyTorch writes in Python is opened: its body runs, and the calls in it are looked up in turn;
5. PyTorch's own forward mode, one direction at a time.

A result that comes out without tangents, though backpropagation would follow it, is refused. A dual belongs to its
pass: in a later one it is refused, and between passes it is its value.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from fgtrain._torch import (
    overrides_of_tensors,
    plain_tensors,
    set_grad_enabled,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)
from fgtrain.errors import UnsupportedOperation
from fgtrain.forward_ad.dropped import is_differentiable, refuse_if_lost
from fgtrain.forward_ad.kept import of_earlier_pass
from fgtrain.forward_ad.passes import NotIntercepted, RandomState, TakenDown, WritesIntoPlain
from fgtrain.forward_ad.rules.written_out import IN_OTHERS
from fgtrain.tangents.directions import LowRankTangent, Tangent

Rule = Callable[..., Any]
LocalGrads = Callable[[Tensor], tuple[Tensor, Tensor]]

RULES: dict[Any, Rule] = {}
"""Rules that work on values and tangents; they may answer NotImplemented."""


class Fallback(NamedTuple):
    """What is done with a function that has no rule.

    Args:
        rule: called with its arguments.
        is_opened: the rule is the function's own body, in which calls are looked up in turn.
        reads: it takes nothing that could be differentiated.
    """

    rule: Rule
    is_opened: bool = False
    reads: bool = False


class _Fallbacks(dict[Any, Fallback]):
    """{function: what is done with it}, decided at its first call by `find`, which `rules.fallbacks` brings."""

    find: Callable[[Any], Fallback]

    def __missing__(self, func: Any) -> Fallback:
        self[func] = found = self.find(func)
        return found


FALLBACKS = _Fallbacks()


@contextmanager
def without_rules() -> Generator[None]:
    """A context in which no fast rule is used: slower, with the same numbers. For tests, and to suspect a rule."""
    kept = dict(RULES)
    try:
        RULES.clear()
        yield
    finally:
        RULES.update(kept)


class running_pass:  # noqa: N801 - a context manager used like a function
    """A context in which the duals made in it carry derivatives.

    Args:
        follows: whether to check that results without tangents have not lost them.
        adopting: follows plain tensors that duals are written into; None where the model writes into none.

    Attributes:
        width: the number of directions, if duals that were made before have fewer: see `widen`.
    """

    def __init__(self, *, follows: bool = True, adopting: Any = None) -> None:
        self.follows = follows
        self.adopting = adopting
        self.width: int | None = None

    def __enter__(self) -> "running_pass":
        self._outer, _running.one = _running.one, self
        return self

    def __exit__(self, *_: object) -> None:
        _running.one, self._outer = self._outer, None


class _Running(threading.local):
    """The pass that runs in a thread."""

    one: running_pass | None = None


_running = _Running()


def widen(num: int) -> None:
    """Carry `num` directions from here on: a dual of the pass that has fewer gets zeros for the others."""
    assert _running.one is not None
    _running.one.width = num


def _widened(args: Any, kwargs: Any, width: int) -> None:
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, Dual) and isinstance(x.tangent, (Tensor, LowRankTangent)) and num_directions(x) < width:
            tangent = tangent_of(x)
            x.tangent = torch.cat([tangent, tangent.new_zeros(width - len(tangent), *tangent.shape[1:])])


class OutputTangent(ABC):
    """The tangent of a weight that acts at its layer's output: the rule of the layer hands the output over."""

    @property
    @abstractmethod
    def num(self) -> int:
        """K."""

    @abstractmethod
    def perturb(self, inputs: Tensor, output: Tensor, local_grads: LocalGrads, channels: int) -> Tensor:
        """What takes the place of the output.

        Args:
            inputs: of the layer, its value.
            output: what the layer gives with the weight as it is.
            local_grads: maps the gradient of the output to those of weight and bias.
            channels: dimension of the output's channels.
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """Raises: the weight is used by something that is not its layer."""


class Dual(Tensor):
    """A tensor and its derivatives along K directions.

    Args:
        primal: the value.
        tangent: (K, *primal.shape), or a low-rank form of it (weights).
    """

    primal: Tensor
    tangent: Any  # Tangent; a kept parameter has None between two passes
    of_pass: running_pass | None
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
        self.renew(tangent)

    def renew(self, tangent: Any) -> None:
        """Carry this tangent in the pass that runs."""
        self.tangent = tangent
        self.of_pass = _running.one
        self.aliased = False

    __hash__ = object.__hash__

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.primal.clone()

    def __reduce_ex__(self, proto: Any) -> Any:
        return self.primal.__reduce_ex__(proto)

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
    # The model's own no_grad makes constants for backpropagation, and so here; a dual outside its pass is a constant.
    running = _running.one
    if running is None or not torch.is_grad_enabled():
        with plain_tensors():
            return func(*values(args), **values(kwargs))
    if running.width is not None:
        _on_values(_widened, (args, kwargs, running.width), {})
    result = _on_values(RULES[func], args, kwargs) if func in RULES else NotImplemented
    if result is NotImplemented and func in IN_OTHERS:
        result = _as_user_code(IN_OTHERS[func], args, kwargs)
        if result is not NotImplemented:
            return result
    if result is NotImplemented:
        fallback = FALLBACKS[func]
        if kwargs.get("out") is not None:
            raise NotIntercepted(f"{getattr(func, '__name__', func)} writes into its argument out")
        result = (_as_user_code if fallback.is_opened else _on_values)(fallback.rule, args, kwargs)
        if fallback.reads or fallback.is_opened:  # the calls in it have been looked at
            return result
    if not isinstance(result, Dual) and isinstance(result, (Tensor, tuple, list)) and running.follows:
        _on_values(refuse_if_lost, (func, args, kwargs, result, _is_dual, _value_of), {})
    return result


def _is_dual(x: Any) -> bool:
    return isinstance(x, Dual)


def _value_of(x: Any) -> Any:
    return x.primal if isinstance(x, Dual) else x


def _on_values(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a rule: no graph is recorded, and duals are plain objects to it."""
    set_grad_enabled(False)
    try:
        with plain_tensors():
            return rule(*args, **kwargs)
    finally:
        set_grad_enabled(True)


def _as_user_code(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a body as if its lines stood in the user's model."""
    adopting = _running.one.adopting if _running.one is not None else None
    with overrides_of_tensors(), adopting or _NOTHING:
        return rule(*args, **kwargs)


_NOTHING = nullcontext()


def adopted(x: Tensor, name: str, num: int) -> Dual:
    """The dual of a plain tensor that `name` writes duals of `num` directions into.

    Raises:
        WritesIntoPlain: the pass was not prepared for it.
    """
    assert _running.one is not None
    if _running.one.adopting is None:
        raise WritesIntoPlain(f"{name} writes into a tensor that has no tangent")
    return _running.one.adopting.adopt(x, num)


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
    """The tangent of a dual written out, a tensor (K, *shape); None of anything else.

    Raises:
        UnsupportedOperation: the dual is of an earlier pass.
    """
    if not isinstance(x, Dual):
        return None
    if x.of_pass is not _running.one:
        raise UnsupportedOperation(of_earlier_pass(x))
    if not isinstance(x.tangent, Tensor):
        x.tangent = x.tangent.dense()
    return x.tangent


def joint_of(x: Any) -> Tensor | None:
    """(1 + K, *shape): the value and the tangents of a dual as one tensor, if they are the parts of one."""
    if not isinstance(x, Dual) or not isinstance(x.tangent, Tensor) or x.primal._base is None:
        return None
    if x.of_pass is not _running.one:
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
    if primal.layout != torch.strided:
        raise NotIntercepted("a sparse tensor moves")
    if tangent.dtype != primal.dtype:
        tangent = tangent.to(primal.dtype)
    if tangent.shape[1:] != primal.shape:
        tangent = tangent.expand(-1, *primal.shape).contiguous()
    result = Dual(primal, tangent)
    for source in sources:
        if _share_memory(primal, source.primal) and not _share_memory(tangent, tangent_of(source)):
            result.aliased = source.aliased = True
    return result


def _share_memory(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def values(tree: Any) -> Any:
    """A nest of arguments with every dual replaced by its value."""
    return tree_map_only(Dual, _value_of, tree)


# --- PyTorch's own forward mode -----------------------------------------------------------------------------------


def per_direction(func: Any) -> Rule:
    """Func by PyTorch's forward mode, once per direction; every repetition sees the same random numbers."""

    def rule(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        sources = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Dual)}
        pairs = [(i, laid_out(primal_of(source)), tangent_of(source)) for i, source in sources.items()]
        num_tangents = pairs[0][2].shape[0]
        random_state = RandomState({primal.device for _, primal, _ in pairs}) if num_tangents > 1 else None
        plain = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not isinstance(leaf, Dual)]
        untouched = [leaves[i].clone() for i in plain] if num_tangents > 1 else []
        columns, out_spec, drawn = [], None, TakenDown.draws
        for k in range(num_tangents):
            if random_state is not None:
                if TakenDown.draws != drawn:
                    raise NotIntercepted("random numbers that every direction must see again")
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


def laid_out(primal: Tensor) -> Tensor:
    """An expanded tensor in memory of its own: forward mode wants the tangent in the layout of the value."""
    return primal.contiguous() if 0 in primal.stride() else primal

"""Stacked dual numbers: a value together with its derivatives along K directions, all carried by one pass.

PyTorch's own dual tensors hold one tangent. A `Dual` holds K of them as one tensor (K, *shape), so that a layer
processes the value and all directions in a few large operations. It is a tensor without storage. Python calls reach
`__torch_function__`, which looks up a rule. Other calls (such as those of a compiled extension) reach
`__torch_dispatch__`, which refuses them. So a derivative can be slow or refused, but is never lost silently.

A call is handled in the first of these ways that applies:

1. a function without a rule that only reads values is called with the values;
2. a short rule runs (`rules.short`, `rules.views`), then a rule of the other modules of `fgtrain.forward_ad.rules`;
3. a composition of other functions runs, whose calls are handled in turn;
4. a change in place copies the result of the function that makes a new tensor;
5. the body of a function that PyTorch implements in Python runs, and its calls are handled in turn;
6. PyTorch's own forward mode runs, one direction at a time; where there is none, the derivative in reverse mode is
   transposed.

Calls of custom autograd.Functions cannot be seen. What they return becomes a dual in the next call (`recorded`).

A result without tangents is refused if backpropagation would differentiate it. A dual belongs to its pass: a later pass
refuses it, and between passes it acts as its value.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fgtrain._torch import SET_DATA, overrides_of_tensors, plain_tensors, set_grad_enabled, tree_map_only
from fgtrain.errors import UnsupportedOperation
from fgtrain.forward_ad.lost_derivatives import is_differentiable, refuse_if_lost
from fgtrain.forward_ad.passes import UnsupportedByEngine, UsesRecorded, WritesIntoPlain, WritesWider
from fgtrain.forward_ad.registry import FALLBACKS, Rule
from fgtrain.forward_ad.rules.compositions import COMPOSITIONS, by_place
from fgtrain.forward_ad.running import current, running_pass
from fgtrain.forward_ad.stale import stale_message
from fgtrain.network.as_parameter import AsParameter, set_data
from fgtrain.tangents.directions import LastTangent, LowRankTangent, Tangent, num_in, padded


class Dual(Tensor):
    """A tensor and its derivatives along K directions.

    Args:
        primal: the value.
        tangent: (K, *primal.shape), or a low-rank form of it (weights).
    """

    primal: Tensor
    tangent: Any  # Tangent; the dual of a parameter has None between two passes
    of_pass: running_pass | None
    is_copy: bool = False  # a copy of another dual with more directions, whose value it shares
    param_name: str = ""  # of the parameter that it stands for

    @staticmethod
    def __new__(cls: type, primal: Tensor, tangent: Tangent, *_: Any) -> "Dual":
        # requires_grad makes a custom autograd.Function detectable in its result, see `primal_of`.
        make: Any = torch.Tensor._make_wrapper_subclass
        dual: Dual = make(
            cls, primal.shape, strides=primal.stride(), dtype=primal.dtype, device=primal.device, requires_grad=True
        )
        dual.primal = primal
        dual.renew(tangent)
        return dual

    def renew(self, tangent: Any) -> None:
        """Set the tangent for the current pass."""
        self.tangent = tangent
        self.of_pass = current.running

    @property
    def aliased(self) -> bool:
        """Whether the value shares memory with another dual's, but the tangents do not."""
        return self.of_pass is not None and id(_base(self.primal)) in self.of_pass.aliased_memory

    __hash__ = object.__hash__

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.primal.clone()

    def __reduce_ex__(self, proto: Any) -> Any:
        return self.primal.__reduce_ex__(proto)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})

    @classmethod  # torch's stub and its callers differ in the order of parameters
    def __torch_dispatch__(  # ty: ignore[incompatible-method-override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise UnsupportedByEngine(f"{func} was called without passing a function of PyTorch")


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of func(*args, **kwargs), some of whose arguments are duals."""
    # Under the model's no_grad, results are constants, as for backpropagation; outside its pass a dual is a constant
    # too.
    running = current.running
    if running is None or not torch.is_grad_enabled():
        with plain_tensors():
            return on_constants(func, args, kwargs, _value_of)
    result = _call(running, func, args, kwargs)
    if func in running.watched:
        running.saw(func, args, kwargs, result)
    return result


def _call(running: running_pass, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result by the first way that applies, in the order of the module's docstring."""
    if func not in running.rules and func not in COMPOSITIONS and FALLBACKS[func].reads and "out" not in kwargs:
        return _on_values(FALLBACKS[func].rule, args, kwargs)  # of a shape, a comparison
    if kwargs:
        args, kwargs = by_place(args, kwargs)
    if running.width is not None:
        widening = running.widening.get(func)
        if widening is not None and (result := _on_values(widening, args, kwargs)) is not NotImplemented:
            return result
        if func in running.rules or not FALLBACKS[func].is_opened:  # the calls of a body are widened in turn
            args, kwargs = _on_values(_widened, (func, args, kwargs), {})
    short = running.short.get(func)
    if short is not None and (result := short(running, args, kwargs)) is not NotImplemented:
        return result
    rule = running.rules.get(func)
    if rule is not None and (result := _on_values(rule, args, kwargs)) is not NotImplemented:
        return _checked(running, func, args, kwargs, result)
    if func in COMPOSITIONS and (result := _as_user_code(COMPOSITIONS[func], args, kwargs)) is not NotImplemented:
        return result  # its calls have been checked
    if kwargs.get("out") is not None:
        raise UnsupportedByEngine(f"{getattr(func, '__name__', func)} writes into its argument out")
    fallback = FALLBACKS[func]
    if fallback.is_opened:
        return _as_user_code(fallback.rule, args, kwargs)
    return _checked(running, func, args, kwargs, _on_values(fallback.rule, args, kwargs))


def _checked(running: running_pass, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """`result`, unless it has lost a derivative."""
    if not isinstance(result, Dual) and isinstance(result, (Tensor, tuple, list)) and running.follows:
        _on_values(refuse_if_lost, (func, args, kwargs, result, _is_dual, _value_of), {})
    return result


def _widened(func: Any, args: Any, kwargs: Any) -> Any:
    """The arguments; duals with fewer directions than another one are replaced by copies that have as many.

    Raises:
        WritesWider: such a dual would be changed in place.
    """
    found = [x for x in duals_in((args, kwargs)) if isinstance(x.tangent, (Tensor, LowRankTangent, LastTangent))]
    width = max(map(num_directions, found), default=0)
    narrow = {id(x) for x in found if num_directions(x) < width}
    for x in found:
        if isinstance(x.tangent, LastTangent):
            tangent_of(x)
    if not narrow:
        return args, kwargs
    if FALLBACKS[func].writes and id(args[0]) in narrow:
        name = getattr(func, "__name__", func)
        raise WritesWider(f"{name} writes what depends on a later layer into a tensor of an earlier one")

    def as_wide(x: Dual) -> Dual:
        if id(x) not in narrow:
            return x
        copy = Dual(x.primal, padded(tangent_of(x), width))
        copy.is_copy = True
        return copy

    return tree_map_only(Dual, as_wide, (args, kwargs))


def _is_dual(x: Any) -> bool:
    return isinstance(x, Dual)


def _value_of(x: Any) -> Any:
    return x.primal if isinstance(x, Dual) else x


def _on_values(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a rule without recording a graph and without overrides for duals."""
    set_grad_enabled(False)
    try:
        with plain_tensors():
            return rule(*args, **kwargs)
    finally:
        set_grad_enabled(True)


def _as_user_code(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a body like code of the user's model."""
    promoted = current.running.promoted if current.running is not None else None
    with overrides_of_tensors(), promoted or _NOTHING:
        return rule(*args, **kwargs)


_NOTHING = nullcontext()


def promoted(x: Tensor, name: str, num: int) -> Dual:
    """The dual of a plain tensor into which the function `name` writes duals of `num` directions.

    Raises:
        WritesIntoPlain: the pass was not prepared for it.
    """
    assert current.running is not None
    if current.running.promoted is None:
        raise WritesIntoPlain(f"{name} writes into a tensor that has no tangent")
    return current.running.promoted.promote(x, num)


def on_constants(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value_of: Callable[[Any], Any]) -> Any:
    """The result of a call under no_grad: a constant, or the first argument itself, as after a change in place."""
    constants = tree_map_only(Tensor, value_of, args)
    if func == SET_DATA and constants[0] is not args[0]:
        if not getattr(args[0], "param_name", ""):
            raise NotImplementedError("forward AD with an assignment to .data that")
        return set_data(*constants)
    result = func(*constants, **tree_map_only(Tensor, value_of, kwargs))
    return args[0] if args and result is constants[0] else result


# --- helpers for rules --------------------------------------------------------------------------------------------


def primal_of(x: Any) -> Any:
    """The value of a dual, for rules; other objects are returned unchanged. Outside rules, use `native.value_of`.

    Raises:
        UsesRecorded: the tensor requires a gradient, and the pass is not prepared for that.
        UnsupportedByEngine: the tensor depends on parameters, but not as a dual.
    """
    if isinstance(x, Tensor):
        if x.grad_fn is not None:
            return _constant(x)
        if isinstance(x, Dual):
            return x.primal
        if x.requires_grad and not isinstance(x, AsParameter):
            return _constant(x)
    return x


def _constant(x: Tensor) -> Tensor:
    """A tensor that requires a gradient, if it does not depend on parameters, such as an input of the model."""
    what = "a parameter" if x.grad_fn is None else f"the result of {type(x.grad_fn).__name__}"
    if isinstance(x, Dual):
        raise UnsupportedByEngine("a custom autograd.Function changes its argument in place")
    recorded = None if current.running is None else current.running.recorded
    if recorded is None:
        raise UsesRecorded(f"{what} requires a gradient")
    if not recorded.is_constant(x):
        raise UnsupportedByEngine(f"{what} requires a gradient past the model")
    return x.detach()


def tangent_of(x: Any) -> Any:
    """The tangent of a dual as a dense tensor (K, *shape); None for other objects.

    Raises:
        UnsupportedOperation: the dual belongs to an earlier pass.
    """
    if not isinstance(x, Dual):
        return None
    if x.of_pass is not current.running:
        raise UnsupportedOperation(stale_message(x))
    if not isinstance(x.tangent, Tensor):
        x.tangent = x.tangent.dense()
    return x.tangent


def joint_of(x: Any) -> Tensor | None:
    """The value and the tangents of a dual as one tensor (1 + K, *shape), if they are adjacent in memory; else None."""
    if not isinstance(x, Dual) or not isinstance(x.tangent, Tensor) or x.primal._base is None:
        return None
    if x.of_pass is not current.running:
        return None
    joint, value, moved = x.primal._base, x.primal, x.tangent
    if moved._base is not joint or joint.shape != (1 + moved.shape[0], *value.shape):
        return None
    start = joint.storage_offset()
    adjacent = value.storage_offset() == start and moved.storage_offset() == start + value.numel()
    return joint if adjacent and joint.is_contiguous() and value.is_contiguous() and moved.is_contiguous() else None


def duals_in(tree: Any) -> Iterator[Dual]:
    """The duals among nested arguments."""
    if isinstance(tree, Dual):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for x in tree.values() if isinstance(tree, dict) else tree:
            yield from duals_in(x)


def num_directions(*arguments: Any) -> int:
    """K, the number of directions of the first dual among the arguments."""
    return num_in(next(x.tangent for x in arguments if isinstance(x, Dual)))


def dual(primal: Tensor, tangent: Tensor | None, *sources: Dual) -> Tensor:
    """A dual, or the value itself if there is no tangent.

    Args:
        primal: the value.
        tangent: (K, *primal.shape), or a tensor that expands and converts to it.
        sources: duals whose memory the result may share. If it shares the memory of their value or of their tangent
            alone, changes in place are refused.
    """
    if tangent is None or not is_differentiable(primal):
        return primal
    if primal.layout != torch.strided:
        raise UnsupportedByEngine("a sparse tensor has a tangent")
    if tangent.dtype != primal.dtype:
        tangent = tangent.to(primal.dtype)
    if tangent.shape[1:] != primal.shape:
        tangent = tangent.expand(-1, *primal.shape).contiguous()
    result = Dual(primal, tangent)
    for source in sources:
        share_tangents = _share_memory(tangent, tangent_of(source)) and not source.is_copy
        if _share_memory(primal, source.primal) != share_tangents:
            assert source.of_pass is not None
            source.of_pass.aliased_memory |= {id(base): base for base in map(_base, (primal, source.primal))}
    return result


def _base(x: Tensor) -> Tensor:
    """The tensor of which x is a view, or x."""
    return x if x._base is None else x._base


def _share_memory(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def values(tree: Any) -> Any:
    """Nested arguments with every dual replaced by its value."""
    return tree_map_only(Dual, _value_of, tree)

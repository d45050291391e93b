"""The reference engine: PyTorch's own forward mode, one pass per direction, for everything PyTorch can differentiate.

Parameters become dual numbers (p, v). Every operation of the model then computes the pair (value, derivative along v),
and the loss is (f, grad f . v). Nothing is stored for a backward pass, so the memory use is that of inference.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fgtrain._torch import (
    REQUIRES_GRAD,
    SET_DATA,
    eager_functions,
    is_inside_transform,
    no_overrides,
    tree_leaves,
    tree_map_only,
    without_tangents,
)
from fgtrain.errors import NoTangent, UnsupportedOperation
from fgtrain.forward_ad.dual import Dual, on_constants
from fgtrain.forward_ad.lost_derivatives import refuse_if_lost
from fgtrain.forward_ad.named_errors import named_errors
from fgtrain.forward_ad.originals import SETS_REQUIRES_GRAD, Originals
from fgtrain.forward_ad.passes import (
    NO_TANGENT,
    Differentiates,
    LossFn,
    UnsupportedByEngine,
    check_losses,
    require_repetition,
)
from fgtrain.forward_ad.rules.compositions import COMPOSITIONS, by_place, composed_out_of_place, no_backward
from fgtrain.forward_ad.rules.opened import opened
from fgtrain.forward_ad.stale import as_stale, release
from fgtrain.forward_ad.steep import IN_PLACE, STEEP, call_steep
from fgtrain.forward_ad.transposed import run_transposed
from fgtrain.network.as_parameter import set_data
from fgtrain.network.parameters import slots_of
from fgtrain.network.snapshot import Snapshot
from fgtrain.tangents.directions import Tangent, all_dense, num_of


@dataclass
class _Known:
    """Facts about a model from its earlier passes.

    Args:
        differentiates: whether the loss differentiates with respect to what depends on parameters.
    """

    differentiates: bool = False


def jvp(model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent]) -> tuple[Tensor, Tensor]:
    """Losses (B,) or () and their derivatives (K, B) or (K,), as `fgtrain.forward_ad.jvp`.

    If the loss itself differentiates in the parameters, a graph is recorded for that.

    Raises:
        Differentiates: it does so for the first time.
        UnsupportedOperation: an operation has no forward-mode derivative, a tensor made from parameters comes from
            outside the pass, or the loss changes when its pass is repeated.
        LossError: the loss carries no tangent.
    """
    known = slots_of(model).cached(_Known, _Known)
    try:
        return _derivatives(model, loss_fn, tangents, with_graph=known.differentiates)
    except UnsupportedOperation as refusal:
        if known.differentiates or "a derivative with respect to" not in str(refusal):
            raise
        known.differentiates = True
        raise Differentiates(str(refusal)) from refusal


def _derivatives(
    model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent], *, with_graph: bool
) -> tuple[Tensor, Tensor]:
    slots = slots_of(model)
    num_tangents, directions = num_of(tangents), all_dense(tangents)
    snapshot = Snapshot(model) if num_tangents > 1 else None
    losses, derivatives = None, []
    with torch.enable_grad(), no_fast_paths(), named_errors(model):
        # Gradients are enabled, so that the model's no_grad can be recognised.
        for k in range(num_tangents):
            if snapshot and k:
                snapshot.restore()
            with fwAD.dual_level():
                trained = slots.trainable() if with_graph else {}
                values = {n: p.detach().requires_grad_() for n, p in trained.items()}
                duals = {
                    n: fwAD.make_dual(values.get(n, slots.params[n].detach()), v[k]) for n, v in directions.items()
                }
                originals = Originals(slots.params, duals)
                with slots.params_replaced(values | duals), _CheckedCalls(originals):
                    found = loss_fn(model)
                pair = fwAD.unpack_dual(originals.checked(check_losses(found)))
                release(model, lambda x: as_stale(value_of(x)) if has_tangent(x) else None)
                if pair.tangent is None:
                    raise NoTangent(NO_TANGENT)
                require_repetition(losses, pair.primal)
                losses = pair.primal.detach()
                derivatives.append(pair.tangent.detach())
    assert losses is not None
    return losses, torch.stack(derivatives)


@contextmanager
def no_fast_paths() -> Generator[None]:
    """Disable fused layers and compiled functions, which have no forward-mode derivative."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eager_functions():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


class _CheckedCalls(TorchFunctionMode):
    """Checks that no call of a pass loses its derivative.

    A function that PyTorch cannot differentiate, or not correctly, is replaced by a composition of others. A function
    that PyTorch implements in Python is opened, so that the calls in it are checked too.

    Args:
        originals: the parameters that the pass replaces by duals.
    """

    def __init__(self, originals: Originals) -> None:
        super().__init__()
        self._originals = originals

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SETS_REQUIRES_GRAD:
            self._originals.refuse_freezing(*args, **kwargs)
        if func == SET_DATA:
            x, value = args[0], value_of(args[1])
            return set_data(value_of(x), value) if hasattr(x, "param_name") else func(x, value)
        if not torch.is_grad_enabled():  # the model's no_grad: constants, as for backpropagation
            return on_constants(func, args, kwargs, value_of)
        if func == REQUIRES_GRAD:
            return func(*args) or has_tangent(args[0])
        if func in (Tensor.register_hook, Tensor.retain_grad):
            return no_backward()
        args, kwargs = tree_map_only(Tensor, self._originals.checked, (args, kwargs))
        if func in _OF_A_BACKWARD_PASS:  # below, its body would call meta kernels, whose tensors hide tangents
            with nullcontext() if _creates_graph(func, args, kwargs) else without_tangents():
                return func(*args, **kwargs)
        outside = composed_out_of_place(func)
        composed = COMPOSITIONS.get(outside or func)
        if composed and any(isinstance(x, Tensor) and has_tangent(x) for x in tree_leaves((args, kwargs))):
            args, kwargs = by_place(args, kwargs)
            with self:
                result = composed(*args, **kwargs)
            if result is not NotImplemented:
                return args[0].copy_(result) if outside else result
        body = opened(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        is_steep = func in STEEP or func in IN_PLACE
        try:
            result = _steep(func, args, kwargs) if is_steep else func(*args, **kwargs)
        except NotImplementedError as refusal:
            return _transposed(func, args, kwargs, refusal)
        refuse_if_lost(func, args, kwargs, result, has_tangent, value_of)
        return result


_OF_A_BACKWARD_PASS = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward})


def _creates_graph(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether gradients that a loss computes can be differentiated; otherwise they are constants."""
    return bool(signature(func).bind(*args, **kwargs).arguments.get("create_graph"))


def _steep(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As `call_steep`, also in place; a call with tensors that cannot be duals, such as sparse ones, stays as it is."""
    if any(isinstance(x, Tensor) and not _can_be_dual(x) for x in tree_leaves((args, kwargs))):
        return func(*args, **kwargs)
    with no_overrides():
        if func in IN_PLACE:
            return args[0].copy_(call_steep(IN_PLACE[func], args, kwargs))
        return call_steep(func, args, kwargs)


def _transposed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], refusal: NotImplementedError) -> Any:
    """The result of a call that forward mode has refused."""
    moving = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and has_tangent(x)}
    parts = {key: (value_of(x), _unpacked(x).tangent.unsqueeze(0)) for key, x in moving.items()}
    try:
        with no_overrides():
            return run_transposed(func, args, kwargs, parts, lambda x, t: fwAD.make_dual(x, t[0]))
    except UnsupportedByEngine:
        raise refusal from None


def has_tangent(x: Tensor) -> bool:
    """Whether a tensor carries a tangent.

    Sparse tensors carry none, nor do those without numbers, with which PyTorch finds shapes. For tensors inside a
    transform of torch.func this is unknown, so the answer is False.
    """
    return _can_be_dual(x) and _unpacked(x).tangent is not None


def value_of(x: Tensor) -> Tensor:
    """A tensor without the tangents that a pass of either engine has given it."""
    if isinstance(x, Dual):
        return x.primal
    return _unpacked(x).primal if _can_be_dual(x) else x


def _unpacked(x: Tensor) -> Any:
    with no_overrides():  # in a pass, `_CheckedCalls` would look for the tangent of the value
        return fwAD.unpack_dual(x)


def _can_be_dual(x: Tensor) -> bool:
    return x.layout == torch.strided and not (x.is_nested or x.is_meta or is_inside_transform(x))

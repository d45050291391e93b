"""Lost derivatives: results without a tangent in forward mode that backpropagation would differentiate."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fgtrain._torch import is_inside_transform, tree_flatten, tree_leaves, tree_unflatten
from fgtrain.network.snapshot import TorchRandomState

READS_THE_VALUE = frozenset(
    """
    size stride dim ndimension numel nelement element_size is_floating_point is_complex is_contiguous data_ptr
    storage_offset get_device item tolist numpy __bool__ __float__ __int__ __index__ __len__ __repr__ __format__
    __contains__ detach eq ne lt le gt ge equal allclose isclose isnan isinf isfinite argmax argmin argsort zeros_like
    ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor bernoulli
    nonzero logical_not logical_and logical_or signbit all any count_nonzero is_nonzero is_tensor is_same_size
    result_type can_cast _unpack_dual
    """.split()  # noqa: SIM905 - a list of eighty names is harder to read
)
DIFFERENTIABLE_PROPERTIES = frozenset({"T", "mT", "H", "mH", "real", "imag"})


def only_reads(func: Any) -> bool:
    """Whether a function of PyTorch only reads values, so that its results are never differentiable."""
    name = getattr(func, "__name__", "")
    return name in READS_THE_VALUE or (name == "__get__" and func.__self__.__name__ not in DIFFERENTIABLE_PROPERTIES)


def is_differentiable(x: Any) -> bool:
    """Whether x is a tensor of real or complex numbers."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def refuse_if_lost(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    has_tangent: Callable[[Tensor], bool],
    value_of: Callable[[Tensor], Tensor],
) -> None:
    """Check the result of a call whose arguments carry tangents.

    Args:
        func: the function that was called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        result: its return value.
        has_tangent: tells whether a tensor carries a tangent.
        value_of: returns a tensor without its tangent.

    Raises:
        NotImplementedError: a result has no tangent, though backpropagation would differentiate it in these arguments.
    """
    if only_reads(func):
        return
    outputs = [out for out in tree_leaves(result) if isinstance(out, Tensor)]
    lost = [
        i
        for i, out in enumerate(outputs)
        if is_differentiable(out) and not is_inside_transform(out) and not has_tangent(out)
    ]
    if not lost:
        return
    leaves, spec = tree_flatten((args, kwargs))
    differentiated = [isinstance(x, Tensor) and has_tangent(x) for x in leaves]
    if not any(differentiated):
        return
    random_state = TorchRandomState({x.device for x in leaves if isinstance(x, Tensor)})
    with torch.enable_grad():
        copies = [
            value_of(x).detach().clone().requires_grad_(needed).clone() if is_differentiable(x) else x
            for x, needed in zip(leaves, differentiated, strict=True)
        ]
        positional, keywords = tree_unflatten(copies, spec)
        try:
            recorded = [out for out in tree_leaves(func(*positional, **keywords)) if isinstance(out, Tensor)]
        except RuntimeError:  # not differentiable by backpropagation either
            return
        finally:
            random_state.restore()
    if any(recorded[i].requires_grad for i in lost):
        raise NotImplementedError(f"forward AD with {getattr(func, '__name__', func)} that loses its derivative")

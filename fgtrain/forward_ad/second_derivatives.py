"""Compositions of elementary operations, for forward mode over forward mode.

Nested in itself, PyTorch's forward mode silently returns wrong second derivatives of batch, layer and instance norms:
its rules treat the statistics that the kernel saved as constants, and the factors that determinants and solvers saved.
As elementary operations they are right.
tests/test_second_order.py compares every one of them with double backpropagation.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fgtrain._torch import (
    DATA,
    REQUIRES_GRAD,
    SET_DATA,
    custom_function_call,
    is_inside_transform,
    no_overrides,
    standard_gamma,
    tree_map_only,
)
from fgtrain.forward_ad.dual import on_constants
from fgtrain.forward_ad.originals import SETS_REQUIRES_GRAD, Originals
from fgtrain.forward_ad.registry import functions_named
from fgtrain.forward_ad.rules.compositions import COMPOSITIONS, by_place, composed_out_of_place
from fgtrain.forward_ad.rules.opened import opened
from fgtrain.forward_ad.singular import singular


class CorrectSecondDerivatives(TorchFunctionMode):
    """A context in which functions without a correct second derivative run as compositions of others.

    Under the model's no_grad, results are constants, which PyTorch's forward mode alone does not know.
    Running statistics are not updated.

    Args:
        params: {name: parameter} of the model.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._params = params
        self.move({})
        self._running: list[Any] = []  # functions whose compositions run; in its own, a function is called as it is

    def move(self, values: Mapping[str, Tensor]) -> None:
        """Let the calls from now on be those of a pass with these values in place of parameters."""
        self._originals = Originals(self._params, values)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SETS_REQUIRES_GRAD:
            self._originals.refuse_freezing(*args, **kwargs)
            if _has_tangent(args[0]):
                return args[0]
        if func == REQUIRES_GRAD:
            return func(*args) or _has_tangent(args[0])
        if func is Tensor.__deepcopy__:
            return args[0].detach().clone()
        args, kwargs = tree_map_only(Tensor, self._originals.checked, (args, kwargs))
        if func == SET_DATA or not torch.is_grad_enabled():  # the model's no_grad: constants, as for backpropagation
            return on_constants(func, args, kwargs, Tensor.detach)
        if func is custom_function_call and not getattr(args[0], "is_linear", False):
            raise NotImplementedError("forward AD with a custom autograd.Function that is differentiated only once")
        outside = composed_out_of_place(func)
        if func in _ONLY_FIRST_DERIVATIVES:
            _refuse(func.__name__)
        args, kwargs = by_place(args, kwargs)
        if "memory_format" in kwargs:  # layouts do not fit tensors that hold several directions
            kwargs = {name: x for name, x in kwargs.items() if name != "memory_format"}
        made = outside or func
        bodies = (_FOR_SECOND_DERIVATIVES.get(made), singular(func), COMPOSITIONS.get(made), opened(func))
        for body in () if func in self._running else bodies:
            if body is not None:
                self._running.append(func)
                try:
                    with self:
                        result = body(*args, **kwargs)
                finally:
                    self._running.pop()
                if result is not NotImplemented:
                    return args[0].copy_(result) if outside else result
        return func(*args, **kwargs)


def _refuse(name: str) -> NoReturn:
    raise NotImplementedError(f"forward AD with {name} that is correct only for first derivatives")


def _has_tangent(x: Tensor) -> bool:
    """Whether a tensor carries a tangent; unknown, so False, inside a transform of torch.func in the loss."""
    try:
        with no_overrides():
            return is_inside_transform(x) and fwAD.unpack_dual(x).tangent is not None
    except RuntimeError:
        return False


def _normalized(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    centered = x - x.mean(list(dims), keepdim=True)
    return centered * (centered.square().mean(list(dims), keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _per_channel(values: Tensor | None, x: Tensor) -> Tensor | None:
    return None if values is None else values.view(-1, *[1] * (x.dim() - 2))


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return _affine(_normalized(x, range(-len(shape), 0), eps), weight, bias)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training:
        unit = _normalized(x, [0, *range(2, x.dim())], eps)
    else:
        mean, variance = _per_channel(running_mean, x), _per_channel(running_var, x)
        assert mean is not None
        assert variance is not None
        unit = (x - mean) * (variance + eps).rsqrt()
    return _affine(unit, _per_channel(weight, x), _per_channel(bias, x))


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    return _affine(_normalized(x, range(2, x.dim()), eps), _per_channel(weight, x), _per_channel(bias, x))


def _reduced(each: Tensor, reduction: str) -> Tensor:
    return {"none": each, "mean": each.mean(), "sum": each.sum()}[reduction]


def _huber_loss(
    x: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    if weight is not None:
        return NotImplemented
    error = x - target
    inside = error.abs() <= delta
    return _reduced(torch.where(inside, error.square() / 2, delta * (error.abs() - delta / 2)), reduction)


def _binary_cross_entropy_with_logits(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    if size_average is not None or reduce is not None:
        return NotImplemented
    # log(1 + exp(-x)) without an exponential that overflows
    softplus = x.clamp_max(0).neg() + (-x.abs()).exp().log1p()
    factor = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    each = (1 - target) * x + factor * softplus
    return _reduced(each if weight is None else each * weight, reduction)


def _rrelu(
    x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    if inplace:
        return NotImplemented
    slope = lower + (upper - lower) * torch.rand_like(x.detach()) if training else (lower + upper) / 2
    return torch.where(x > 0, x, slope * x)


def _factors(a: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal of the factor U in A = P L U, and the determinant of P."""
    factors, pivots = torch.linalg.lu_factor(a)
    swaps = (pivots != torch.arange(1, a.shape[-1] + 1, device=a.device)).sum(-1)
    return factors.diagonal(dim1=-2, dim2=-1), (1 - 2 * (swaps % 2)).to(a.dtype)


def _det(a: Tensor) -> Tensor:
    diagonal, parity = _factors(a)
    return diagonal.prod(-1) * parity


def _slogdet(a: Tensor) -> Any:
    if a.is_complex():
        raise NotImplementedError("forward AD with slogdet of complex numbers")
    diagonal, parity = _factors(a)
    sign = diagonal.sign().prod(-1) * parity
    return type(torch.linalg.slogdet(a.detach()))((sign, diagonal.abs().log().sum(-1)))


def _logdet(a: Tensor) -> Tensor:
    sign, size = _slogdet(a)
    return size + sign.log()


def _scatter_reduce(x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    if reduce == "prod":
        _refuse("scatter_reduce")
    return NotImplemented


def _roll(x: Tensor, *_: Any, **__: Any) -> Any:
    return NotImplemented if x.dim() else x.clone()  # vmap would roll the directions


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    left, right = x.chunk(2, dim)
    return left * right.sigmoid()


def _soft_margin_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    return _reduced(F.softplus(-target * x), ("none", "mean", "sum")[reduction])


def _set_item(x: Tensor, index: Any, value: Any) -> Any:
    """A single number as a row of one, since x.fill_ does not take a value that holds several directions."""
    if not isinstance(value, Tensor) or value.dim():
        return NotImplemented
    x[index] = value.reshape(1)
    return None


def _fill(x: Tensor, value: Any) -> Any:
    return x.copy_(value) if isinstance(value, Tensor) else NotImplemented


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented if args or kwargs else x  # it had a memory_format alone


def _solve(a: Tensor, b: Tensor, *, left: bool = True) -> Tensor:
    factors, pivots = torch.linalg.lu_factor(a)
    if b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1]):  # vectors, as PyTorch decides it
        return torch.linalg.lu_solve(factors, pivots, b.unsqueeze(-1), left=left).squeeze(-1)
    return torch.linalg.lu_solve(factors, pivots, b, left=left)


_ONLY_FIRST_DERIVATIVES = {
    *(standard_gamma, torch.ctc_loss),
    *functions_named("orgqr"),
    *(torch.linalg.householder_product, torch.linalg.solve_ex, torch.linalg.tensorsolve),
}

_FOR_SECOND_DERIVATIVES = {
    DATA: lambda x: x.detach(),  # these two leave the derivatives of an outer level
    Tensor.detach_: lambda x: x.copy_(x.detach()),
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.rrelu: _rrelu,
    **dict.fromkeys([*functions_named("det"), torch.linalg.det], _det),
    **dict.fromkeys([*functions_named("slogdet"), torch.linalg.slogdet], _slogdet),
    **dict.fromkeys(functions_named("logdet"), _logdet),
    torch.linalg.solve: _solve,
    **dict.fromkeys(functions_named("scatter_reduce"), _scatter_reduce),
    **dict.fromkeys(functions_named("roll"), _roll),
    **dict.fromkeys(functions_named("glu"), _glu),
    **dict.fromkeys(functions_named("soft_margin_loss"), _soft_margin_loss),
    **dict.fromkeys(functions_named("fill_"), _fill),
    Tensor.__setitem__: _set_item,
    Tensor.to: _to,
    F.huber_loss: _huber_loss,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy_with_logits,
}

"""Gradients that stay in their factors until something asks for their numbers.

A forward gradient along low-rank directions is a product left^T right. Plain SGD adds it to the parameter in one sweep
without ever writing it down: no memory for the gradient, and a third of the time of its step.
"""

from typing import Any

import torch
from torch import Tensor

from fgtrain._torch import no_torch_function, tree_map

aten = torch.ops.aten


class FactoredGrad(Tensor):
    """The tensor (left^T right).view(shape), to everything but `param.add_(grad)` a tensor like any other.

    It is written out at the first operation that needs it, and from then on is that tensor: an optimizer with momentum
    or weight decay, gradient clipping and accumulation work as ever.

    Args:
        left: (R, m).
        right: (R, n).
        shape: m n numbers, the first dimension being m.
    """

    left: Tensor
    right: Tensor
    written: Tensor | None
    __torch_function__ = no_torch_function  # ty: ignore[incompatible-method-override]

    @staticmethod
    def __new__(cls: type, left: Tensor, right: Tensor, shape: torch.Size) -> "FactoredGrad":
        make: Any = torch.Tensor._make_wrapper_subclass
        return make(cls, shape, dtype=left.dtype, device=left.device)

    def __init__(self, left: Tensor, right: Tensor, shape: torch.Size) -> None:
        self.left = left
        self.right = right
        self.written = None

    @classmethod  # torch's stub has the parameters in another order than its callers
    def __torch_dispatch__(  # ty: ignore[incompatible-method-override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.add_.Tensor and _can_stay_factored(*args):
            param, grad = args
            return grad.add_to(param, kwargs.get("alpha", 1))
        if func in _NORMS and _is_euclidean(args, kwargs):
            return [_norm(x) for x in args[0]] if isinstance(args[0], (list, tuple)) else _norm(args[0])
        result = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        changed = args[0] if args and isinstance(args[0], FactoredGrad) else None
        return changed if changed is not None and result is changed.written else result

    def add_to(self, param: Tensor, alpha: float) -> Tensor:
        """Param += alpha left^T right."""
        matrix = param.view(self.left.shape[1], self.right.shape[1])
        if len(self.left) == 1:  # an outer product is no task for a matrix kernel
            matrix.addcmul_(self.left.t(), self.right, value=alpha)
        else:
            matrix.addmm_(self.left.t(), self.right, alpha=alpha)
        return param

    def norm_of_factors(self) -> Tensor:
        """The Euclidean norm: (left left^T) . (right right^T) is its square."""
        if len(self.left) == 1:
            return self.left.norm() * self.right.norm()
        return ((self.left @ self.left.t()) * (self.right @ self.right.t())).sum().clamp(min=0).sqrt()

    def dense(self) -> Tensor:
        """The gradient as a plain tensor."""
        if self.written is None:
            outer = torch.mul if len(self.left) == 1 else torch.mm
            self.written = outer(self.left.t(), self.right).view(self.shape)
        return self.written

    def numpy(self, *, force: bool = False) -> Any:
        """As of `dense()`, since NumPy reads memory."""
        return self.dense().numpy(force=force)

    def tolist(self) -> Any:
        """As of `dense()`."""
        return self.dense().tolist()

    def __reduce_ex__(self, proto: Any) -> Any:
        return self.dense().__reduce_ex__(proto)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.dense().clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(self.dense())


def _can_stay_factored(param: Any, grad: Any) -> bool:
    return (
        isinstance(grad, FactoredGrad)
        and grad.written is None
        and not isinstance(param, FactoredGrad)
        and param.shape == grad.shape
        and param.dtype == grad.dtype
        and param.is_contiguous()
    )


_NORMS = {aten.linalg_vector_norm.default, aten._foreach_norm.Scalar}


def _is_euclidean(args: Any, kwargs: Any) -> bool:
    """Whether a norm is that of all entries, to the power 2."""
    return not kwargs and len(args) <= 2 and (len(args) < 2 or args[1] == 2)


def _norm(x: Tensor) -> Tensor:
    stays = isinstance(x, FactoredGrad) and x.written is None
    return x.norm_of_factors() if stays else torch.linalg.vector_norm(_plain(x))


def _plain(x: Any) -> Any:
    return x.dense() if isinstance(x, FactoredGrad) else x

"""Gradients that stay factored until an operation needs their elements.

A forward gradient along low-rank directions is a product left^T right. Plain SGD adds it to the parameter in one pass
without materialising it. For large matrices, this needs no memory for the gradient and takes a third of the usual time.
For small ones, calls cost more than elements, and the product is a plain tensor.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fgtrain._torch import foreach_norm, no_torch_function, tree_map

aten = torch.ops.aten

PLAIN_UP_TO = 2**16
"""Up to this number of elements, a plain tensor is faster (measured with plain SGD on a CPU)."""


def product(left: Tensor, right: Tensor, shape: torch.Size) -> Tensor:
    """(left^T right).view(shape), as a `FactoredGrad` if it is large; the arguments are those of `FactoredGrad`."""
    if shape.numel() > PLAIN_UP_TO:
        return FactoredGrad(left, right, shape)
    return _multiplied(left, right).view(shape)


def _multiplied(left: Tensor, right: Tensor) -> Tensor:
    return (torch.mul if left.shape[0] == 1 else torch.mm)(left.t(), right)


class FactoredGrad(Tensor):
    """The tensor (left^T right).view(shape), which `param.add_(grad)` adds without materialising it.

    The first other operation that needs its elements materialises it, and it then behaves as a plain tensor. So
    optimizers with momentum or weight decay, gradient clipping and accumulation work as usual.

    Args:
        left: (R, m).
        right: (R, n).
        shape: shape of m n elements whose first dimension is m.
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

    @classmethod  # torch's stub and its callers differ in the order of parameters
    def __torch_dispatch__(  # ty: ignore[incompatible-method-override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.add_.Tensor and _can_stay_factored(*args):
            param, grad = args
            return grad.add_to(param, kwargs.get("alpha", 1))
        if func is aten._foreach_add_.List:  # optimizers on a GPU
            return _add_to_all(*args, **kwargs)
        if func in _NORMS and _is_euclidean(args, kwargs):
            return _norms(args[0]) if isinstance(args[0], (list, tuple)) else _norms(args[:1])[0]
        result = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        changed = args[0] if args and isinstance(args[0], FactoredGrad) else None
        return changed if changed is not None and result is changed.written else result

    def add_to(self, param: Tensor, alpha: float) -> Tensor:
        """Add alpha left^T right to `param`."""
        matrix = param.view(self.left.shape[1], self.right.shape[1])
        matrix.addmm_(self.left.t(), self.right, alpha=alpha)
        return param

    def dense(self) -> Tensor:
        """The gradient as a plain tensor."""
        if self.written is None:
            self.written = _multiplied(self.left, self.right).view(self.shape)
        return self.written

    def numpy(self, *, force: bool = False) -> Any:
        """As for `dense()`, since NumPy reads the memory directly."""
        return self.dense().numpy(force=force)

    def tolist(self) -> Any:
        """As for `dense()`."""
        return self.dense().tolist()

    def __reduce_ex__(self, proto: Any) -> Any:
        return self.dense().__reduce_ex__(proto)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.dense().clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(self.dense())


def _add_to_all(params: list[Any], grads: list[Any], alpha: float = 1) -> None:
    """params[i] += alpha grads[i]; gradients that are not factored are added in one launch."""
    others = []
    for param, grad in zip(params, grads, strict=True):
        if _can_stay_factored(param, grad):
            grad.add_to(param, alpha)
        else:
            others.append((_plain(param), _plain(grad)))
    if others:
        aten._foreach_add_.List(*map(list, zip(*others, strict=True)), alpha=alpha)


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
    """Whether a norm is the Euclidean norm of all entries."""
    return not kwargs and len(args) <= 2 and (len(args) < 2 or args[1] == 2)


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norms, by one call for all tensors."""
    parts = [_of_norm(x) for x in tensors]
    found = iter(foreach_norm([part for several in parts for part in several], 2))
    return [reduce(torch.mul, islice(found, len(several))) for several in parts]


def _of_norm(x: Tensor) -> list[Tensor]:
    """Tensors, the product of whose norms is the norm of x."""
    if not isinstance(x, FactoredGrad) or x.written is not None:
        return [_plain(x)]
    if x.left.shape[0] == 1:
        return [x.left, x.right]
    square = ((x.left @ x.left.t()) * (x.right @ x.right.t())).sum()  # of the norm of left^T right
    return [square.clamp(min=0).sqrt()]


def _plain(x: Any) -> Any:
    return x.dense() if isinstance(x, FactoredGrad) else x

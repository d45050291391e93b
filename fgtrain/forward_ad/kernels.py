"""Where PyTorch would compute by a kernel that has no forward-mode derivative, or a wrong one: what is done instead."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

REQUIRES_GRAD: Any = vars(torch._C.TensorBase)["requires_grad"].__get__
"""How `x.requires_grad` is read."""


@contextmanager
def without_onednn() -> Generator[None]:
    """A context in which the CPU's LSTM is the one that has a derivative.

    torch.backends.mkldnn.flags would do the same, and warn of a setting for other devices each time.
    """
    backend: Any = torch.backends.mkldnn
    enabled = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = enabled


def lstm(*args: Any) -> Any:
    """torch.lstm."""
    with without_onednn():
        return torch.lstm(*args)


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """F.scaled_dot_product_attention."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def no_backward(*_: Any, **__: Any) -> Any:
    """Tensor.register_hook and Tensor.retain_grad, which wait for a gradient that does not come."""
    raise NotImplementedError("forward AD with a hook on the gradient of a tensor that only a backward pass would call")


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """torch._weight_norm: v with its norms, all dimensions but `dim` taken together, replaced by g."""
    others = [d for d in range(v.dim()) if d != dim] if dim != -1 else list(range(v.dim()))
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))


def embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """torch.embedding. Backpropagation leaves the padding row alone; PyTorch's forward mode forgets to."""
    out = torch.embedding(weight, indices)
    if padding_idx < 0:
        return out
    return torch.where((indices == padding_idx).unsqueeze(-1), fwAD.unpack_dual(out).primal, out)

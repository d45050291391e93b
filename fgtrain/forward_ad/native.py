"""The reference engine: PyTorch's own forward mode, one pass per direction, for everything PyTorch can differentiate.

Parameters become dual numbers (p, v); every operation of the model then carries the pair (value, derivative along v)
and the loss comes out as (f, grad f . v). Nothing is stored for a backward pass, so memory is that of inference.
"""

import re
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from fgtrain.directions import Tangent, dense
from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.forward_ad import kernels
from fgtrain.forward_ad.passes import RepeatedPass, check_losses
from fgtrain.parameters import slots_of

LossFn = Callable[[Any], Tensor]

NO_TANGENT = (
    "the loss carries no tangent: it depends on no trainable parameter, or the model left PyTorch's forward-mode AD "
    "(.detach(), .item(), NumPy); check that loss_fn uses the model it is given"
)


def jvp(model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent]) -> tuple[Tensor, Tensor]:
    """Losses (B,) or () and their derivatives (K, B) or (K,), as `fgtrain.forward_ad.jvp`."""
    slots = slots_of(model)
    directions = {name: dense(tangent) for name, tangent in tangents.items()}
    num_tangents = len(next(iter(directions.values())))
    repeated = RepeatedPass(model) if num_tangents > 1 else None
    losses, derivatives = None, []
    with torch.enable_grad(), forward_ad_kernels(model), named_errors(model):
        # With gradients enabled the model's own no_grad can be told; the parameters are detached: nothing is recorded.
        for k in range(num_tangents):
            if repeated and k:
                repeated.rewind()
            with fwAD.dual_level():
                duals = {n: fwAD.make_dual(slots.params[n].detach(), v[k]) for n, v in directions.items()}
                with slots.exchanged(duals):
                    pair = fwAD.unpack_dual(check_losses(loss_fn(model)))
                if pair.tangent is None:
                    raise LossError(NO_TANGENT)
                losses = pair.primal.detach()
                derivatives.append(pair.tangent.detach())
    assert losses is not None
    return losses, torch.stack(derivatives)


@contextmanager
def forward_ad_kernels(model: nn.Module) -> Generator[None]:
    """Choose the kernels that have a forward-mode derivative where PyTorch would pick ones that have none."""
    with ExitStack() as stack:
        stack.enter_context(_OtherKernels())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        fastpath = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.LSTM) for module in model.modules()):
            stack.enter_context(kernels.without_onednn())
        stack.enter_context(eager_functions())
        yield


def eager_functions() -> Any:
    """A context in which compiled functions run as they were written: compiled, they drop tangents without a word."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _OtherKernels(TorchFunctionMode):
    """Calls other functions where PyTorch's own have no derivative, or a wrong one; stops tangents at no_grad."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():  # constants to backpropagation, and so here
            args, kwargs = tree_map_only(Tensor, _primal, (args, kwargs))
        if func == kernels.REQUIRES_GRAD:
            return func(*args) or _moves(args[0])
        if func in (Tensor.register_hook, Tensor.retain_grad):
            return kernels.no_backward()
        if func is torch._weight_norm:
            return kernels.weight_norm(*args, **kwargs)
        if func is F.embedding and kwargs.get("padding_idx") is not None and kwargs.get("max_norm") is None:
            return kernels.embedding(args[1], args[0], kwargs["padding_idx"] % len(args[1]))
        return func(*args, **kwargs)


def _moves(x: Tensor) -> bool:
    """Whether a tensor carries a tangent; those inside of a transform of torch.func cannot be asked."""
    return not torch._C._functorch.is_functorch_wrapped_tensor(x) and fwAD.unpack_dual(x).tangent is not None


def _primal(x: Tensor) -> Tensor:
    return fwAD.unpack_dual(x).primal


class named_errors:  # noqa: N801 - a context manager used like a function
    """Turns PyTorch's "no forward AD" errors into one sentence that names the module, the operation and the remedy."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, UnsupportedOperation):
            return
        operation = _refused_operation(str(error))
        if operation is None:
            return
        raise UnsupportedOperation(
            f"{_where(self._model, error)} uses {operation}, which has no forward-mode derivative; replace that "
            "module, define jvp for it, or train with method=backprop"
        ) from error


_REFUSALS = {
    "jvp function for custom autograd.Function": "a custom autograd.Function without jvp",
    "it must override the setup_context": "a custom autograd.Function without setup_context",
    "attempting to call Tensor.requires_grad_": "a derivative in an input of its own",
    "Cannot access data pointer of Tensor": "an operation that reads memory itself, as those on packed sequences do",
}
"""{part of what PyTorch says: the operation}."""


def _refused_operation(message: str) -> str | None:
    """What has no derivative in forward mode, by PyTorch's message; None if it speaks of something else."""
    match = re.search(r"forward AD with (.+?) that", message)
    return match.group(1) if match else next((name for part, name in _REFUSALS.items() if part in message), None)


def _where(model: nn.Module, error: BaseException) -> str:
    """The deepest module of `model` on the error's traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    found, frame = "the loss function", error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if id(owner) in names:
            path = names[id(owner)]
            found = f"module '{path}' ({type(owner).__name__})" if path else f"the model ({type(owner).__name__})"
        frame = frame.tb_next
    return found

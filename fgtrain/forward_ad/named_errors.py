"""PyTorch's errors about forward mode, in one sentence that names the module, the operation and the remedy."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import BackwardHook

from fgtrain.errors import UnsupportedOperation


class named_errors:  # noqa: N801 - a context manager used like a function
    """A context in which PyTorch's "no forward AD" errors become an UnsupportedOperation.

    Args:
        model: the model, whose modules are named.
        second: whether second derivatives are taken.
    """

    def __init__(self, model: nn.Module, second: bool = False) -> None:
        self._model = model
        self._second = second

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, UnsupportedOperation):
            return
        operation = _refused_operation(error)
        if operation is None:
            return
        kind, otherwise, method = "forward-mode derivative", "replace that module, define jvp for it", "Backprop"
        if self._second:
            kind, otherwise, method = "second derivative in forward mode", "replace it", "ForwardGradient"
        instead = next((hint for part, hint in _INSTEAD.items() if part in operation), otherwise)
        raise UnsupportedOperation(
            f"{_where(self._model, error)} uses {operation}, which has no {kind}; {instead}, or train with {method}"
        ) from error


_INSTEAD = {
    "grouped_mm": "call the experts one by one or batched (in transformers: experts_implementation='eager')",
    "segment_reduce": "use torch.index_add, torch.scatter_reduce or F.embedding_bag",
    "_scaled_dot_product": "call F.scaled_dot_product_attention",
    "sparse": "multiply by a sparse matrix that is a constant",
    "forward-mode AD of its own": "call torch.func.vjp, grad or jacrev instead of jvp and jacfwd",
}
"""{part of an operation's name: a replacement that has a derivative}."""


_REFUSALS = {
    "jvp function for custom autograd.Function": "a custom autograd.Function without jvp",
    "it must override the setup_context": "a custom autograd.Function without setup_context",
    "attempting to call Tensor.requires_grad_": "a derivative with respect to its own input",
    "One of the differentiated Tensors does not require grad": "a derivative with respect to a parameter",
    "does not require grad and does not have a grad_fn": "a derivative with respect to an intermediate result",
    "appears to not have been used in the graph": "a derivative with respect to an intermediate result",
    "would mutate a captured Tensor": "a change in place of a tensor from outside the loss",
    "Nested forward mode AD": "forward-mode AD of its own",
    "\nRuntimeError: \n": "a TorchScript function",  # its interpreter repeats an exception of Python without the text
    "mutating directly with `.data`": "an assignment to .data",
    "Cannot access data pointer of Tensor": "an operation that reads memory itself",
    "Cannot access storage of": "an operation that reads memory itself",
    "NestedTensorImpl doesn't support": "nested tensors",
    "tensors do not have strides": "a sparse matrix that is made in the loss",
    "is not possible because there exists a Tensor `other`": "a change in place of a tensor that moves less",
    "ZeroTensors are immutable": "a change in place of a result that does not move",
}
"""{part of PyTorch's message: the operation}."""


def _refused_operation(error: BaseException) -> str | None:
    """The operation without a forward-mode derivative that PyTorch's message names; None if it names none."""
    message = str(error)
    if any(isinstance(owner, BackwardHook) for owner in _owners(error)):
        return "a full backward hook"
    match = re.search(r"forward AD with (.+?) that|(?:do not yet support|not implemented for) (aten::\w+)", message)
    if match:
        return match.group(1) or match.group(2)
    return next((name for part, name in _REFUSALS.items() if part in message), None)


def _where(model: nn.Module, error: BaseException) -> str:
    """The deepest module of `model` on the error's traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    found = "the loss function"
    for owner in _owners(error):
        if id(owner) in names:
            path = names[id(owner)]
            found = f"module '{path}' ({type(owner).__name__})" if path else f"the model ({type(owner).__name__})"
    return found


def _owners(error: BaseException) -> Iterator[Any]:
    """The `self` of every function on the error's traceback, from the outermost one on."""
    frame = error.__traceback__
    while frame is not None:
        yield frame.tb_frame.f_locals.get("self")
        frame = frame.tb_next

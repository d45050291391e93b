"""Blocks of a model: modules that it calls one after the other, each on the output of the previous one."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fgtrain._torch import is_inside_transform
from fgtrain.errors import UnsupportedOperation
from fgtrain.network.chains import is_chain

Forward = Callable[..., Any]
Test = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], bool]
"""Maps a module, its positional arguments, its keyword arguments and its output to whether it is a block."""


def hidden_of(output: Any) -> Any:
    """The hidden state in a block's output: the output itself, or the first of several."""
    return output[0] if isinstance(output, tuple) and output else output


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A block's output with another hidden state."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def entering(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The hidden state among a block's arguments: the first tensor of numbers, not of indices or truth values.

    If there is no such tensor it is the first of all, and None where there is none.
    """
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    return next((x for x in tensors if x.is_floating_point()), tensors[0] if tensors else None)


def keeps_shape(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
    """A `Test`: the module changes neither the shape nor the dtype of the hidden state."""
    x, y = entering(args, kwargs), hidden_of(out)
    return isinstance(x, Tensor) and isinstance(y, Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype)


def has_identity_skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
    """A `Test`: the module returns its input where its parameters are 0, as x + f(x) and relu(x + f(x)) do.

    The inputs of the test are between 0 and 1, as after a ReLU.
    """
    if not keeps_shape(module, args, kwargs, out):
        return False
    x = entering(args, kwargs)
    if not x.is_floating_point():
        return False
    trial = torch.rand_like(x)
    args = tuple(trial if a is x else a for a in args)
    kwargs = {key: trial if a is x else a for key, a in kwargs.items()}
    zeros = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    return torch.equal(hidden_of(functional_call(module, zeros, args, kwargs)), trial)


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Forward], method: str = "forward") -> Generator[None]:
    """A context in which these modules have other forward methods, or others of the name `method`."""
    before = {module: vars(module).get(method) for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)[method] = forward  # nn.Module's own assignment takes longer
        yield
    finally:
        for module, own in before.items():
            vars(module).pop(method, None)
            if own is not None:
                vars(module)[method] = own


@contextmanager
def cut_between_blocks() -> Generator[None]:
    """A context whose passes cut derivatives between blocks, so that a loss cannot take any across them.

    Raises:
        UnsupportedOperation: the loss takes a derivative itself.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(part in str(error) for part in _OF_A_LOSS):
            raise
        raise UnsupportedOperation(
            "the loss function takes derivatives itself, as those in its inputs, and this method cuts them between "
            "blocks; train with another method"
        ) from error


_OF_A_LOSS = (
    "does not require grad and does not have a grad_fn",
    "One of the differentiated Tensors does not require grad",
    "appears to not have been used in the graph",
    "escaped from inside a function being vmapped",
)
"""Parts of PyTorch's messages for such a loss."""


@contextmanager
def frozen(params: Iterable[nn.Parameter]) -> Generator[None]:
    """A context in which these parameters are constants; the loss may still ask and say that they are trained."""
    trained = {p for p in params if p.requires_grad}
    try:
        for p in trained:
            vars(p.requires_grad_(False))["_is_held_constant"] = True
        yield
    finally:
        for p in trained:
            vars(p.requires_grad_(True)).pop("_is_held_constant", None)


def list_of_names(names: Sequence[str] | None) -> list[str] | None:
    """The names of blocks as a list; one name alone is refused, since its characters would be read as names."""
    if isinstance(names, str):
        raise ValueError(f"blocks must be a list of names, such as [{names}], got {names!r}")
    return None if names is None else list(names)


INSIDE_TRANSFORM = (
    "the loss function runs a block inside torch.vmap or torch.func.grad, where its output cannot be kept; train with "
    "another method"
)


def find_blocks(
    model: nn.Module, run: Callable[[], object], test: Test, names: Iterable[str] | None = None, otherwise: str = ""
) -> dict[str, nn.Module]:
    """{name: module} of the blocks that pass a test, in the order in which the model calls them.

    Candidates are the members of the outermost `nn.Sequential` and `nn.ModuleList`, with nested chains expanded. In a
    model without either they are its children. A block has a weight matrix, so a norm alone is not a block.

    Args:
        model: any module.
        run: runs the model once; the caller restores buffers and random state afterwards.
        test: decides whether a module is a block.
        names: names of the blocks; None to search for them.
        otherwise: why a named module that does not pass cannot be a block, for the error message.

    Raises:
        UnsupportedOperation: one of `names` is not a module of the model, or does not pass the test; or a block runs
            inside a transform of torch.func.
    """
    members = _named(model, names) if names is not None else _candidates(model)
    names_of = {module: name for name, module in model.named_modules()}  # a module may have several names
    candidates = {names_of[module]: module for module in members.values()}
    forwards = {module: module.forward for module in candidates.values()}
    passed: dict[nn.Module, bool] = {}
    testing = False

    def watched(module: nn.Module) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal testing
            out = forwards[module](*args, **kwargs)
            if any(isinstance(x, Tensor) and is_inside_transform(x) for x in (entering(args, kwargs), hidden_of(out))):
                raise UnsupportedOperation(INSIDE_TRANSFORM)
            if not testing:
                testing = True
                try:
                    passed[module] = passed.get(module, True) and test(module, args, kwargs, out)
                finally:
                    testing = False
            return out

        return forward

    with forwards_replaced({module: watched(module) for module in forwards}):
        run()
    found = {names_of[module]: module for module, verdict in passed.items() if verdict}
    if names is not None and (others := sorted(candidates.keys() - found.keys())):
        raise UnsupportedOperation(f"{', '.join(others)} cannot be a block: {otherwise}")
    return found


def _named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    names = list(names)
    if unknown := [name for name in names if name not in modules]:
        raise UnsupportedOperation(f"{type(model).__name__} has no module {', '.join(unknown)}")
    return {name: modules[name] for name in names}


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    found = dict(_members(model, "")) or dict(model.named_children())
    return {name: module for name, module in found.items() if any(p.dim() > 1 for p in module.parameters())}


def _members(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The members of the outermost chains and plain lists in a module."""
    is_list = isinstance(module, nn.ModuleList) and type(module).forward is nn.Module.forward
    for name, child in module.named_children():
        name = f"{path}.{name}" if path else name
        if (is_list or is_chain(module)) and not is_chain(child):
            yield name, child
        else:
            yield from _members(child, name)

"""Backpropagation that stores few activations and recomputes the others, for a fair comparison of memory."""

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from fgtrain._torch import eager_functions, tree_leaves
from fgtrain.errors import UnsupportedOperation
from fgtrain.estimators.backprop import Backprop
from fgtrain.estimators.base import Estimate, Reduce
from fgtrain.forward_ad.passes import LossFn
from fgtrain.network.blocks import forwards_replaced
from fgtrain.network.chains import in_turn, is_chain, links
from fgtrain.network.parameters import slots_of
from fgtrain.network.repeated_steps import checkpointed, stored_by_input

_log = logging.getLogger(__name__)


class CheckpointedBackprop(Backprop):
    """The exact gradient by backpropagation with activation checkpointing.

    Formula: g = grad f. A chain of n equal layers (`nn.Sequential`, nested ones read as one chain) is split into
    sqrt(n) segments. Only the tensors between segments are stored, and the backward sweep runs each segment forward
    again. Each member of an `nn.ModuleList` (a block of a transformer) is a segment, and so are sqrt(n) steps of a
    simulation by `fgtrain.tasks.simulators.rk4` or of a `DiagonalRNN`. Other code stores its activations as in plain
    backpropagation. A model without any of these is trained as by `Backprop`, and a warning says so.

    Bias: exact, bit for bit if the layers' kernels are deterministic. Dropout uses the same masks again, and BatchNorm
    counts the batch once.

    Cost: up to one forward pass more than backpropagation, with about 2 sqrt(n) instead of n activations in memory.
    Ranks exchange the whole gradient.

    Raises:
        UnsupportedOperation: a segment changes its input in place, or computes something else when it runs again.

    Source: Chen, Xu, Zhang, Guestrin 2016, arXiv:1604.06174.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> stored, anew = (e(model, lambda m: m(torch.ones(2)).sum()) for e in (Backprop(), CheckpointedBackprop()))
    >>> all(torch.equal(g, stored.grads[name]) for name, g in anew.grads.items())
    True
    """

    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        # Functions are eager because compiled code would ignore replaced forwards.
        with eager_functions(), checkpointed() as repeated, _in_segments(model) as containers:
            try:
                estimate = super().forward(model, loss_fn, generator=generator, reduce=reduce)
            except CheckpointError as error:
                raise UnsupportedOperation(
                    f"a block or a step of {type(model).__name__} computes something else when it runs again, for "
                    "example because it keeps a cache, has its own random generator, or had other parameters "
                    "(torch.func.functional_call); train with Backprop"
                ) from error
            except RuntimeError as error:
                if not any(part in str(error) for part in _OF_TRANSFORMS):
                    raise
                raise UnsupportedOperation(
                    "the model or its loss takes derivatives by torch.func or runs inside torch.vmap, which activation "
                    "checkpointing does not allow; train with Backprop"
                ) from error
        warned = slots_of(model).cached(_in_segments, set)
        if not (containers or repeated or warned):
            warned.add(True)
            _log.warning(
                "%s has no nn.Sequential or nn.ModuleList to checkpoint: memory is that of Backprop",
                type(model).__name__,
            )
        return estimate


_OF_TRANSFORMS = ("support saved tensor hooks", "function being vmapped", "does not have vmap support")
"""Parts of PyTorch's messages about checkpoints inside torch.vmap and the other transforms of torch.func."""


@contextmanager
def _in_segments(model: nn.Module) -> Generator[list[nn.Sequential | nn.ModuleList]]:
    """A context in which the chains and lists of modules in `model` store only their segments' inputs; yields them."""
    containers = list(dict.fromkeys(_containers(model)))
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for container in containers:
        if isinstance(container, nn.ModuleList):
            forwards |= {m: _recomputed(m.forward, [m]) for m in container.children()}
        else:
            ahead, segments = _segments(container)
            anew = [_recomputed(partial(in_turn, part), part) for part in segments]
            forwards[container] = partial(in_turn, [*ahead, *anew])
    with forwards_replaced(forwards):
        yield containers


def _containers(module: nn.Module) -> Iterator[nn.Sequential | nn.ModuleList]:
    """The outermost chains and lists of modules."""
    if is_chain(module) or isinstance(module, nn.ModuleList):
        yield module
    else:
        for child in module.children():
            yield from _containers(child)


def _segments(chain: nn.Sequential) -> tuple[list[nn.Module], list[list[nn.Module]]]:
    """The modules that run before all segments, and the segments.

    Modules that change the chain's input in place cannot be run again from it, so they run first. Segments have the
    length that minimises the number of segments plus the layers in the longest one.
    """
    first, *others = links(chain) or [[]]
    ahead = list(takewhile(lambda module: getattr(module, "inplace", False), first))
    parts = [part for part in (first[len(ahead) :], *others) if part]
    num_layers = [sum(1 for m in _modules_of(part) if m._parameters) for part in parts]

    def cut(length: int) -> list[list[int]]:
        return [list(range(i, min(i + length, len(parts)))) for i in range(0, len(parts), length)]

    def stored(length: int) -> int:
        segments = cut(length)
        return len(segments) + max(sum(num_layers[i] for i in segment) for segment in segments)

    best = min(range(1, len(parts) + 1), key=stored, default=1)
    return ahead, [[module for i in segment for module in parts[i]] for segment in cut(best)]


def _modules_of(parts: list[nn.Module]) -> Iterator[nn.Module]:
    """All modules within the given ones."""
    for part in parts:
        yield from part.modules()


def _recomputed(run: Callable[..., Any], modules: list[nn.Module]) -> Callable[..., Any]:
    """`run`, with its activations recomputed when the backward sweep needs them."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        versions = [x._version for x in inputs]
        buffers = _BuffersAsBefore(modules)
        out = stored_by_input(partial(run, **kwargs), *args, again=buffers)
        if versions != [x._version for x in inputs]:
            raise UnsupportedOperation(
                f"{type(modules[0]).__name__} changes its input in place, so it cannot be run again from it; "
                "make the operation out of place or train with Backprop"
            )
        return out

    return forward


class _BuffersAsBefore:
    """A context in which the modules' buffers have their values from its construction; later changes are discarded."""

    def __init__(self, modules: list[nn.Module]) -> None:
        held = [module._buffers for module in _modules_of(modules) if module._buffers]
        self._before = [(h, {n: b.clone() for n, b in h.items() if b is not None}) for h in held]
        self._after: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self._after = [dict(held) for held, _ in self._before]
        for held, before in self._before:
            held.update({name: b.clone() for name, b in before.items()})

    def __exit__(self, *_: object) -> None:
        for (held, _before), values in zip(self._before, self._after, strict=True):
            held.update(values)

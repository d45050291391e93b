"""Modules of a model that run one after the other, in parallel, or beside a skip."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


class SideBySide(nn.ModuleList):
    """Modules that all take the whole input; their outputs are concatenated along the channels, dimension 1.

    They do not depend on each other, so `LocalLosses` gives each its own loss.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self], dim=1)


class Residual(nn.Module):
    """A block with an identity skip: x -> x + block(x). The block keeps the shape of x and does not write into it.

    Args:
        block: what is added.

    Source: He, Zhang, Ren, Sun 2016, arXiv:1603.05027.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def is_chain(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether the module only calls its children in turn."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def members(chain: nn.Sequential) -> Iterator[nn.Module]:
    """The modules of a chain in the order of its calls, with repetitions; nested chains are expanded."""
    for child in chain:  # children() would omit repetitions
        if is_chain(child):
            yield from members(child)
        else:
            yield child


def links(chain: nn.Sequential) -> list[list[nn.Module]]:
    """The chain, split before every module with parameters; modules before the first of these are a separate link."""
    found: list[list[nn.Module]] = []
    for module in members(chain):
        if not found or any(True for _ in module.parameters()):
            found.append([])
        found[-1].append(module)
    return found


def in_turn(steps: Iterable[Callable[[Any], Any]], x: Any) -> Any:
    """The output of modules or functions, each of which takes the output of the one before."""
    for step in steps:
        x = step(x)
    return x

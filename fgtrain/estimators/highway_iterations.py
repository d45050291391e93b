"""The gradients that flow back through the branches of residual blocks, for the iterations of Highway."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain._torch import tree_map_only
from fgtrain.errors import UnsupportedOperation
from fgtrain.network.blocks import Forward, entering, forwards_replaced, hidden_of
from fgtrain.network.shell import AGAIN, Shell

Through = Callable[[Tensor], Tensor]
"""d -> J^T d, where d is a gradient after a residual block and J the Jacobian of its branch."""


class Branches:
    """The gradients that flow back through the residual branches, at every iteration and in every segment.

    Attributes:
        deltas: for every iteration, the gradient after every segment; None for one that the loss does not depend on.
        sums: for every iteration, the sum of J_m^T d_m over the blocks of every segment.
    """

    def __init__(self) -> None:
        self.deltas: list[list[Tensor | None]] = []
        self.sums: list[list[Tensor | None]] = []

    def after_blocks(self, shell: Shell) -> Callable[[Through | None], tuple[int, Tensor | None]]:
        """A function that gives, for one block after the other, the segment and d_l of the last iteration.

        It takes the function d -> J_l^T d, which only iterations need. The sum over later blocks is that over all
        blocks less the terms so far, so that memory holds one sum for each segment and iteration.
        """
        places = iter([s for s, segment in enumerate(shell.segments) for _ in segment.outputs])
        left = [list(sums) for sums in self.sums]

        def after_next(through: Through | None) -> tuple[int, Tensor | None]:
            s = next(places, None)
            if s is None:
                raise UnsupportedOperation(AGAIN)
            after = self.deltas[0][s]
            for later, deltas in zip(left, self.deltas[1:], strict=True):
                delta, rest = deltas[s], later[s]
                if through is not None and after is not None and delta is not None and rest is not None:
                    rest = later[s] = rest - through(after)
                    after = delta + rest
            return s, after

        return after_next


def through_branch(forward: Forward, args: Any, kwargs: Any) -> tuple[Any, Through]:
    """The output of a block, and the function d -> J^T d of its branch."""
    hidden = entering(args, kwargs)
    x = hidden.detach().requires_grad_()
    with torch.enable_grad():
        args, kwargs = tree_map_only(Tensor, lambda a: x.clone() if a is hidden else a.detach(), (args, kwargs))
        out = forward(*args, **kwargs)

    @torch.enable_grad()
    def through(delta: Tensor) -> Tensor:
        return torch.autograd.grad((delta * hidden_of(out)).sum(), x, retain_graph=True)[0] - delta

    return tree_map_only(Tensor, Tensor.detach, out), through


def sums_through_branches(
    model: nn.Module, loss_fn: Callable[[Any], Tensor], shell: Shell, branches: Branches
) -> list[Tensor | None]:
    """The sum of J_l^T d_l over the blocks of every segment."""
    sums: list[Tensor | None] = [None] * len(shell.segments)
    after_next = branches.after_blocks(shell)

    def summing(forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            out, through = through_branch(forward, args, kwargs)
            s, after = after_next(through)
            if after is not None:
                term, so_far = through(after), sums[s]
                sums[s] = term if so_far is None else so_far + term
            return out

        return run

    with torch.no_grad(), forwards_replaced({block: summing(forward) for block, forward in shell.forwards.items()}):
        loss_fn(model)
    return sums

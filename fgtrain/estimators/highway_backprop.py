"""Highway with backpropagation: the gradients outside the blocks and within, and what flows back through branches."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain._torch import tree_map_only
from fgtrain.errors import UnsupportedOperation
from fgtrain.forward_ad.passes import LossFn, check_losses
from fgtrain.network.blocks import Forward, entering, forwards_replaced, hidden_of
from fgtrain.network.parameters import slots_of
from fgtrain.network.residual_blocks import BLOCKS_RUN_AGAIN, ResidualBlocks
from fgtrain.network.snapshot import Snapshot

Through = Callable[[Tensor], Tensor]
"""d -> J^T d, where d is a gradient after a residual block and J the Jacobian of its branch."""


class Branches:
    """The gradients that flow back through the residual branches, at every iteration and in every segment.

    Attributes:
        deltas: for every iteration, the gradient after every segment; None for one that the loss does not depend on.
        sums: for every iteration, the sum of J_m^T d_m over the blocks of every segment.
    """

    def __init__(self, deltas: Iterable[list[Tensor | None]] = ()) -> None:
        self.deltas = list(deltas)
        self.sums: list[list[Tensor | None]] = []

    def after_blocks(self, blocks: ResidualBlocks) -> Callable[[Through | None], tuple[int, Tensor | None]]:
        """A function to call once for each block, in their order; it returns the block's segment and its d_l.

        Its argument is d -> J_l^T d of the block, which is needed only after an iteration; else None. The sum over
        later blocks is the sum over all blocks minus the terms so far, so memory holds one sum for each segment and
        iteration.
        """
        places = iter([s for s, segment in enumerate(blocks.segments) for _ in segment.outputs])
        left = [list(sums) for sums in self.sums]

        def after_next(through: Through | None) -> tuple[int, Tensor | None]:
            s = next(places, None)
            if s is None:
                raise UnsupportedOperation(BLOCKS_RUN_AGAIN)
            after = self.deltas[0][s]
            for later, deltas in zip(left, self.deltas[1:], strict=True):
                delta, rest = deltas[s], later[s]
                if through is not None and after is not None and delta is not None and rest is not None:
                    rest = later[s] = rest - through(after)
                    after = delta + rest
            return s, after

        return after_next


class _BlockCall:
    """One call of a residual block, with its graph.

    Attributes:
        out: the output, without the graph.
    """

    def __init__(self, forward: Forward, args: Any, kwargs: Any) -> None:
        hidden = entering(args, kwargs)
        self._x = hidden.detach().requires_grad_()
        with torch.enable_grad():
            args, kwargs = tree_map_only(
                Tensor, lambda a: self._x.clone() if a is hidden else a.detach(), (args, kwargs)
            )
            out = forward(*args, **kwargs)
        self._hidden = hidden_of(out)
        self.out = tree_map_only(Tensor, Tensor.detach, out)

    def through(self, delta: Tensor) -> Tensor:
        """d -> J^T d of the branch."""
        return self._gradients(delta, [self._x])[0] - delta

    def learn(self, delta: Tensor, params: list[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters that the call used, each with its gradient."""
        found = zip(params, self._gradients(delta, params), strict=True) if self._hidden.requires_grad else ()
        return [(p, g) for p, g in found if g is not None]

    @torch.enable_grad()
    def _gradients(self, delta: Tensor, inputs: list[Any]) -> Any:
        return torch.autograd.grad((delta * self._hidden).sum(), inputs, retain_graph=True, allow_unused=True)


@contextmanager
def learning_by_backprop(blocks: ResidualBlocks, branches: Branches) -> Generator[list[tuple[nn.Parameter, Tensor]]]:
    """A context in which a call of a block appends its parameters' gradients to the yielded list.

    Args:
        blocks: the residual blocks of the model.
        branches: the gradients after the blocks.
    """
    found: list[tuple[nn.Parameter, Tensor]] = []
    after_next = branches.after_blocks(blocks)

    def learn(block: nn.Module, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = _BlockCall(forward, args, kwargs)
            delta = after_next(call.through)[1]
            params = [p for p in block.parameters() if p.requires_grad]
            if delta is not None and params:
                found.extend(call.learn(delta, params))
            return call.out

        return run

    with forwards_replaced({block: learn(block, forward) for block, forward in blocks.forwards.items()}):
        yield found


def _sums_through_branches(
    model: nn.Module, loss_fn: LossFn, blocks: ResidualBlocks, branches: Branches
) -> list[Tensor | None]:
    """The sum of J_l^T d_l over the blocks of every segment."""
    sums: list[Tensor | None] = [None] * len(blocks.segments)
    after_next = branches.after_blocks(blocks)

    def summing(forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = _BlockCall(forward, args, kwargs)
            s, after = after_next(call.through)
            if after is not None:
                term, so_far = call.through(after), sums[s]
                sums[s] = term if so_far is None else so_far + term
            return call.out

        return run

    with torch.no_grad(), blocks.replaced_by(summing):
        loss_fn(model)
    return sums


def by_backprop(
    model: nn.Module, loss_fn: LossFn, blocks: ResidualBlocks, iterations: int, snapshot: Snapshot
) -> tuple[dict[str, Tensor], Branches]:
    """The gradients of all parameters outside blocks, and the gradients after the blocks, after some iterations."""
    branches = Branches()
    for _ in range(iterations):
        branches.deltas.append(_gradients_of_rest(model, loss_fn, blocks, branches)[1])
        snapshot.restore()
        branches.sums.append(_sums_through_branches(model, loss_fn, blocks, branches))
        snapshot.restore()
    grads, deltas = _gradients_of_rest(model, loss_fn, blocks, branches)
    branches.deltas.append(deltas)
    return grads, branches


def _gradients_of_rest(
    model: nn.Module, loss_fn: LossFn, blocks: ResidualBlocks, branches: Branches
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """The gradients of all parameters outside blocks, and the gradient after every segment, by a backward pass.

    The gradients of the blocks' parameters are those of their other uses, such as a penalty in the loss.
    Before a segment, the gradient through its branches is added.
    """
    points: dict[int, Tensor] = {}
    through_branches: list[Tensor] = []
    sums = branches.sums[-1] if branches.sums else [None] * len(blocks.segments)

    def after_segment(segment: int, x: Tensor) -> Tensor:
        through = sums[segment]
        if through is not None:
            through_branches.append((through * x).sum())
        points[segment] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return points[segment].clone()  # what follows may change it in place

    with blocks.as_skips(after_segment), torch.enable_grad():
        rest = slots_of(model).trainable()
        loss = sum(through_branches, check_losses(loss_fn(model)).mean())
        found = torch.autograd.grad(loss, [*rest.values(), *points.values()], allow_unused=True)
    grads = {name: g for name, g in zip(rest, found, strict=False) if g is not None}
    deltas = dict(zip(points, found[len(rest) :], strict=True))
    return grads, [deltas.get(s) for s in range(len(blocks.segments))]

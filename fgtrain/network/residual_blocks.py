"""The residual blocks of a model, which can be run as their skips plus constants."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain._torch import tree_leaves
from fgtrain.errors import UnsupportedOperation
from fgtrain.network.blocks import Forward, entering, forwards_replaced, hidden_of, with_hidden

_NOTHING = torch.empty(0)

BLOCKS_RUN_AGAIN = (
    "residual blocks run more often than in the first pass of the step; switch off activation checkpointing around "
    "them, since memory holds the activations of one block anyway, or train with another method"
)


@dataclass
class Segment:
    """Residual blocks that are called one directly after the other.

    Args:
        start: input of the first block.
        end: output of the last block.
        outputs: the output of each block, without its hidden state.
    """

    start: Tensor
    end: Tensor
    outputs: list[Any]


class ResidualBlocks:
    """The residual blocks of a model: h + f(h), where f is the branch of a block.

    A recorded pass finds what the branches add to the hidden state. In `as_skips` they add it as a constant, so that
    derivatives flow along the skips only, and the branches are not computed. The losses stay the same:

    >>> from fgtrain.models import Residual
    >>> model = nn.Sequential(nn.Linear(3, 4), Residual(nn.Linear(4, 4)), nn.Linear(4, 1))
    >>> blocks, loss = ResidualBlocks(model, [model[1]]), lambda net: net(torch.ones(2, 3)).mean()
    >>> with blocks.recording():
    ...     recorded = loss(model)
    >>> with blocks.as_skips():
    ...     torch.allclose(blocks.from_first(loss)(model), recorded)
    True

    Args:
        model: the model.
        modules: its residual blocks.
        separate: whether every block is a segment of its own. That is right for every model, but holds the hidden state
            after every block.

    Attributes:
        segments: the segments of the recorded pass.
        forwards: {block: its original forward method}.
        params: the parameters that only blocks have; one that is tied to a layer elsewhere learns there, too.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module], separate: bool = False) -> None:
        self.separate = separate
        self._calls = 0
        self.segments: list[Segment] = []
        self.forwards: dict[nn.Module, Forward] = {block: block.forward for block in modules}
        inside = {module for block in self.forwards for module in block.modules()}
        others = {p for module in model.modules() if module not in inside for p in module.parameters(recurse=False)}
        self.params = [p for block in self.forwards for p in block.parameters() if p not in others]

    def replaced_by(self, make: Callable[[Forward], Forward]) -> AbstractContextManager[None]:
        """A context in which every block has the forward method that `make` returns for its original one."""
        return forwards_replaced({block: make(forward) for block, forward in self.forwards.items()})

    @contextmanager
    def recording(self) -> Generator[None]:
        """A context in which the model runs as it is, and segments are recorded.

        They hold copies of hidden states, since a block, or what is between two blocks, may work in place.
        """
        last: tuple[Any, int] = (None, 0)  # the last output, and its version

        def recorded(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal last
                x = entering(args, kwargs)
                if self.separate or last[0] is not x or last[1] != x._version:
                    self.segments.append(Segment(x.clone(), _NOTHING, []))
                segment = self.segments[-1]
                out = forward(*args, **kwargs)
                last = hidden_of(out), hidden_of(out)._version
                segment.end = last[0].clone()
                segment.outputs.append(with_hidden(out, _NOTHING))
                return out

            return run

        with self.replaced_by(recorded):
            yield

    def from_first(self, loss_fn: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """`loss_fn` for `as_skips`: each call starts with the first block, even if an error ended the last one."""

        def started(model: Any) -> Tensor:
            self._calls = 0
            return loss_fn(model)

        return started

    @contextmanager
    def as_skips(
        self,
        after_segment: Callable[[int, Tensor], Tensor] = lambda _, h: h,
        between_blocks: Callable[[Tensor], Tensor] = lambda h: h,
        other_outputs: Sequence[Sequence[Any]] = (),
    ) -> Generator[None]:
        """A context in which blocks are identities, and the last block of a segment adds what its branches added.

        The model must run by a function of `from_first`.

        Args:
            after_segment: maps the index of a segment and the hidden state after it to a replacement of that state.
            between_blocks: maps the hidden state between two blocks to a replacement, which the second block ignores.
            other_outputs: for every segment and block, a replacement of its output without its hidden state; () for
                none.

        Raises:
            UnsupportedOperation: another argument of a block depends on trained parameters.
        """
        start = _NOTHING
        outputs = other_outputs or [segment.outputs for segment in self.segments]
        places = [(s, k, out) for s, outs in enumerate(outputs) for k, out in enumerate(outs)]

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal start
            if self._calls == len(places):
                raise UnsupportedOperation(BLOCKS_RUN_AGAIN)
            s, k, out = places[self._calls]
            self._calls += 1
            segment, hidden = self.segments[s], entering(args, kwargs)
            if any(isinstance(a, Tensor) and a.requires_grad and a is not hidden for a in tree_leaves((args, kwargs))):
                raise UnsupportedOperation(
                    "a residual block takes more from trained layers than its hidden state, such as the embedding of "
                    "a time step, and these layers would not learn from it; freeze them, or train with another method"
                )
            if k == 0:
                start = hidden
            is_last = k == len(segment.outputs) - 1
            hidden = after_segment(s, start + (segment.end - segment.start)) if is_last else between_blocks(start)
            return with_hidden(out, hidden)

        with forwards_replaced(dict.fromkeys(self.forwards, run)):
            yield

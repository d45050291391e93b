"""A model without its residual blocks, and what they add to its hidden state."""

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

AGAIN = (
    "residual blocks run more often than in the first pass of the step; switch off activation checkpointing around "
    "them, since memory holds the activations of one block anyway, or train with another method"
)


@dataclass
class Segment:
    """Residual blocks that are called one directly after the other.

    Args:
        start: input of the first block.
        end: output of the last block.
        version: version of `end`, to detect a change in place before the next block.
        outputs: the output of each block, without its hidden state.
    """

    start: Tensor
    end: Tensor
    version: int
    outputs: list[Any]


class Shell:
    """A model whose residual blocks add constants to the hidden state.

    Args:
        model: the model.
        blocks: its residual blocks.
        apart: whether every block is a segment of its own. That is right for every model, but holds the hidden state
            after every block.

    Attributes:
        segments: the segments of the recorded pass.
        forwards: {block: its original forward method}.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module], apart: bool = False) -> None:
        self.blocks = list(blocks)
        self.apart = apart
        self._calls = 0
        self.segments: list[Segment] = []
        self.forwards: dict[nn.Module, Forward] = {block: block.forward for block in self.blocks}
        inside = {module for block in self.blocks for module in block.modules()}
        others = {p for module in model.modules() if module not in inside for p in module.parameters(recurse=False)}
        self._params = [p for block in self.blocks for p in block.parameters() if p not in others]

    def params(self) -> Iterable[nn.Parameter]:
        """The parameters that only blocks have; one that is tied to a layer elsewhere learns there, too."""
        return self._params

    def replaced_by(self, make: Callable[[Forward], Forward]) -> AbstractContextManager[None]:
        """A context in which every block has the forward method that `make` returns for its original one."""
        return forwards_replaced({block: make(forward) for block, forward in self.forwards.items()})

    @contextmanager
    def recording(self) -> Generator[None]:
        """A context in which the model runs as it is, and segments are recorded."""

        def recorded(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                x, segment = entering(args, kwargs), self.segments[-1] if self.segments else None
                if self.apart or segment is None or segment.end is not x or segment.version != x._version:
                    segment = Segment(x.clone(), x, x._version, [])  # a copy, because the block may work in place
                    self.segments.append(segment)
                out = forward(*args, **kwargs)
                segment.end = hidden_of(out)
                segment.version = segment.end._version
                segment.outputs.append(with_hidden(out, _NOTHING))
                return out

            return run

        with self.replaced_by(recorded):
            yield

    def counting_from_0(self, run: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """The function `run`, each call of which is a new pass, whether or not the last pass came to its end."""

        def started(model: Any) -> Tensor:
            self._calls = 0
            return run(model)

        return started

    @contextmanager
    def running(
        self,
        behind: Callable[[int, Tensor], Tensor] = lambda _, x: x,
        between: Callable[[Tensor], Tensor] = lambda x: x,
        others: Sequence[Sequence[Any]] = (),
    ) -> Generator[None]:
        """A context in which blocks are identities, and the last block of a segment adds a constant.

        The model must run by a function of `counting_from_0`.

        Args:
            behind: maps the index of a segment and its output to a replacement of the output.
            between: maps the hidden state between two blocks to a replacement, which the second block ignores.
            others: for every segment and block, a replacement of its output without its hidden state; () for none.

        Raises:
            UnsupportedOperation: another argument of a block depends on trained parameters.
        """
        start = _NOTHING
        outputs = others or [segment.outputs for segment in self.segments]
        places = [(s, k, out) for s, outs in enumerate(outputs) for k, out in enumerate(outs)]

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal start
            if self._calls == len(places):
                raise UnsupportedOperation(AGAIN)
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
            last = k == len(segment.outputs) - 1
            x = behind(s, start + (segment.end - segment.start)) if last else between(start)
            return with_hidden(out, x)

        with forwards_replaced(dict.fromkeys(self.blocks, run)):
            yield

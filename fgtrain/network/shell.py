"""A model without its residual blocks, and what they add to its hidden state."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain.network.blocks import Forward, entering, forwards_replaced, hidden_of, with_hidden

_NOTHING = torch.empty(0)


@dataclass
class Segment:
    """Residual blocks that are called one directly after the other.

    Args:
        start: what enters the first.
        end: what leaves the last.
        version: of `end`, to tell whether it was changed in place before the next block.
        outputs: what the blocks return but for the hidden state, block by block.
    """

    start: Tensor
    end: Tensor
    version: int
    outputs: list[Any]


class Shell:
    """A model without its residual blocks: what they add to the hidden state is a constant there.

    Args:
        blocks: the residual blocks.

    Attributes:
        segments: of the pass that was recorded.
        forwards: {block: its own forward}.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.blocks = list(blocks)
        self.segments: list[Segment] = []
        self.forwards: dict[nn.Module, Forward] = {block: block.forward for block in self.blocks}

    def params(self) -> Iterable[nn.Parameter]:
        """The blocks' parameters."""
        return (p for block in self.blocks for p in block.parameters())

    @contextmanager
    def recording(self) -> Generator[None]:
        """A context in which the model runs as it is, and segments are recorded."""

        def recorded(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                x, last = entering(args, kwargs), self.segments[-1] if self.segments else None
                follows = last is not None and last.end is x and last.version == x._version
                start = x.clone() if not follows else None  # the block may work in place
                out = forward(*args, **kwargs)
                y = hidden_of(out)
                if last is None or start is not None:
                    assert start is not None
                    self.segments.append(Segment(start, y, y._version, [with_hidden(out, _NOTHING)]))
                else:
                    last.end, last.version = y, y._version
                    last.outputs.append(with_hidden(out, _NOTHING))
                return out

            return run

        with forwards_replaced({block: recorded(forward) for block, forward in self.forwards.items()}):
            yield

    @contextmanager
    def running(self, behind: Callable[[int, Tensor], Tensor] = lambda _, x: x) -> Generator[None]:
        """A context in which blocks are identities, but for a constant that the last of a segment adds.

        Args:
            behind: maps the number of a segment and what leaves it to what stands for it.
        """
        number = 0
        places = [(s, k, out) for s, segment in enumerate(self.segments) for k, out in enumerate(segment.outputs)]

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal number
            s, k, out = places[number % len(places)]  # an estimator may run the model several times
            number += 1
            x, segment = entering(args, kwargs), self.segments[s]
            if k == len(segment.outputs) - 1:
                x = behind(s, x + (segment.end - segment.start))
            return with_hidden(out, x)

        with forwards_replaced(dict.fromkeys(self.blocks, run)):
            yield

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
        blocks: the residual blocks.

    Attributes:
        segments: the segments of the recorded pass.
        forwards: {block: its original forward method}.
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
                x, segment = entering(args, kwargs), self.segments[-1] if self.segments else None
                if segment is None or segment.end is not x or segment.version != x._version:
                    segment = Segment(x.clone(), x, x._version, [])  # a copy, because the block may work in place
                    self.segments.append(segment)
                out = forward(*args, **kwargs)
                segment.end = hidden_of(out)
                segment.version = segment.end._version
                segment.outputs.append(with_hidden(out, _NOTHING))
                return out

            return run

        with forwards_replaced({block: recorded(forward) for block, forward in self.forwards.items()}):
            yield

    @contextmanager
    def running(self, behind: Callable[[int, Tensor], Tensor] = lambda _, x: x) -> Generator[None]:
        """A context in which blocks are identities, and the last block of a segment adds a constant.

        Args:
            behind: maps the index of a segment and its output to a replacement of the output.
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

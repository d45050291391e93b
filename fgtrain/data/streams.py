"""Streams: consecutive chunks of the same sequences, for learning that never sees a whole sequence."""

from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fgtrain.data.text import Tokens, read_bytes, read_text
from fgtrain.errors import DataError
from fgtrain.random import keyed_generator

ENDLESS = 2**40
"""The length that an endless stream reports. Lightning reads one batch ahead of a loader without a length, and its
checkpoints would then hold a position one batch too late."""


class StreamLoader:
    """Chunks in their order; the position can be saved.

    Args:
        chunk_at: maps the index of a chunk to it.
        length: number of chunks; every pass begins with the first.
    """

    def __init__(self, chunk_at: Callable[[int], Any], length: int) -> None:
        self.chunk_at = chunk_at
        self.length = length
        self._chunk = 0
        self._resumed = False

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        if not (self._resumed and self._chunk < self.length):
            self._chunk = 0
        self._resumed = False
        while self._chunk < self.length:
            self._chunk += 1
            yield self.chunk_at(self._chunk - 1)

    def state_dict(self) -> dict[str, int]:
        return {"chunk": self._chunk}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._chunk, self._resumed = state["chunk"] if "chunk" in state else state["tick"], True  # in version 0.1


class Recall(L.LightningDataModule):
    """An endless stream that shows a symbol once and asks for it `lag` steps later.

    The tokens are the symbols 0 to `symbols` - 1, a blank and a question. A sequence repeats a period of
    `lag` + `lag` // 10 + 2 steps: a random symbol, blanks, the question after `lag` steps, blanks. The target at the
    question is the symbol, and -1 everywhere else and where the stream began after the symbol. The sequences of a batch
    are at different places of the period.

    Args:
        batch_size: B, number of sequences.
        chunk: time steps of a training batch.
        lag: steps from a symbol to its question.
        symbols: number of symbols.
        seed: seed of the symbols.

    Attributes:
        vocab_size: number of tokens.
        period: steps from a symbol to the next one.
    """

    def __init__(self, batch_size: int, chunk: int = 20, lag: int = 100, symbols: int = 4, seed: int = 0) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("chunk", chunk, 1), ("lag", lag, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if symbols < 2:
            raise ValueError(f"symbols must be at least 2, got {symbols}")
        self.batch_size = batch_size
        self.chunk = chunk
        self.lag = lag
        self.symbols = symbols
        self.seed = seed
        self.vocab_size = symbols + 2
        self.period = lag + lag // 10 + 2

    def steps(self, start: int, end: int, split: int = 0, since: int = 0) -> tuple[Tensor, Tensor]:
        """Tokens and targets, both (B, end - start), of the time steps from `start` to `end`.

        Args:
            start: first step.
            end: the step after the last one.
            split: 0 for training, another number for other symbols.
            since: the step at which the stream begins, not later than `start`.
        """
        time = torch.arange(start, end)
        place = time + (torch.arange(self.batch_size) * self.period // self.batch_size)[:, None]
        cycle, phase = place // self.period, place % self.period
        drawn = torch.stack([self._symbols_of(c, split) for c in range(int(cycle.min()), int(cycle.max()) + 1)])
        shown = drawn[cycle - cycle.min(), torch.arange(self.batch_size)[:, None]]
        blank, question = self.symbols, self.symbols + 1
        tokens = torch.where(phase == 0, shown, torch.where(phase == self.lag, question, blank))
        return tokens, torch.where((phase == self.lag) & (time - self.lag >= since), shown, -1)

    def _symbols_of(self, cycle: int, split: int) -> Tensor:
        """The symbols of all sequences in a cycle, (B,)."""
        return torch.randint(self.symbols, (self.batch_size,), generator=keyed_generator(self.seed, split, cycle))

    def train_dataloader(self) -> StreamLoader:
        return StreamLoader(lambda i: self.steps(i * self.chunk, (i + 1) * self.chunk), ENDLESS)

    def val_dataloader(self) -> StreamLoader:
        return self._whole(1)

    def test_dataloader(self) -> StreamLoader:
        return self._whole(2)

    def _whole(self, split: int) -> StreamLoader:
        """Eight batches for a model that starts from nothing: every sequence has a symbol and its question."""
        size = 2 * self.period
        return StreamLoader(lambda i: self.steps(i * size, (i + 1) * size, split, since=i * size), 8)


class TokenStream(Tokens):
    """The training part of a sequence as `batch_size` parallel sequences, read in chunks.

    At the end of its piece of the sequence, a parallel sequence starts the piece again. Validation and testing use
    windows of `context` tokens, as in `Tokens`.

    Args:
        batch_size: number of parallel sequences.
        tokens: as for `Tokens`.
        vocab_size: as for `Tokens`.
        chunk: tokens of a training batch, of each parallel sequence.
        context: tokens of a window for validation and testing.
        name: as for `Tokens`.

    Raises:
        DataError: as for `Tokens`, or the sequence ends before the first chunk does.
    """

    def __init__(self, batch_size: int, tokens: Tensor, vocab_size: int, chunk: int, context: int, name: str) -> None:
        super().__init__(batch_size, tokens, vocab_size, context, seed=0, name=name)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.chunk = chunk
        self.piece = (len(tokens) * 8 // 10 - 1) // batch_size
        if self.piece < chunk:
            raise DataError(
                f"the stream ends before its first chunk: {batch_size} sequences of {name} have {self.piece} tokens "
                f"each, and data.chunk={chunk}; set a smaller data.chunk or data.batch_size, or give a longer file"
            )

    def train_dataloader(self) -> Any:
        size = self.batch_size * self.piece
        tokens, following = self._tokens[:size].view(-1, self.piece), self._tokens[1 : size + 1].view(-1, self.piece)
        places = torch.arange(self.piece).split(self.chunk)
        return StreamLoader(lambda i: (tokens[:, places[i]], following[:, places[i]]), len(places))


class TextStream(TokenStream):
    """The characters of a text file as a stream, as in `TokenStream`.

    Args:
        batch_size: number of parallel sequences.
        path: a UTF-8 text file; None for the text that comes with fgtrain.
        chunk: characters of a training batch, of each parallel sequence.
        context: characters of a window for validation and testing.
    """

    def __init__(self, batch_size: int, path: str | None = None, chunk: int = 20, context: int = 64) -> None:
        tokens, vocab, name = read_text(path)
        assert vocab is not None
        self.vocab = vocab
        super().__init__(batch_size, tokens, len(vocab), chunk, context, name)


class SeriesStream(TokenStream):
    """The numbers of a series as a stream, as in `TokenStream`.

    A number's token is its level among `levels`, which occur about equally often in the training part.

    Args:
        batch_size: number of parallel sequences.
        path: a text file with one number in each line; None for the potential of a nerve cell while it fires, 10,000
            values in steps of 0.5 ms, which comes with Matplotlib.
        levels: number of tokens, at most 1,000. Numbers that are equal have the same token, so some may not occur.
        chunk: numbers of a training batch, of each parallel sequence.
        context: numbers of a window for validation and testing.

    Raises:
        DataError: as for `TokenStream`, or a line of the file is not a finite number.
    """

    def __init__(
        self, batch_size: int, path: str | None = None, levels: int = 32, chunk: int = 20, context: int = 64
    ) -> None:
        if not 2 <= levels <= 1000:
            raise ValueError(f"levels must be from 2 to 1,000, got {levels}")
        numbers = _potential() if path is None else _numbers_in(path)
        known = numbers[: max(1, len(numbers) * 8 // 10)]
        bounds = known.sort().values[torch.arange(1, levels) * len(known) // levels]
        name = "the series that comes with Matplotlib" if path is None else f"data.path={path}"
        super().__init__(batch_size, torch.bucketize(numbers, bounds, right=True), levels, chunk, context, name)


def _potential() -> Tensor:
    content = files("matplotlib").joinpath("mpl-data", "sample_data", "membrane.dat").read_bytes()
    return torch.frombuffer(bytearray(content), dtype=torch.float32)[1000:11000]  # it rests before and after


def _numbers_in(path: str) -> Tensor:
    lines = read_bytes(path).split()
    try:
        numbers = torch.tensor([float(line) for line in lines], dtype=torch.float64)
    except ValueError as error:
        raise DataError(f"data.path={path} must have one number in each line ({error})") from error
    if not numbers.isfinite().all():
        raise DataError(f"data.path={path} holds nan or inf; remove or replace these numbers")
    return numbers

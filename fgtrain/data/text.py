"""A sequence of tokens, such as a text file, as language-modelling data."""

from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fgtrain.data.files import refuse_unreadable
from fgtrain.data.in_memory import InMemoryDataModule, Transform
from fgtrain.errors import DataError


class Tokens(InMemoryDataModule):
    """Windows of a sequence: `context` tokens, and the token that follows each of them.

    The first 80 % of the sequence are for training, the next 10 % for validation, and the rest for testing. Windows do
    not overlap.

    Args:
        batch_size: windows per step and process.
        tokens: the sequence, integers below `vocab_size`.
        vocab_size: number of tokens.
        context: T, tokens per window.
        seed: seed of the order of the training windows.
        name: the sequence's name in messages.

    Raises:
        DataError: the sequence is too short for three windows.
    """

    def __init__(self, batch_size: int, tokens: Tensor, vocab_size: int, context: int, seed: int, name: str) -> None:
        super().__init__(batch_size, seed)
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        self.context = context
        self.vocab_size = vocab_size
        self._tokens = tokens
        if len(tokens) < 10 * (context + 1):
            raise DataError(
                f"{name} has {len(tokens)} tokens, too few for windows of {context}; set a smaller data.context"
            )

    def load(self) -> tuple[dict[str, tuple[Tensor, Tensor]], Transform]:
        size = len(self._tokens)
        parts = {"train": (0, size * 8 // 10), "val": (size * 8 // 10, size * 9 // 10), "test": (size * 9 // 10, size)}
        return {name: self._windows(*part) for name, part in parts.items()}, torch.Tensor.long

    def _windows(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        count = (end - start - 1) // self.context
        inputs = self._tokens[start : start + count * self.context]
        following = self._tokens[start + 1 : start + count * self.context + 1]
        return inputs.view(count, self.context), following.view(count, self.context)


class Text(Tokens):
    """Windows of a text file, as in `Tokens`.

    Args:
        batch_size: windows per step and process.
        path: a UTF-8 text file; None for the text that comes with fgtrain, Lewis Carroll's "Jabberwocky" and other
            public-domain verse.
        context: T, tokens per window.
        tokens: "chars", one token per distinct character of the file, or "bytes", 256 tokens for any file.
        seed: seed of the order of the training windows.

    Attributes:
        vocab_size: number of tokens.
        vocab: the characters in the order of their tokens; None for bytes.

    Raises:
        DataError: the file does not exist, is not UTF-8 text, is larger than the memory, or too short for three
            windows.
    """

    def __init__(
        self,
        batch_size: int,
        path: str | None = None,
        context: int = 64,
        tokens: Literal["chars", "bytes"] = "chars",
        seed: int = 0,
    ) -> None:
        text, self.vocab, name = read_text(path, tokens)
        super().__init__(batch_size, text, 256 if self.vocab is None else len(self.vocab), context, seed, name)


def read_text(path: str | None, tokens: Literal["chars", "bytes"] = "chars") -> tuple[Tensor, list[str] | None, str]:
    """The tokens of a text file, its `vocab`, and its name in messages.

    Args:
        path: as for `Text`.
        tokens: as for `Text`.
    """
    if tokens not in ("chars", "bytes"):
        raise ValueError(f"tokens must be 'chars' or 'bytes', got {tokens!r}")
    name = "the text that comes with fgtrain" if path is None else f"data.path={path}"
    content = files("fgtrain.data").joinpath("verse.txt").read_bytes() if path is None else read_bytes(path)
    if tokens == "bytes":
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).long(), None, name
    text = _decode(content, path)
    vocab = sorted(set(text))
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    token_of = np.zeros(1 + ord(vocab[-1]), np.int64)
    token_of[[ord(char) for char in vocab]] = range(len(vocab))
    return torch.from_numpy(token_of[codes]), vocab, name


def read_bytes(path: str) -> bytes:
    """The content of a text file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        refuse_unreadable(Path(path), 20)  # bytes for the text, its code points and its tokens
        return Path(path).read_bytes()
    except DataError as error:
        raise DataError(f"{error}; set data.path=... to a text file") from error
    except (OSError, ValueError) as error:  # ValueError: an invalid path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data.path={path} cannot be read ({reason}); give a text file") from error


def _decode(content: bytes, path: str | None) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"data.path={path} is not UTF-8 text ({error.reason}); use data.tokens=bytes") from error

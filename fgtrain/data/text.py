"""A text file as language-modelling data."""

from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fgtrain.data.files import refuse_unreadable
from fgtrain.data.in_memory import InMemoryDataModule, Transform
from fgtrain.errors import DataError


class Text(InMemoryDataModule):
    """Windows of a text file: `context` tokens, and the token that follows each of them.

    The first 80 % of the text are for training, the next 10 % for validation, and the rest for testing. Windows do not
    overlap.

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
        super().__init__(batch_size, seed)
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        if tokens not in ("chars", "bytes"):
            raise ValueError(f"tokens must be 'chars' or 'bytes', got {tokens!r}")
        self.context = context
        content = _read(path)
        self.vocab: list[str] | None = None
        if tokens == "bytes":
            self.vocab_size = 256
            self._tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
        else:
            text = _decode(content, path)
            self.vocab = sorted(set(text))
            self.vocab_size = len(self.vocab)
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            token_of = np.zeros(1 + ord(self.vocab[-1]), np.int64)
            token_of[[ord(char) for char in self.vocab]] = range(self.vocab_size)
            self._tokens = torch.from_numpy(token_of[codes])
        if len(self._tokens) < 10 * (context + 1):
            name = "the text that comes with fgtrain" if path is None else f"data.path={path}"
            raise DataError(
                f"{name} has {len(self._tokens)} tokens, too few for windows of {context}; set a smaller data.context"
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


def _read(path: str | None) -> bytes:
    if path is None:
        return files("fgtrain.data").joinpath("verse.txt").read_bytes()
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

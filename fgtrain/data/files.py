"""Checks of the user's files before they are read."""

import math
import struct
from collections.abc import Sequence
from pathlib import Path

import torch

from fgtrain.errors import DataError
from fgtrain.memory import free_memory


def refuse_unreadable(path: Path, factor: int) -> int:
    """The size of a file that can be read into memory; the file is not read.

    Args:
        path: the file.
        factor: bytes of memory needed per byte of the file while it is read.

    Raises:
        DataError: the file is empty, larger than the memory, or a pipe or device, which may never end.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path} is a pipe or a device; copy its content into a file")
    size, free = path.stat().st_size, free_memory(torch.device("cpu"))
    if size == 0:
        raise DataError(f"{path} is empty")
    if free is not None and size * factor > free:
        raise DataError(
            f"{path} has {size / 2**30:.3g} GiB; reading it takes {factor} times as much memory, but "
            f"{free / 2**30:.3g} GiB are free; use a part of it"
        )
    return size


def refuse_damaged_idx(path: Path, example_shape: Sequence[int]) -> None:
    """Check that the header of an idx file of bytes (MNIST's format) fits the expected shape and the file's size.

    Args:
        path: the file.
        example_shape: shape of one example in it, () for labels.

    Raises:
        DataError: it does not.
    """
    size, words = refuse_unreadable(path, 3), 2 + len(example_shape)
    with path.open("rb") as file:
        header = file.read(4 * words)
    magic, count, *shape = struct.unpack(f">{words}I", header.ljust(4 * words, b"\0"))
    if magic != 0x801 + len(example_shape):
        raise DataError(f"{path} is not an unpacked idx file of {len(example_shape) + 1} dimensions of bytes")
    if tuple(shape) != tuple(example_shape):
        raise DataError(f"{path} holds examples of shape {tuple(shape)}; they should be {tuple(example_shape)}")
    if count == 0:
        raise DataError(f"{path} holds no examples")
    if (whole := 4 * words + count * math.prod(shape)) != size:
        raise DataError(f"{path} has {size} bytes; the {count} examples that its header declares take {whole}")

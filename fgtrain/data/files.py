"""Files of the user's, looked at before they are read."""

import math
import struct
from collections.abc import Sequence
from pathlib import Path

import torch

from fgtrain.errors import DataError
from fgtrain.memory import free_memory


def refuse_unreadable(path: Path, factor: int) -> int:
    """The size of a file that can be read into memory; nothing of it is read.

    Args:
        path: the file.
        factor: bytes of memory that a byte of it takes while it is read.

    Raises:
        DataError: it is empty, larger than the memory, or a pipe or device, which may never end.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path} is a pipe or a device; copy what it holds into a file")
    size, free = path.stat().st_size, free_memory(torch.device("cpu"))
    if size == 0:
        raise DataError(f"{path} is empty")
    if free is not None and size * factor > free:
        raise DataError(
            f"{path} holds {size / 2**30:.3g} GiB; to read it takes {factor} times as much memory, and "
            f"{free / 2**30:.3g} GiB are free; give a part of it"
        )
    return size


def refuse_damaged_idx(path: Path, example_shape: Sequence[int]) -> None:
    """Compare the header of a file of MNIST's format, of bytes, with what it should say and with the file's size.

    Args:
        path: the file.
        example_shape: of one of the examples in it, () for labels.

    Raises:
        DataError: they differ.
    """
    size, words = refuse_unreadable(path, 3), 2 + len(example_shape)
    with path.open("rb") as file:
        header = file.read(4 * words)
    magic, count, *shape = struct.unpack(f">{words}I", header.ljust(4 * words, b"\0"))
    if magic != 0x801 + len(example_shape):
        raise DataError(f"{path} is no unpacked idx file of {len(example_shape) + 1} dimensions of bytes")
    if tuple(shape) != tuple(example_shape):
        raise DataError(f"{path} holds examples of shape {tuple(shape)}; they should be {tuple(example_shape)}")
    if count == 0:
        raise DataError(f"{path} holds no example")
    if (whole := 4 * words + count * math.prod(shape)) != size:
        raise DataError(f"{path} has {size} bytes; the {count} examples that its header declares take {whole}")

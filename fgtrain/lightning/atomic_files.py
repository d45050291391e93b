"""Files that are complete or absent, whenever a process or a disk stops."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from fgtrain.errors import StorageError, disk_error


def save_atomically(content: Any, path: Path) -> None:
    """torch.save, so that `path` holds either its old content or all of `content`.

    Raises:
        StorageError: the disk is full or cannot be written to.
    """
    atomically(path, lambda file: torch.save(content, file))


def write_atomically(text: str, path: Path) -> None:
    """Path.write_text, as atomic as `save_atomically`.

    Raises:
        StorageError: the disk is full or cannot be written to.
    """
    atomically(path, lambda file: file.write(text.encode()))


def atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a temporary file in the folder of `path` and rename it to `path`; nothing of it is left after an error."""
    beside = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer wraps the first in the second
        reason = disk_error(error)
        if reason is None:
            raise
        raise StorageError(f"cannot write {path}: {reason.strerror}; earlier files are intact") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error

"""Files that are complete or absent, whenever a process or a disk stops."""

import contextlib
import errno
import os
import tempfile
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
    """Write a temporary file in the folder of `path` and rename it to `path`; nothing of it is left after an error.

    A device or a pipe, such as /dev/null, is written to; no file takes its place.
    """
    beside = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
        if is_device(path):
            with open(_descriptor(path), "wb") as file:
                write(file)
            return
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


def is_device(path: Path) -> bool:
    """Whether a path leads to a device or a pipe. /dev/stdout is a link, which may lead to a file."""
    is_link_of_the_system = path.is_symlink() and path.absolute().parent in (Path("/dev"), Path("/dev/fd"))
    return is_link_of_the_system or (path.exists() and not path.is_file() and not path.is_dir())


def _descriptor(path: Path) -> Path | int:
    """What `open` takes for a device. A stream of this process is not opened again, which would truncate its file."""
    streams = {"/dev/stdout": "1", "/dev/stderr": "2"}
    number = path.name if path.absolute().parent == Path("/dev/fd") else streams.get(str(path.absolute()))
    return path if number is None else os.dup(int(number))


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and check that files can be made in it.

    Raises:
        StorageError: they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError as error:
        raise StorageError(f"cannot write {path}: it is not a folder") from error
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def refuse_unwritable(path: Path) -> None:
    """Make the folder of a file that is written after long work, and check that the file can be written.

    Raises:
        StorageError: it cannot.
    """
    if path.is_dir():
        raise StorageError(f"cannot write {path}: {os.strerror(errno.EISDIR)}")
    if is_device(path):
        if not os.access(path, os.W_OK):
            raise StorageError(f"cannot write {path}: {os.strerror(errno.EACCES)}")
    else:
        make_folder(path.parent)

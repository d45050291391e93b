"""A folder belongs to one run at a time."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fgtrain.errors import ConfigError, StorageError
from fgtrain.lightning.atomic_files import make_folder

LOCK = ".lock"
_held: set[int] = set()


@contextmanager
def owned(run_dir: Path, option: str = "hydra.run.dir") -> Generator[None]:
    """Create and lock the folder of a run until the run or its process ends, however it ends.

    Half-written files of an owner that was killed are removed. If the file system cannot lock, a warning is printed and
    the run continues.

    Args:
        run_dir: the folder.
        option: the option that names it, for the message.

    Raises:
        ConfigError: another process holds the lock.
        StorageError: the folder cannot be written.
    """
    make_folder(run_dir)
    try:
        file = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StorageError(f"cannot write {run_dir}: {error.strerror}") from error
    try:
        if _is_locked(file, run_dir, option):
            os.truncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
            for left in (*run_dir.glob("*.tmp"), *run_dir.glob("checkpoints/*.tmp")):
                left.unlink(missing_ok=True)
        _held.add(file)
        yield
    finally:
        _held.discard(file)
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # a child just forked may still have the file open
        os.close(file)


def _is_locked(file: int, run_dir: Path, option: str) -> bool:
    """Lock an open file; False if the file system cannot lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            owner = os.read(file, 200).decode(errors="replace") or "another process"
            raise ConfigError(
                f"{run_dir} belongs to a run in progress ({owner}); wait for its end, or name another folder with "
                f"{option}=..."
            ) from None
        print(
            f"fgtrain: the file system of {run_dir} cannot lock ({error.strerror}): do not start another run in it",
            file=sys.stderr,
        )
        return False
    return True


def _forget() -> None:
    """Close the locks in a forked child: it may outlive its parent, which owns them."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget)

"""Errors of the user; each message says in one line what is wrong, why, and what to do."""

import errno
from pathlib import Path

_DISK_ERRORS = {  # of the disk, of a network file system, or of a pipe
    errno.ENOENT,
    errno.ESTALE,
    errno.EPIPE,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EBUSY,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
}


class UserError(Exception):
    """Base of the errors that the command line prints without a traceback."""


class ConfigError(UserError, ValueError):
    """A mistake in the configuration."""


class DataError(UserError, RuntimeError):
    """The data is missing or invalid."""


class LossError(UserError, ValueError):
    """The loss function does not return a differentiable loss."""


class NoTangent(LossError):
    """The loss depends on no trainable parameter, or its derivatives are lost."""


class ModelError(UserError, ValueError):
    """The model has no parameters to train, or they are on unsuitable devices."""


class UnsupportedOperation(UserError, NotImplementedError):
    """The model uses an operation that has no forward-mode derivative."""


class RankFailed(UserError, RuntimeError):
    """One of several processes of a run ended; the others were ended too."""


class RanksDiffer(UserError, RuntimeError):
    """The processes of a run no longer train the same model."""


class CheckpointError(UserError):
    """A checkpoint is damaged or belongs to another run."""


class StorageError(UserError):
    """A file cannot be written: the disk is full or read-only."""


class DivergenceError(UserError):
    """The loss, a derivative or the gradient is no longer finite, or the loss has diverged."""


class AssumptionError(UserError):
    """The model breaks an assumption of gradient estimators."""


class Interrupted(UserError):
    """A signal ended the run, which was saved.

    Args:
        message: what was saved and where.
        signum: the signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signum


class JobFailed(UserError, RuntimeError):
    """A job of a sweep failed; its folder says why.

    Args:
        message: the reason.
        sweep_dir: folder of the sweep.
    """

    def __init__(self, message: str, sweep_dir: Path) -> None:
        super().__init__(message, sweep_dir)
        self.sweep_dir = sweep_dir

    def __str__(self) -> str:
        return str(self.args[0])


def disk_error(error: BaseException | None) -> OSError | None:
    """The disk error that `error` is or was caused by, if any."""
    seen: set[int] = set()  # causes may form a cycle
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None

"""Mistakes of the user, each told in one line: what, why, and what to do."""

from pathlib import Path


class UserError(Exception):
    """Base of the errors a command line prints without a traceback."""


class ConfigError(UserError, ValueError):
    """A mistake in the configuration."""


class DataError(UserError, RuntimeError):
    """The data cannot be had; says what is missing and where to put it."""


class LossError(UserError, ValueError):
    """The loss function does not return what can be differentiated."""


class NoTangent(LossError):
    """The loss carries no derivative along the directions."""


class ModelError(UserError, ValueError):
    """The model has no parameters that can be trained, or not where they can be."""


class UnsupportedOperation(UserError, NotImplementedError):
    """The model uses an operation that has no forward-mode derivative."""


class RankFailed(UserError, RuntimeError):
    """A process of a run on several ended; the others were ended with it."""


class RanksDiffer(UserError, RuntimeError):
    """The processes of a run no longer train the same model."""


class CheckpointError(UserError):
    """A checkpoint is damaged, or of another run."""


class StorageError(UserError):
    """A file cannot be written: the disk is full or read-only."""


class DivergenceError(UserError):
    """The loss, a derivative or the gradient is no longer a usable number."""


class AssumptionError(UserError):
    """The model breaks what gradient estimators assume of it."""


class Interrupted(UserError):
    """A signal ended the run, which was saved.

    Args:
        message: what was saved, where.
        signum: the signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signum


class JobFailed(UserError, RuntimeError):
    """A job of a sweep failed; its folder says why.

    Args:
        message: why.
        sweep_dir: folder of the sweep.
    """

    def __init__(self, message: str, sweep_dir: Path) -> None:
        super().__init__(message, sweep_dir)
        self.sweep_dir = sweep_dir

    def __str__(self) -> str:
        return str(self.args[0])

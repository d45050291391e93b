"""Mistakes of the user, each told in one line: what, why, and what to do."""


class UserError(Exception):
    """Base of the errors a command line prints without a traceback."""


class ConfigError(UserError, ValueError):
    """A mistake in the configuration."""


class DataError(UserError, RuntimeError):
    """The data cannot be had; says what is missing and where to put it."""


class LossError(UserError, ValueError):
    """The loss function does not return what can be differentiated."""


class UnsupportedOperation(UserError, NotImplementedError):
    """The model uses an operation that has no forward-mode derivative."""


class RankFailed(UserError, RuntimeError):
    """A process of a run on several ended; the others were ended with it."""


class RanksDiffer(UserError, RuntimeError):
    """The processes of a run no longer train the same model."""

"""Errors of libraries during a run that are the user's to mend, as one-line errors."""

from collections.abc import Generator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fgtrain.errors import ConfigError, UserError
from fgtrain.memory import is_out_of_memory


@contextmanager
def library_errors_named() -> Generator[None]:
    """Raise a lack of memory as a UserError, and these errors of Lightning as a ConfigError.

    They are its MisconfigurationException, and early stopping that needs a metric that has not been logged yet.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith("Early stopping conditioned on"):
            raise ConfigError(f"{error}; trainer.log_every_n_steps sets how often train/... is logged") from error
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        reason = str(error)[-200:] or "MemoryError"
        raise UserError(f"not enough memory ({reason}); use a smaller data.batch_size or model") from error

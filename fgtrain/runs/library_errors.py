"""Errors of libraries during a run that are the user's to mend, as one-line errors."""

import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import lightning
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fgtrain.errors import ConfigError, UserError
from fgtrain.memory import is_out_of_memory


@contextmanager
def library_errors_named() -> Generator[None]:
    """Raise a lack of memory as a UserError, and these errors of Lightning as a ConfigError.

    They are its MisconfigurationException, a ValueError that its own code raises, and early stopping that needs a
    metric that has not been logged yet.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error
    except ValueError as error:
        raiser = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, UserError) or Path(lightning.__file__).parent not in raiser.parents:
            raise
        remedy = "; trainer.val_check_interval=1.0 validates after an epoch" * ("`val_check_interval`" in str(error))
        raise ConfigError(f"{error}{remedy}") from error
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith("Early stopping conditioned on"):
            raise ConfigError(f"{error}; trainer.log_every_n_steps sets how often train/... is logged") from error
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        reason = str(error)[-200:] or "MemoryError"
        raise UserError(f"not enough memory ({reason}); use a smaller data.batch_size or model") from error

"""Errors of libraries that the user can mend, raised again as errors of one line."""

import traceback
from collections.abc import Generator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fgtrain.errors import ConfigError, UserError
from fgtrain.memory import is_out_of_memory

_REMEDIES = {
    "Early stopping conditioned on": "trainer.log_every_n_steps sets how often train/... is logged",
    "You requested to check": "trainer.overfit_batches and limit_..._batches also take numbers of batches, from 1 on",
    "`val_check_interval`": "trainer.val_check_interval=1.0 validates after an epoch",
}
"""What to do, by the beginning of the message."""


@contextmanager
def library_errors_named() -> Generator[None]:
    """Raise a lack of memory as a UserError, and what Lightning refuses as a ConfigError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, MisconfigurationException) or _is_raised_by_lightning(error):
            text = str(error).strip()
            remedy = next((f"; {remedy}" for start, remedy in _REMEDIES.items() if text.startswith(start)), "")
            raise ConfigError(f"{text}{remedy}") from error
        if not is_out_of_memory(error):
            raise
        reason = str(error)[-200:] or "MemoryError"
        raise UserError(f"not enough memory ({reason}); use a smaller data.batch_size or model") from error


def _is_raised_by_lightning(error: Exception) -> bool:
    """Whether a `raise` of Lightning's own code raised it, not a library or a function that Lightning called."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return line.startswith("raise ") and frame.f_globals.get("__name__", "").startswith("lightning.")

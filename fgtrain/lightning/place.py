"""The place of a run in its epochs, found from the counters of a checkpoint."""

import math
from typing import Any, NamedTuple

from fgtrain.lightning._lightning import Counters
from fgtrain.lightning.length import batches_per_epoch


class Place(NamedTuple):
    """The place of a run in its epochs, and what is pending there.

    Attributes:
        epoch: the number of epochs before this place.
        is_inside: whether a step of the epoch has been done, and its end has not been left behind.
        is_over: whether a limit or a stop ends the run here.
        validates: whether the validation after the last step is pending.
        ends_epoch: whether the end of the epoch is pending, and no validation before it.
    """

    epoch: int
    is_inside: bool
    is_over: bool
    validates: bool
    ends_epoch: bool

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.is_over and not (self.validates or self.ends_epoch)

    @classmethod
    def of(cls, found: Counters, trainer: Any, step: int, *, stopped: bool) -> "Place":
        """Find it from the counters of a checkpoint.

        Args:
            found: the counters.
            trainer: the trainer of the run.
            step: the number of optimizer steps.
            stopped: whether the run was stopped early.
        """
        is_inside = found.batch > 0 and (found.in_epoch or not found.is_last)  # also if the run ended within it
        epoch = found.epochs - (is_inside and not found.in_epoch)
        stops = stopped and found.epochs >= (trainer.min_epochs or 0) and step >= (trainer.min_steps or 0)
        is_over = stops or 0 <= trainer.max_steps <= step or 0 <= trainer.max_epochs <= epoch
        owes_end = is_inside and found.in_epoch
        due = validation_is_due(trainer, epoch, found.total, found.batch, is_last=found.is_last)
        validates = owes_end and not found.step_is_over and (due or (stops and trainer.enable_validation))
        return cls(epoch, is_inside, is_over, validates, owes_end and not validates and (found.is_last or is_over))


def validation_is_due(trainer: Any, epoch: int, total: int, batch: int, *, is_last: bool) -> bool:
    """Whether a validation is due after the last step so far.

    Args:
        trainer: the trainer of the run.
        epoch: the epoch of that step.
        total: batches of the run so far.
        batch: batches of the epoch so far.
        is_last: whether the epoch has no more batches.
    """
    interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every is not None and (epoch + 1) % every):
        return False
    if isinstance(interval, float):
        batches = batches_per_epoch(trainer)
        if math.isinf(batches):
            return is_last
        interval = max(1, int(batches * interval))
    return isinstance(interval, int) and (total if every is None else batch) % interval == 0

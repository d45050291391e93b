"""What fgtrain uses of Lightning that its documentation does not promise, in one place.

tests/test_private_api.py says which release broke it.
"""

from typing import Any, NamedTuple

from lightning.pytorch.core.optimizer import _configure_optimizers

configure_optimizers = _configure_optimizers
"""(optimizers, scheduler configurations, monitor) of whatever a module's configure_optimizers may return."""


def raise_limits(trainer: Any, steps: int, epochs: int) -> None:
    """Let a run be so much longer, or shorter again; `trainer.max_steps` and `max_epochs` can only be read.

    Its loops do not even enter a run that has reached its length, though it may owe a validation or an epoch's end.
    """
    trainer.fit_loop.epoch_loop.max_steps += steps
    trainer.fit_loop.max_epochs += epochs


class Counters(NamedTuple):
    """Where a run stands, as the counters in a checkpoint say.

    Attributes:
        epochs: that are over.
        in_epoch: one has been begun and is not over.
        batch: batches trained on in the epoch under way, or in the last one if none is.
        total: in the run.
        is_last: whether the epoch has no more batches.
        step_is_over: whether the validation that falls on the last step, if any, has been done.
    """

    epochs: int
    in_epoch: bool
    batch: int
    total: int
    is_last: bool
    step_is_over: bool = True

    @classmethod
    def of(cls, fit: dict[str, Any]) -> "Counters":
        """Read them from `checkpoint["loops"]["fit_loop"]`, written in any hook."""
        epochs, batches = fit["epoch_progress"]["current"], fit["epoch_loop.batch_progress"]
        current = batches["current"]
        return cls(
            epochs["processed"],
            epochs["processed"] < epochs["started"],
            current["processed"],
            batches["total"]["processed"],
            batches["is_last_batch"],
            current["completed"] == current["processed"],
        )

    def write(self, fit: dict[str, Any], logged: int) -> None:
        """Put `fit` into one of the states from which the loops go on correctly.

        Before an epoch is what Lightning calls RESTARTED_ON_EPOCH_START, in one RESTARTED_MID_EPOCH; the last batch is
        over, RESTARTED_ON_LAST, and the validation on it has been done, or is RESTARTED_MID_EVALUATION.

        Args:
            fit: is changed.
            logged: steps on the x axis of the logs.
        """
        for counter in fit["epoch_progress"].values():
            counter |= _same(self.epochs) | {"ready": self.epochs + 1, "started": self.epochs + self.in_epoch}
        batches, validation = fit["epoch_loop.batch_progress"], fit["epoch_loop.val_loop.batch_progress"]
        batches["current"] |= _same(self.batch)
        batches["total"] |= _same(self.total)
        batches["is_last_batch"] = self.is_last
        validation["current"] |= _same(0)
        validation["total"] |= _same(0) if self.step_is_over else _same(0) | {"ready": 1, "started": 1}
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] = logged


def _same(count: int) -> dict[str, int]:
    return dict.fromkeys(("ready", "started", "processed", "completed"), count)

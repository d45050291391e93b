"""The time that a run spends in training steps."""

import time
from typing import Any

import lightning as L
import torch

from fgtrain.studies.timing import synchronize

SECONDS = "clock/seconds"


class TrainingClock(L.Callback):
    """Logs `clock/seconds`, the time of all training steps so far: from a batch to the end of the optimizer's step.

    Validation, logs, data loading and the callbacks that stand before this one do not count.

    Args:
        every_n_steps: optimizer steps between two entries in the log; the last step of a run is logged too.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.seconds = 0.0
        self._began: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self._stop(pl_module.device))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._began = _now(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop(pl_module.device)  # of a batch without a step: gradients are accumulated
        if trainer.global_step % self.every_n_steps == 0:
            self._log(trainer)

    def _stop(self, device: torch.device) -> None:
        if self._began is not None:
            self.seconds += _now(device) - self._began
            self._began = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer)

    def _log(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({SECONDS: self.seconds}, step=trainer.global_step)


def _now(device: torch.device) -> float:
    """The time when the device has done what it was given."""
    synchronize(device)
    return time.perf_counter()

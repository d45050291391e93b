"""Saves the random states in checkpoints, so that a resumed run draws the same numbers as an uninterrupted one."""

from typing import Any

import lightning as L

from fgtrain.distributed import of_all_ranks
from fgtrain.random import random_state, set_random_state


class RandomState(L.Callback):
    """Saves and restores the global generators of torch (CPU and CUDA), numpy and Python, of every process.

    Dropout, random transforms and shuffling loaders draw from them. Directions do not: the step determines their seeds.
    The states from before a validation are restored after it, so that training does not depend on whether and how often
    it is validated: a run resumed from a checkpoint written just before a validation does not repeat it.
    """

    def __init__(self) -> None:
        self._before_validation: dict[str, Any] = {}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before_validation = random_state()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        set_random_state(self._before_validation)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = of_all_ranks(random_state())

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Restored this early because the first iterator of a shuffling loader is made before any hook of training.
        states = checkpoint.get("random_state", [])
        if trainer.global_rank < len(states):  # additional processes of a resumed run start afresh
            set_random_state(states[trainer.global_rank])

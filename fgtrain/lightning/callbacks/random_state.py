"""The random states in the checkpoint, so that a resumed run draws what the uninterrupted one would have drawn."""

from typing import Any

import lightning as L

from fgtrain.distributed import of_all_ranks
from fgtrain.random import random_state, set_random_state


class RandomState(L.Callback):
    """Saves and restores the global generators of torch (CPU and CUDA), numpy and Python, of every process.

    Dropout, random transforms and shuffling loaders draw from them; directions do not: theirs are keyed by the step.
    What validation draws is given back, so that training does not depend on how often, and whether, it is validated: a
    run resumed from a checkpoint written just before a validation does not repeat it.
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
        # This early, since the first iterator of a shuffling loader is made before any hook of training.
        states = checkpoint.get("random_state", [])
        if trainer.global_rank < len(states):  # a run resumed on more processes starts the new ones afresh
            set_random_state(states[trainer.global_rank])

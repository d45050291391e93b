"""The self-check of a run, on its first batch."""

import sys
from typing import Any

import lightning as L
from torch import Tensor

from fgtrain._torch import eager_functions, tree_flatten, tree_map
from fgtrain.lightning.length import first_batch
from fgtrain.lightning.module import EstimatorModule
from fgtrain.network.sharding import is_sharded
from fgtrain.random import random_state, set_random_state
from fgtrain.self_check import self_check


class SelfCheck(L.Callback):
    """Tries the method on the first batch before the first step and reports problems; changes nothing.

    Args:
        examples: the largest number of examples to use from the batch.
    """

    def __init__(self, examples: int = 16) -> None:
        self.examples = examples

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EstimatorModule)
        if any(map(is_sharded, pl_module.parameters())):
            return  # sharded: no process has the whole model
        state = random_state()
        batch = trainer.precision_plugin.convert_input(first_batch(trainer))
        batch = self._few(trainer.strategy.batch_to_device(batch))
        task = pl_module.task
        try:
            # A few examples are not worth a compilation; compiled derivatives are checked when they are compiled.
            with trainer.precision_plugin.train_step_context(), eager_functions():
                noticed = self_check(pl_module.model, lambda net: task.losses(net, batch), pl_module.estimator)
        finally:
            set_random_state(state)
        if trainer.is_global_zero:
            for sentence in noticed:
                print(f"fgtrain: self-check: {sentence}", file=sys.stderr)

    def _few(self, batch: Any) -> Any:
        """The first examples, if all tensors of the batch have the same first dimension."""
        sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)}
        if len(sizes) != 1 or 0 in sizes:
            return batch
        return tree_map(lambda leaf: leaf[: self.examples] if isinstance(leaf, Tensor) else leaf, batch)

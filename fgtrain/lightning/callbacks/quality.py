"""The estimate beside the exact gradient, while training."""

import copy
from typing import Any

import lightning as L
import torch

from fgtrain.errors import ConfigError
from fgtrain.estimators import Backprop
from fgtrain.forward_ad.passes import RepeatedPass
from fgtrain.lightning.module import EstimatorModule
from fgtrain.quality import quality


class GradientQuality(L.Callback):
    """Compares a step's estimate with the exact gradient of its batch, every few steps, overall and per layer.

    Logs `quality/cosine`, `quality/relative_squared_error` and `quality/norm_ratio` of the estimate that the step is
    about to take; `quality/expected_cosine` and `quality/expected_squared_error` in closed form, where the method has
    them; and the first three again for every module, as `quality_of_<module>/...`. With gradient accumulation it looks
    at the first batch of a step. What is of all parameters is also among the trainer's callback metrics.

    What is trained stays bit for bit the same. A comparison costs a backward pass and one estimate more.

    Args:
        every_n_steps: optimizer steps between two comparisons, the first being at step 0.

    Raises:
        ConfigError: every_n_steps is less than 1.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, EstimatorModule)
        if trainer.global_step % self.every_n_steps or batch_idx % pl_module.accumulate_grad_batches:
            return
        metrics = self.compare(trainer, pl_module, batch, batch_idx)
        overall = {name: torch.tensor(value) for name, value in metrics.items() if name.startswith("quality/")}
        trainer.callback_metrics.update(overall)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def compare(self, trainer: L.Trainer, module: EstimatorModule, batch: Any, batch_idx: int) -> dict[str, float]:
        """The metrics of one comparison, which leaves no trace."""
        before = RepeatedPass(module.model)
        estimator = copy.deepcopy(module.estimator)  # its state is not to learn from a look
        with trainer.precision_plugin.train_step_context():
            exact = module.estimate(Backprop(), batch, batch_idx).grads
            before.rewind()
            estimate = module.estimate(estimator, batch, batch_idx).grads
        before.rewind()
        metrics = {}
        for layer, found in quality(estimate, exact).items():
            group = f"quality_of_{layer}" if layer else "quality"
            metrics |= {f"{group}/{name}": value for name, value in found._asdict().items()}
        closed_form = {
            "quality/expected_cosine": estimator.expected_cosine(exact),
            "quality/expected_squared_error": estimator.relative_squared_error(exact),
        }
        if module.ranks.size == 1 or module.distributed_tangents == "shared":
            metrics |= {name: value for name, value in closed_form.items() if value is not None}
        return metrics

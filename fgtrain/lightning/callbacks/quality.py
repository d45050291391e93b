"""Compares estimates with the exact gradient during training."""

import copy
from typing import Any

import lightning as L
import torch

from fgtrain.errors import ConfigError
from fgtrain.estimators import Backprop
from fgtrain.lightning.module import EstimatorModule
from fgtrain.lightning.step import StepEstimates
from fgtrain.network.parameters import trainable_params
from fgtrain.network.snapshot import Snapshot
from fgtrain.quality import quality


class GradientQuality(L.Callback):
    """Compares a step's estimate with the exact gradient of its batch, every few steps, overall and per layer.

    Logs `quality/cosine`, `quality/relative_squared_error` and `quality/norm_ratio` of the estimate that the step is
    about to use, and the same three for every module that the loss depends on, as `quality_of_<module>/...`. If the
    method has closed forms, it also logs `quality/expected_cosine` and `quality/expected_squared_error`. With gradient
    accumulation it compares on the first batch of a step. The metrics over all parameters are also in the trainer's
    callback metrics.

    The trained weights stay the same bit for bit. A comparison costs one more backward pass and one more estimate. A
    module made by `fgtrain.lightning.convert` runs its training_step for them; its logs and metrics ignore these runs.

    Args:
        every_n_steps: optimizer steps between two comparisons; the first is at step 0.

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
        if trainer.global_step % self.every_n_steps or batch_idx % _step_of(pl_module).micro_batches:
            return
        if isinstance(pl_module, EstimatorModule) and pl_module.position.ends_epoch:
            return  # the batch only ends the epoch and is not trained on
        metrics = self.compare(trainer, pl_module, batch, batch_idx)
        overall = {name: torch.tensor(value) for name, value in metrics.items() if name.startswith("quality/")}
        trainer.callback_metrics.update(overall)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def compare(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> dict[str, float]:
        """The metrics of one comparison, without side effects; empty if training_step skips the batch."""
        step = _step_of(module)
        before = Snapshot(step.model)
        estimator = copy.deepcopy(step.estimator)  # the comparison must not change its state
        with trainer.precision_plugin.train_step_context():
            reference = step.estimate(Backprop(), batch, batch_idx)
            before.restore()
            estimate = step.estimate(estimator, batch, batch_idx)
        before.restore()
        if reference is None or estimate is None:
            return {}
        metrics = {}
        for layer, found in quality(estimate.grads, reference.grads).items():
            group = f"quality_of_{layer}" if layer else "quality"
            metrics |= {f"{group}/{name}": value for name, value in found._asdict().items()}
        params = trainable_params(step.model)  # a closed form counts those too that the loss does not use
        exact = {name: reference.grads.get(name, torch.zeros_like(p)) for name, p in params.items()}
        closed_form = {
            "quality/expected_cosine": estimator.expected_cosine(exact),
            "quality/expected_squared_error": estimator.relative_squared_error(exact),
        }
        if step.ranks.size == 1 or step.tangents == "shared":
            metrics |= {name: value for name, value in closed_form.items() if value is not None}
        return metrics


def _step_of(module: Any) -> StepEstimates:
    if not hasattr(module, "fgtrain_estimates"):
        raise ConfigError(
            f"GradientQuality compares the estimates of a module, but {type(module).__name__} trains without an "
            "estimator; convert it first, with fgtrain.lightning.convert(module, estimator)"
        )
    return module.fgtrain_estimates()

"""The LightningModule of all runs: manual optimization with any estimator."""

import inspect
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fgtrain.distributed import Ranks, TangentsOver
from fgtrain.errors import ConfigError
from fgtrain.estimators import Estimate, GradientEstimator, write_grads
from fgtrain.lightning.checkpoints import (
    carry_over,
    machine,
    name_other_machine,
    refuse_foreign,
    refuse_other_optimizer,
    refuse_unclaimed,
)
from fgtrain.lightning.divergence import Divergence
from fgtrain.lightning.exchange import Exchange, Gradients, average_weights, exchange_of
from fgtrain.lightning.length import total_steps
from fgtrain.lightning.optimizers import step_together
from fgtrain.lightning.position import Position
from fgtrain.lightning.step import StepEstimates, estimate_for_step, scaler_of
from fgtrain.lightning.strategy import shard_model
from fgtrain.network.sharding import like_parameter, whole
from fgtrain.tasks import Task


class EstimatorModule(L.LightningModule):
    """Trains `model` on `task` with gradients from `estimator`; methods differ only in the estimator.

    A training step estimates the gradient of the batch, together with the other processes. `divergence` checks the
    estimate, and the gradient is written to `.grad`, or added to it. After the last batch of an optimizer step, the
    gradient is clipped and the optimizer and the scheduler step, unless an estimate was not finite. `position` and the
    hooks of checkpoints make a resumed run equal to an undisturbed one.

    Args:
        model: the network.
        task: its loss and metrics.
        estimator: the source of the gradients.
        optimizer: called with the parameters.
        scheduler: called with the optimizer, and with `total_steps` if it takes that; stepped after each optimizer
            step.
        seed: the directions of a step are a function of (seed, optimizer step, micro-batch).
        accumulate_grad_batches: batches averaged into one optimizer step.
        clip_grad_norm: largest norm of the whole gradient; None for none.
        divergence: checks every estimate before a step uses it.
        distributed_tangents: whether processes share their directions, see `fgtrain.distributed`.
        distributed_timeout: seconds a process waits for the others, once training has begun.
        distributed_gradients: what processes send of exact gradients, see `fgtrain.lightning.exchange`.
        local_steps: optimizer steps after which the weights are averaged, with distributed_gradients="local".

    Attributes:
        ranks: the processes, once the trainer has set them up.
        position: saves and restores the position of the run in its data.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        estimator: GradientEstimator,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        *,
        seed: int = 0,
        accumulate_grad_batches: int = 1,
        clip_grad_norm: float | None = None,
        divergence: Divergence | None = None,
        distributed_tangents: TangentsOver = "shared",
        distributed_timeout: float = 60.0,
        distributed_gradients: Gradients = "mean",
        local_steps: int = 16,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.task = task
        self.estimator = estimator
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.seed = seed
        self.accumulate_grad_batches = accumulate_grad_batches
        self.clip_grad_norm = clip_grad_norm
        self.divergence = divergence or Divergence()
        self.distributed_tangents: TangentsOver = distributed_tangents
        self.distributed_timeout = distributed_timeout
        self.distributed_gradients: Gradients = distributed_gradients
        self.local_steps = local_steps
        self._exchange: Exchange | None = None
        self.ranks = Ranks()
        self.position = Position()
        self._gathered_bytes = 0
        self._is_accumulating = False  # in the middle of an optimizer step
        self._saved_grads: dict[str, Tensor] = {}
        self._searches = False

    def setup(self, stage: str) -> None:
        self.trainer.precision_plugin.convert_module(self)  # Lightning does so after it has loaded a checkpoint
        if self.ranks.size != self.trainer.world_size:
            self.ranks = Ranks(self.distributed_timeout)

    def on_train_start(self) -> None:
        self.ranks.end_startup()
        self._exchange = exchange_of(self.distributed_gradients, self.estimator, self.model, self.ranks)
        params, self._is_accumulating = dict(self.named_parameters()), bool(self._saved_grads)
        while self._saved_grads:
            name, grad = self._saved_grads.popitem()
            params[name].grad = like_parameter(grad, params[name])
        length = total_steps(self.trainer, self.accumulate_grad_batches)
        is_over = self.trainer.should_stop or (length is not None and self.trainer.global_step >= length)
        if self.trainer.ckpt_path is not None and not is_over:
            self._meet_schedule(length)

    def _meet_schedule(self, length: int | None) -> None:
        """Use the learning rate of this run's schedule; report it if the checkpoint has another one.

        Raises:
            ConfigError: it is 0, so that nothing would be trained.
        """
        step, groups = self.trainer.global_step, self.trainer.optimizers[0].param_groups
        for config in self.trainer.lr_scheduler_configs:
            if not isinstance(schedule := config.scheduler, LambdaLR):
                continue  # continues from the current rate
            for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                planned = base * factor(schedule.last_epoch)
                if planned != group["lr"] and self.trainer.is_global_zero:
                    print(
                        f"fgtrain: the learning rate jumps from {group['lr']:.3g} to {planned:.3g} at step {step}, "
                        f"since its schedule now has {length} steps",
                        file=sys.stderr,
                    )
                group["lr"] = planned
        if not any(group["lr"] for group in groups):
            raise ConfigError(
                f"the learning rate is 0 at step {step}, where the run continues: its schedule ends there; give it "
                "a longer one, or start another run from its weights"
            )

    def on_train_end(self) -> None:
        if self._is_local:
            average_weights(self.model, self.ranks)

    @property
    def _is_local(self) -> bool:
        return self.distributed_gradients == "local" and self.ranks.size > 1

    def configure_callbacks(self) -> list[L.Callback]:
        return [self.divergence, self.position]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        if not self.position.ends_epoch:
            return None
        self.position.leave_epoch(self.trainer)
        return -1  # Lightning ends the epoch

    def on_validation_model_zero_grad(self) -> None:
        if not self._is_accumulating:
            super().on_validation_model_zero_grad()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["machine"] = machine(self.device)
        if self._is_accumulating:
            grads = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
            checkpoint["accumulated_grads"] = {name: whole(grad).cpu() for name, grad in grads.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        refuse_foreign(checkpoint, self)
        trainer: Any = self.trainer  # type checkers do not see its callbacks
        refuse_unclaimed(checkpoint, trainer.callbacks)
        if trainer.is_global_zero:
            name_other_machine(checkpoint, trainer.strategy.root_device)
        if trainer.ckpt_path is not None:
            carry_over(checkpoint, trainer.callbacks, Path(trainer.ckpt_path), trainer.is_global_zero)
        self._saved_grads = dict(checkpoint.get("accumulated_grads", {}))
        for saved in checkpoint.get("optimizer_states", []):
            refuse_other_optimizer(saved, self._optimizer(), self.make_scheduler)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self._gathered_bytes:
            self._gathered_bytes = shard_model(self.model, self.estimator, self.trainer.strategy)
            if self.clip_grad_norm is not None or self.distributed_tangents != "shared":
                raise ConfigError("sharded parameters take clip_grad_norm=null and distributed.tangents=shared")

    def estimate(
        self, estimator: GradientEstimator, batch: Any, batch_idx: int, exchange: Exchange | None = None
    ) -> Estimate:
        """The estimate that all ranks would add to `.grad` at the current step; changes nothing."""
        trainer = self.trainer
        return estimate_for_step(
            trainer.precision_plugin,
            self.ranks,
            estimator,
            self.model,
            lambda model: self.task.losses(model, batch),
            key=(self.seed, trainer.global_step, batch_idx % self.accumulate_grad_batches),
            tangents=self.distributed_tangents,
            micro_batches=self.accumulate_grad_batches,
            exchange=exchange,
        )

    def fgtrain_estimates(self) -> StepEstimates:
        """The current step, for callbacks that need estimates."""
        return StepEstimates(
            self.estimator,
            self.model,
            self.ranks,
            self.distributed_tangents,
            self.accumulate_grad_batches,
            self.estimate,
        )

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        trainer, micro_batch = self.trainer, batch_idx % self.accumulate_grad_batches
        estimate = self.estimate(self.estimator, batch, batch_idx, self._exchange)
        is_usable = scaler_of(trainer.precision_plugin) is not None or self.divergence.inspect(estimate, trainer)
        self.ranks.bytes_sent += self._gathered_bytes
        write_grads(self.model, estimate.grads, accumulate=micro_batch > 0, check_finite=False)  # checked above
        due = micro_batch + 1 == self.accumulate_grad_batches or trainer.is_last_batch
        self._is_accumulating = not due
        if due and self.divergence.step_is_finite():
            self._optimizer_step(partial(self._evaluate_again, batch, batch_idx))
        return {
            "loss": estimate.loss,
            "directional_derivatives": estimate.directional_derivatives,
            "replayed": estimate.replayed,
            "skipped": not is_usable,
        }

    def _evaluate_again(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The loss, with gradients, at other parameters, for L-BFGS; None if one of them is not finite."""
        estimate = self.estimate(self.estimator, batch, batch_idx, self._exchange)
        write_grads(self.model, estimate.grads, check_finite=False)
        return estimate.loss if self.divergence.inspect_again(estimate, self.trainer) else None

    def _optimizer_step(self, closure: Callable[[], Tensor | None]) -> None:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        if self.clip_grad_norm is not None:
            scaler = scaler_of(self.trainer.precision_plugin)  # optimizer.step() divides by its scale
            scale = 1.0 if scaler is None else scaler.get_scale()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm * scale)
        optimizer.step(closure) if self._searches else optimizer.step()
        if self._is_local and self.trainer.global_step % self.local_steps == 0:
            average_weights(self.model, self.ranks)
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: Any) -> None:
        metrics = self.task.metrics(self.model, batch)
        counts = [len(values) for values in metrics.values()]
        sums = torch.stack([values.sum().float() for values in metrics.values()])
        # Not with Lightning's sync_dist: over gloo it rounds the mean number of examples down to an integer.
        total = self.ranks.mean(torch.stack([sums, sums.new_tensor(counts)])) * self.ranks.size
        for name, value, count in zip(metrics, *total, strict=True):
            # The value is equal on all ranks already; sync_dist=True only prevents Lightning's warning.
            size = round(count.item())
            self.log(f"{split}/{name}", value / count, batch_size=size, on_epoch=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer()
        if self.make_scheduler is None:
            return step_together(optimizer)
        options = {}
        if "total_steps" in inspect.signature(self.make_scheduler).parameters:
            total = total_steps(self.trainer, self.accumulate_grad_batches)
            if total is None:
                raise ConfigError("the scheduler needs the run's length: set trainer.max_steps or trainer.max_epochs")
            options["total_steps"] = total
        return step_together(([optimizer], [self.make_scheduler(optimizer, **options)]))

    def _optimizer(self) -> Optimizer:
        optimizer = self.make_optimizer(p for p in self.model.parameters() if p.requires_grad)
        self._searches = isinstance(optimizer, LBFGS)
        if self._searches and (self.accumulate_grad_batches > 1 or self.clip_grad_norm is not None):
            raise ConfigError(
                "L-BFGS takes accumulate_grad_batches=1 and clip_grad_norm=null, since it evaluates again"
            )
        return optimizer

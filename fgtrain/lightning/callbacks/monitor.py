"""The log of training: every step is measured, and means over several steps are logged."""

import time
from array import array
from statistics import fmean, median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn.utils import get_total_norm

from fgtrain.distributed import of_all_ranks
from fgtrain.memory import forget_peak_memory, peak_memory_mib
from fgtrain.network.sharding import whole

DERIVATIVES = "train/directional_derivative"
LOGGED = (
    "train/loss",
    DERIVATIVES,
    f"{DERIVATIVES}_abs",
    f"{DERIVATIVES}_max",
    "train/grad_norm",
    "train/lr",
    "train/step_ms",
)


class Monitor(L.Callback):
    """Logs loss, learning rate, step time, memory, directional derivatives and gradient norm every few steps.

    The values are means over the steps since the last entry, except for the largest |derivative|, a maximum, and the
    gradient norm, which is that of the last step. They are also stored in the trainer's callback metrics, for early
    stopping and checkpoints. The loss is stored there at every validation and epoch end too.

    Args:
        every_n_steps: optimizer steps between two entries in the log.

    Attributes:
        step_seconds: wall-clock seconds of every step, from the end of one to the end of the next.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.step_seconds = array("d")
        self.train_seconds = 0.0
        self._losses: list[Tensor] = []
        self._derivatives: list[Tensor] = []
        self._grad_norm: Tensor | None = None
        self._resumed_at = self._last_end = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "train_seconds": self.train_seconds + time.perf_counter() - self._resumed_at,
            "step_seconds": torch.tensor(self.step_seconds, dtype=torch.float32),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_seconds = state_dict["train_seconds"]
        self.step_seconds = array("d", state_dict.get("step_seconds", torch.empty(0)).tolist())

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        losses = torch.stack(self._losses).cpu() if self._losses else torch.empty(0)
        derivatives = [torch.cat(self._derivatives).cpu()] if self._derivatives else []
        checkpoint["not_yet_logged"] = of_all_ranks({"losses": losses, "derivatives": derivatives})

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("not_yet_logged", [])
        if trainer.global_rank < len(saved):
            own, device = saved[trainer.global_rank], trainer.strategy.root_device
            self._losses = list(own["losses"].to(device))
            self._derivatives = [values.to(device) for values in own["derivatives"]]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        forget_peak_memory()
        self._resumed_at = self._last_end = time.perf_counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self._due(trainer, after=1):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._grad_norm = whole(get_total_norm(grads))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.step_seconds.append(now - self._last_end)
        self._last_end = now
        if outputs.get("skipped"):  # its values are not usable
            return
        self._losses.append(outputs["loss"])  # averaged later, to save time in short steps
        if outputs["directional_derivatives"] is not None:
            self._derivatives.append(outputs["directional_derivatives"])
        if self._due(trainer) and self._grad_norm is not None:
            self._write(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._offer_loss(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._offer_loss(trainer)

    def _offer_loss(self, trainer: L.Trainer) -> None:
        if self._losses:
            loss = torch.stack(self._losses).mean()
            trainer.callback_metrics["train/loss"] = trainer.strategy.reduce(loss, reduce_op="mean")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.perf_counter()
        self.train_seconds, self._resumed_at = self.train_seconds + now - self._resumed_at, now
        if self._losses:
            self._write(trainer, pl_module)

    def _due(self, trainer: L.Trainer, after: int = 0) -> bool:
        return (trainer.global_step + after) % self.every_n_steps == 0

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {"train/loss": torch.stack(self._losses).mean()}
        if self._derivatives:
            derivatives = torch.cat(self._derivatives)
            metrics[DERIVATIVES] = derivatives.mean()
            metrics[f"{DERIVATIVES}_abs"] = derivatives.abs().mean()
            metrics[f"{DERIVATIVES}_max"] = derivatives.abs().max()
            self._write_histogram(trainer, derivatives)
        if self._grad_norm is not None:
            metrics["train/grad_norm"] = self._grad_norm
        metrics["train/lr"] = torch.tensor(float(trainer.optimizers[0].param_groups[0]["lr"]))
        metrics["train/step_ms"] = torch.tensor(1e3 * fmean(self.step_seconds[-len(self._losses) :]))
        metrics["train/loss"] = trainer.strategy.reduce(metrics["train/loss"], reduce_op="mean")
        trainer.callback_metrics.update(metrics)
        logged = {name: value.item() for name, value in metrics.items()}
        logged["train/steps_per_second"] = 1e3 / max(1e-9, logged["train/step_ms"])
        logged["train/memory_mib"] = peak_memory_mib()
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.global_step)
        self._losses, self._derivatives, self._grad_norm = [], [], None

    def _write_histogram(self, trainer: L.Trainer, derivatives: Tensor) -> None:
        finite = derivatives[derivatives.isfinite()]  # a loss scaler lets infinities through
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and len(finite):
                # TensorBoard draws 30 bins; its default of hundreds is slow, since it computes their checksum byte by
                # byte.
                logger.experiment.add_histogram("train/directional_derivatives", finite, trainer.global_step, bins=30)

    def summary(self) -> dict[str, float]:
        """Cost of the run so far: seconds of training, median milliseconds of a step, peak memory in MiB."""
        return {
            "train_seconds": self.train_seconds,
            "step_ms_median": 1e3 * median(self.step_seconds) if self.step_seconds else 0.0,
            "peak_memory_mib": peak_memory_mib(),
        }

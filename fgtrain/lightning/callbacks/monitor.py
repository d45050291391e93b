"""What is logged of training: every step is measured, few are written."""

import resource
import time
from array import array
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


class Monitor(L.Callback):
    """Logs loss, learning rate, step time, directional derivatives and gradient norm every few steps.

    The values are means over the steps since the last time (the largest |derivative| is a maximum, the gradient norm
    that of the last step), so what is written is smooth and writing seldom loses nothing. They are also put among the
    trainer's callback metrics, for early stopping and checkpoints.

    Args:
        every_n_steps: optimizer steps between two entries in the log.

    Attributes:
        step_seconds: wall-clock seconds of every step, from the end of one to the end of the next.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.step_seconds = array("d")
        self.train_seconds = 0.0
        self._sums: dict[str, Tensor] = {}
        self._largest = torch.zeros(())
        self._count = 0
        self._grad_norm: Tensor | None = None
        self._resumed_at = self._last_end = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._resumed_at = self._last_end = time.perf_counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self._due(trainer, after=1):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._grad_norm = get_total_norm(grads)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.step_seconds.append(now - self._last_end)
        self._last_end = now
        self._add("loss", outputs["loss"])
        derivatives = outputs["directional_derivatives"]
        if derivatives is not None:
            self._add("directional_derivative", derivatives.mean())
            size = derivatives.abs()
            self._add("directional_derivative_abs", size.mean())
            self._largest = torch.maximum(self._largest.to(size.device), size.max())
        self._count += 1
        if self._due(trainer) and self._grad_norm is not None:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.train_seconds += time.perf_counter() - self._resumed_at
        if self._count:
            self._write(trainer, pl_module)

    def _due(self, trainer: L.Trainer, after: int = 0) -> bool:
        return (trainer.global_step + after) % self.every_n_steps == 0

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {f"train/{name}": value / self._count for name, value in self._sums.items()}
        if "directional_derivative" in self._sums:
            metrics["train/directional_derivative_max"] = self._largest
        if self._grad_norm is not None:
            metrics["train/grad_norm"] = self._grad_norm
        metrics["train/lr"] = torch.tensor(float(trainer.optimizers[0].param_groups[0]["lr"]))
        metrics["train/step_ms"] = torch.tensor(1e3 * sum(self.step_seconds[-self._count :]) / self._count)
        metrics["train/loss"] = trainer.strategy.reduce(metrics["train/loss"], reduce_op="mean")
        trainer.callback_metrics.update(metrics)
        for logger in trainer.loggers:
            logger.log_metrics({name: value.item() for name, value in metrics.items()}, step=trainer.global_step)
        self._sums, self._count, self._grad_norm = {}, 0, None
        self._largest = torch.zeros(())

    def summary(self) -> dict[str, float]:
        """Cost of the run so far: seconds of training, median milliseconds of a step, peak memory in MiB."""
        return {
            "train_seconds": self.train_seconds,
            "step_ms_median": 1e3 * median(self.step_seconds) if self.step_seconds else 0.0,
            "peak_memory_mib": peak_memory_mib(),
        }


def peak_memory_mib() -> float:
    """Largest memory so far: of the accelerator where there is one, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

"""A progress bar over the steps of the run, because epochs of small data sets have few steps."""

import math
import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fgtrain.lightning.length import total_steps


class StepProgress(L.Callback):
    """Loss, validation accuracy and steps per second, refreshed a few times a second.

    If the output is not a terminal, it prints a line at every tenth of the run instead.
    """

    refresh_seconds = 0.5

    def __init__(self) -> None:
        self.console = Console(stderr=True, markup=False, emoji=False)
        self._bar: Progress | None = None
        self._total = 0
        self._first_step = 0
        self._started = self._refreshed = 0.0
        self._next_line: float = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()
        self._first_step = trainer.global_step
        self._total = total_steps(trainer, getattr(pl_module, "accumulate_grad_batches", 1)) or 0
        self._next_line = self._first_step + self._line_every() if trainer.is_global_zero else math.inf
        if trainer.is_global_zero and self.console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console, auto_refresh=False)
            self._bar.add_task("", total=self._total or None, status="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is None:
            if trainer.global_step >= self._next_line:
                self._next_line += self._line_every()
                self.console.print(self._status(trainer), highlight=False)
        elif time.monotonic() - self._refreshed > self.refresh_seconds:
            self._refreshed = time.monotonic()
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, status=self._status(trainer))
            self._bar.refresh()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, status=self._status(trainer))
            self._bar.stop()
            self._bar = None

    def _line_every(self) -> int:
        return max(1, (self._total - self._first_step) // 10) if self._total else 1000

    def _status(self, trainer: L.Trainer) -> str:
        done = trainer.global_step - self._first_step
        parts = [f"step {trainer.global_step}" + (f"/{self._total}" if self._total else "")]
        for name, label in (("train/loss", "loss"), ("val/acc", "val/acc")):
            if name in trainer.callback_metrics:
                parts.append(f"{label} {trainer.callback_metrics[name].item():.4g}")
        parts.append(f"{done / max(1e-9, time.monotonic() - self._started):.0f} steps/s")
        return "  ".join(parts)

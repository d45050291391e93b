"""The cost of a step of scripts/train.py, compared with plain PyTorch and plain Lightning doing the same updates."""

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import nn
from torch.nn.utils import get_total_norm

from fgtrain.estimators import Estimate, write_grads
from fgtrain.lightning.callbacks import StepProgress, Summary
from fgtrain.lightning.module import EstimatorModule
from fgtrain.memory import peak_memory_mib
from fgtrain.random import keyed_generator
from fgtrain.runs.build import Run, build
from fgtrain.runs.cli import CONF


def loop_overhead(method: str = "backprop", num_steps: int = 2000, repeats: int = 5) -> dict[str, float]:
    """Processor time per step of the default run, with logging, validation and progress bar, and of simpler loops.

    They are measured in turn, `repeats` times, in this process on one thread. Processor time, unlike wall-clock time,
    excludes other programs.

    Args:
        method: a file in conf/method.
        num_steps: steps of each measurement.
        repeats: measurements; their medians are returned.

    Returns:
        Microseconds per step: `bare_us` for a loop in PyTorch, `plain_us` for a plain LightningModule, `trained_us` for
        the run. The plain module logs the same values as often as the run and writes as many checkpoints, without a
        progress bar, histograms and the check for nan. `to_plain` is the median ratio of the run to it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _trained(method, 50)  # warm-up: imports, first-use caches
    rounds = [
        (_bare(method, num_steps), _plain(method, num_steps), _trained(method, num_steps)) for _ in range(repeats)
    ]
    torch.set_num_threads(threads)
    bare, plain, trained = (median(times) for times in zip(*rounds, strict=True))
    to_plain = median(trained / plain for _, plain, trained in rounds)
    return {"bare_us": bare, "plain_us": plain, "trained_us": trained, "to_plain": to_plain}


def _build(method: str, num_steps: int, run_dir: str) -> Run:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"method={method}", f"run_dir={run_dir}", f"trainer.max_steps={num_steps}"]
        return build(compose("train", [*overrides, "trainer.accelerator=cpu", "trainer.devices=1"]))


class _Stopwatch(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = -time.process_time()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.process_time()


def _trained(method: str, num_steps: int) -> float:
    """Microseconds per step of scripts/train.py at a terminal."""
    stopwatch = _Stopwatch()
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        module, data, trainer, _ = _build(method, num_steps, folder)
        callbacks: list[L.Callback] = vars(trainer)["callbacks"]
        for callback in callbacks:
            if isinstance(callback, (StepProgress, Summary)):
                callback.console = Console(file=nowhere, force_terminal=True)
        callbacks.append(stopwatch)
        trainer.fit(module, data)
    return 1e6 * stopwatch.seconds / num_steps


class _Plain(L.LightningModule):
    """The module of a run, written without fgtrain's own LightningModule."""

    def __init__(self, module: EstimatorModule, total_steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.task, self.estimator = module.model, module.task, module.estimator
        self.make_optimizer, self.make_scheduler = module.make_optimizer, module.make_scheduler
        self.seed, self.clip_grad_norm, self.total_steps = module.seed, module.clip_grad_norm, total_steps
        self.last_logged = time.perf_counter()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        losses = partial(self.task.losses, batch=batch)
        estimate = self.estimator(self.model, losses, generator=keyed_generator(self.seed, self.global_step, 0))
        write_grads(self.model, estimate.grads, check_finite=False)
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        optimizer: Any = self.optimizers()
        optimizer.step()
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.step()
        trainer: Any = self.trainer
        if self.global_step % trainer.log_every_n_steps == 0:  # self.log alone takes a millisecond
            self._log_step(estimate, optimizer.param_groups[0]["lr"])

    def _log_step(self, estimate: Estimate, lr: float) -> None:
        """Log what `Monitor` logs, apart from the histogram, of this step alone."""
        now = time.perf_counter()
        values: dict[str, Any] = {"loss": estimate.loss, "lr": lr, "memory": peak_memory_mib()}
        values["seconds"], self.last_logged = now - self.last_logged, now
        if (derivatives := estimate.directional_derivatives) is not None:
            sizes = derivatives.abs()
            values |= {"derivative": derivatives.mean(), "mean_size": sizes.mean(), "largest": sizes.max()}
        values["grad_norm"] = get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.log_dict({f"train/{name}": value for name, value in values.items()})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for name, values in self.task.metrics(self.model, batch).items():
            self.log(f"val/{name}", values.float().mean(), batch_size=len(values))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.model.parameters())
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [self.make_scheduler(optimizer, total_steps=self.total_steps)]


def _plain(method: str, num_steps: int) -> float:
    """Microseconds per step in plain Lightning."""
    stopwatch = _Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        module, data, built, _ = _build(method, num_steps, folder)
        run: Any = built
        trainer = L.Trainer(
            max_steps=num_steps,
            max_epochs=-1,
            accelerator="cpu",
            devices=1,
            callbacks=[ModelCheckpoint(f"{folder}/checkpoints", every_n_train_steps=500), stopwatch],
            logger=TensorBoardLogger(folder, name="plain"),
            val_check_interval=run.val_check_interval,
            check_val_every_n_epoch=None,
            log_every_n_steps=run.log_every_n_steps,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(_Plain(module, num_steps), data)
    return 1e6 * stopwatch.seconds / num_steps


def _bare(method: str, num_steps: int) -> float:
    """Microseconds per step of a loop in PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        module, data, _, _ = _build(method, num_steps, folder)
    data.setup("fit")
    model, loader = module.model, data.train_dataloader()
    optimizer = module.make_optimizer(model.parameters())
    scheduler = module.make_scheduler(optimizer, total_steps=num_steps) if module.make_scheduler else None
    step, start = 0, time.process_time()
    while step < num_steps:
        for batch in loader:
            losses = partial(module.task.losses, batch=batch)
            estimate = module.estimator(model, losses, generator=keyed_generator(module.seed, step, 0))
            write_grads(model, estimate.grads, check_finite=False)
            if module.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), module.clip_grad_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            step += 1
            if step == num_steps:
                break
    return 1e6 * (time.process_time() - start) / num_steps

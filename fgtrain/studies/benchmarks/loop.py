"""What a step of scripts/train.py costs beside a bare PyTorch loop that makes the same updates on the same data."""

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from torch import nn

from fgtrain.estimators import write_grads
from fgtrain.lightning.callbacks import StepProgress, Summary
from fgtrain.random import keyed_generator
from fgtrain.runs.cli import CONF
from fgtrain.runs.run import Run, build


def loop_overhead(method: str = "backprop", num_steps: int = 2000, repeats: int = 5) -> dict[str, float]:
    """Processor time of a step of the default run, with logging, validation and progress bar, and of a bare loop.

    Both are measured in turn, `repeats` times, in this process on one thread; the processor's time rather than the
    wall's, so that what else runs on the machine does not count.

    Args:
        method: a file of conf/method.
        num_steps: steps of each measurement.
        repeats: measurements; their medians are returned.

    Returns:
        Microseconds a step: `bare_us`, `trained_us`, and the median of their differences, `overhead_us`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _trained(method, 50)  # imports, first-use caches
    pairs = [(_bare(method, num_steps), _trained(method, num_steps)) for _ in range(repeats)]
    torch.set_num_threads(threads)
    return {
        "bare_us": median(bare for bare, _ in pairs),
        "trained_us": median(trained for _, trained in pairs),
        "overhead_us": median(trained - bare for bare, trained in pairs),
    }


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
    """Microseconds a step as scripts/train.py makes it, before a terminal."""
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


def _bare(method: str, num_steps: int) -> float:
    """Microseconds a step of the plain loop."""
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

"""Checkpoints to continue from: at intervals, at the end, and when a signal ends the run."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from fgtrain.errors import Interrupted
from fgtrain.lightning.checkpoints import NAMES

_SIGNALS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,  # the terminal was closed
}


class Recovery(Checkpoint):
    """Writes `last.ckpt` and keeps the one before it as `previous.ckpt` until the new one is complete.

    As a `Checkpoint` it runs after all other callbacks, so it saves their state of the same step.

    A first Ctrl-C, SIGTERM or SIGHUP saves after the step in progress and ends the run; a second one ends it at once.
    Signals that were ignored when the run began (nohup) stay ignored.

    Args:
        dirpath: folder of the checkpoints.
        every_n_steps: optimizer steps between two checkpoints.
    """

    def __init__(self, dirpath: str, every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.dirpath = Path(dirpath)
        self.every_n_steps = every_n_steps
        self._saved_at = -1
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._ask_every, self._unasked, self._asked_at = 1, 0, 0.0  # how often ranks ask one another for signals

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = trainer.global_step
        self._signal = None
        self._ask_every, self._unasked, self._asked_at = 1, 0, time.monotonic()
        try:
            heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._remember) for number in heard}
        except ValueError:  # only the main thread can set handlers
            self._handlers = {}

    def _remember(self, number: int, frame: Any) -> None:
        self._signal = number
        for each in self._handlers:  # Lightning's handler would wait for all ranks in mid-step
            signal.signal(each, _SIGNALS[each])

    def _release_signals(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._signalled(trainer):
            self._save(trainer)
            number = self._signal or signal.SIGTERM
            raise Interrupted(
                f"stopped by {signal.Signals(number).name} after step {step}, saved in {self.dirpath / NAMES[0]}; "
                f"the same command with ckpt_path={self.dirpath / NAMES[0]} continues",
                number,
            )
        if step % self.every_n_steps == 0 and step != self._saved_at:
            self._save(trainer)

    def _signalled(self, trainer: L.Trainer) -> bool:
        """Whether a signal has reached any rank; ranks ask one another every tenth step, or every second.

        A message at every step would slow fast ones down; ten slow ones take longer than a scheduler waits.
        """
        if trainer.world_size == 1:
            return self._signal is not None
        self._unasked += 1
        if self._unasked < self._ask_every:
            return False
        waited = time.monotonic() - self._asked_at
        state = torch.tensor([float(self._signal is not None), waited], device=trainer.strategy.root_device)
        signalled, waited = trainer.strategy.reduce(state, reduce_op="max").tolist()
        self._ask_every = min(10, max(1, int(self._unasked / max(waited, 1e-3))))
        self._unasked, self._asked_at = 0, time.monotonic()
        return bool(signalled)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self._saved_at:
            self._save(trainer)
        self._release_signals()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release_signals()

    def _save(self, trainer: L.Trainer) -> None:
        last, previous = (self.dirpath / name for name in NAMES)
        fresh = self.dirpath / f"next.{os.getpid()}.ckpt.tmp"
        trainer.save_checkpoint(fresh)
        if trainer.is_global_zero:
            if last.exists():
                _keep_as(previous, last)
            fresh.replace(last)
        self._saved_at = trainer.global_step


def _keep_as(previous: Path, last: Path) -> None:
    """Give the checkpoint `last` the second name `previous`, so that a checkpoint exists at every moment."""
    if previous.is_dir():  # written by a sharded strategy
        shutil.rmtree(previous)
    beside = previous.with_name(f"{previous.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    try:
        os.link(last, beside)
    except OSError:  # it is a folder, or the file system has no links
        last.replace(previous)
    else:
        beside.replace(previous)
        beside.unlink(missing_ok=True)  # a rename between two names of one file, left by a kill here, does nothing

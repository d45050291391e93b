"""Runs that are killed, stopped and resumed."""

import os
import random
import signal
import time

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from fgtrain.lightning.checkpoints import read_checked
from fgtrain.models import Residual


class SignalAt(L.Callback):
    """Sends a signal at a step, as a scheduler or a user does."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step = step
        self.number = number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class AwaitSigterm(L.Callback):
    """Lets a run take a number of steps, and then wait for a SIGTERM: it is never over before that."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        while trainer.global_step == self.step and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            time.sleep(0.01)  # `Recovery` has not heard it


class Noise(nn.Module):
    """Random numbers of numpy and of Python."""

    def forward(self, x):
        return x * (1 + 0.1 * np.random.rand() + 0.1 * random.random())


class Noisy(nn.Sequential):
    """Everything with a state: Dropout, BatchNorm, and noise from numpy and Python."""

    def __init__(self):
        super().__init__(
            *(Noise(), nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3)),
            *(Residual(nn.Linear(5, 5)), nn.Linear(5, 3)),
        )


STEPS = ("trainer.max_steps=60", "trainer.val_check_interval=25", "hydra.run.dir=run")


def final_weights(folder):
    return read_checked(folder / "run" / "checkpoints" / "last.ckpt")["state_dict"]


HOOKS = ["on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"]


class Killed(BaseException):
    """Ends a run immediately, without saving."""


class KillFirst(L.Callback):
    """Raises `Killed` at the n-th event, before other callbacks see it."""

    def __init__(self, at):
        self.left = at
        for hook in HOOKS:
            setattr(self, hook, self._event)

    def _event(self, *_):
        self.left -= 1
        if self.left == 0:
            raise Killed


class KillLast(KillFirst, Checkpoint):
    """After all others: Lightning puts checkpoint callbacks last."""


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)

"""Runs that are killed, stopped and resumed."""

import os
import random
import signal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from fgtrain.lightning.checkpoints import read_checked


class SignalAt(L.Callback):
    """What a scheduler or a user does at a step."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step = step
        self.number = number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class Noise(nn.Module):
    """Random numbers of numpy and of Python."""

    def forward(self, x):
        return x * (1 + 0.1 * np.random.rand() + 0.1 * random.random())


class Noisy(nn.Sequential):
    """Everything with a state: Dropout, BatchNorm, and noise from numpy and Python."""

    def __init__(self):
        super().__init__(
            Noise(), nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 3)
        )


STEPS = ("trainer.max_steps=60", "trainer.val_check_interval=25", "hydra.run.dir=run")


def final_weights(folder):
    return read_checked(folder / "run" / "checkpoints" / "last.ckpt")["state_dict"]


HOOKS = ["on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"]


class Killed(BaseException):
    """Ends a run on the spot: nothing is saved."""


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

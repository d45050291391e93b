"""A stand-in for data where there is none."""

from collections.abc import Iterator

import lightning as L
import torch


class Steps(L.LightningDataModule):
    """`num_steps` empty batches: the clock of a task without data, such as a test function."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        if num_steps < 1:
            raise ValueError(f"a task without data counts steps: trainer.max_steps must be at least 1, got {num_steps}")
        self.num_steps = num_steps

    def train_dataloader(self) -> "_Clock":
        return _Clock(self.num_steps)

    def val_dataloader(self) -> "_Clock":
        return _Clock(1)


class _Clock:
    """Yields an empty tensor so many times."""

    def __init__(self, ticks: int) -> None:
        self.ticks = ticks

    def __len__(self) -> int:
        return self.ticks

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([torch.empty(0)] * self.ticks)

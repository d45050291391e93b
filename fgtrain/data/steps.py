"""A stand-in for the data of tasks without data."""

import lightning as L
import torch

from fgtrain.data.streams import StreamLoader


class Steps(L.LightningDataModule):
    """`num_steps` empty batches, which count the steps of a task without data, such as a test function."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        if num_steps < 1:
            raise ValueError(f"a task without data counts steps: trainer.max_steps must be at least 1, got {num_steps}")
        self.num_steps = num_steps

    def train_dataloader(self) -> StreamLoader:
        return StreamLoader(lambda _: torch.empty(0), self.num_steps)

    def val_dataloader(self) -> StreamLoader:
        return StreamLoader(lambda _: torch.empty(0), 1)

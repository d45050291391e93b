"""A stand-in for the data of tasks without data."""

from collections.abc import Iterator

import lightning as L
import torch


class Steps(L.LightningDataModule):
    """`num_steps` empty batches, which count the steps of a task without data, such as a test function."""

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
    """Yields an empty tensor `ticks` times; its position can be saved."""

    def __init__(self, ticks: int) -> None:
        self.ticks = ticks
        self._tick = 0
        self._resumed = False

    def __len__(self) -> int:
        return self.ticks

    def __iter__(self) -> Iterator[torch.Tensor]:
        if not (self._resumed and self._tick < self.ticks):
            self._tick = 0
        self._resumed = False
        while self._tick < self.ticks:
            self._tick += 1
            yield torch.empty(0)

    def state_dict(self) -> dict[str, int]:
        return {"tick": self._tick}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._tick, self._resumed = state["tick"], True

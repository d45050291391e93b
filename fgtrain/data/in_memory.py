"""Data sets that fit in memory, with batches taken from tensors.

For small inputs, a loader with workers takes longer than the training step; indexing a tensor does not.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fgtrain.errors import DataError
from fgtrain.random import keyed_generator

Transform = Callable[[Tensor], Tensor]


class TensorLoader:
    """Batches (inputs, labels) in an order that depends only on (seed, epoch). The position can be saved.

    Every rank draws the same order and takes its own part of each batch of world_size * batch_size examples.

    Args:
        inputs: (N, ...).
        labels: (N,).
        batch_size: examples per batch and rank.
        transform: applied to the inputs of each batch.
        shuffle: use a new order every epoch, else the order of the tensors.
        seed: seed of the orders.
        rank: index of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        batch_size: int,
        transform: Transform,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.inputs = inputs
        self.labels = labels
        self.transform = transform
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.global_batch = batch_size * world_size
        self._epoch = -1
        self._batch = 0
        self._resumed = False

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.global_batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not (self._resumed and self._batch < len(self)):
            self._epoch, self._batch = self._epoch + 1, 0
        self._resumed = False
        order = self._order()
        while self._batch < len(self):
            start = self._batch * self.global_batch
            index = self._shard(order[start : start + self.global_batch])
            self._batch += 1
            yield self.transform(self.inputs[index]), self.labels[index]

    def _order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.labels))
        return torch.randperm(len(self.labels), generator=keyed_generator(self.seed, self._epoch))

    def _shard(self, index: Tensor) -> Tensor:
        """This rank's part. In training all parts have equal size: the first examples of the last batch fill it up."""
        if self.world_size == 1:
            return index
        if self.shuffle and len(index) % self.world_size:
            missing = self.world_size - len(index) % self.world_size
            index = torch.cat([index, index.repeat(missing)[:missing]])
        return index.tensor_split(self.world_size)[self.rank]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._batch, self._resumed = state["epoch"], state["batch"], True


class InMemoryDataModule(L.LightningDataModule):
    """Base of data sets held as tensors; subclasses implement `load`.

    Args:
        batch_size: training examples per step and process.
        seed: seed of the order of the training examples.

    Attributes:
        input_shape: shape of one input.
        num_classes: number of classes.
    """

    input_shape: Sequence[int]
    num_classes: int

    def __init__(self, batch_size: int, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.seed = seed
        self._splits: dict[str, tuple[Tensor, Tensor]] = {}
        self._transform: Transform = torch.Tensor.float

    @abstractmethod
    def load(self) -> tuple[dict[str, tuple[Tensor, Tensor]], Transform]:
        """({"train" | "val" | "test": (inputs, labels)}, transform of a batch of inputs)."""

    def setup(self, stage: str) -> None:
        if not self._splits:
            self._splits, self._transform = self.load()
            for name, split in self._splits.items():
                known = (getattr(self, fact, None) for fact in ("num_classes", "input_shape"))
                refuse_other_examples(f"the {name} split", *split, *known)

    def train_dataloader(self) -> TensorLoader:
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> TensorLoader:
        return self._loader("val", 4096)

    def test_dataloader(self) -> TensorLoader:
        return self._loader("test", 4096)

    def _loader(self, split: str, batch_size: int, **options: Any) -> TensorLoader:
        if self.trainer is not None:
            options |= {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        inputs, labels = self._splits[split]
        return TensorLoader(inputs, labels, batch_size, self._transform, seed=self.seed, **options)


def standardize(train_inputs: Tensor) -> Transform:
    """The map x -> (x - mean) / std per channel, with the statistics of the training inputs (N, C, ...).

    A channel that is constant in training is only shifted: its std is taken as 1.
    """
    values = train_inputs if train_inputs.is_floating_point() else train_inputs.float()
    others = (0, *range(2, values.dim()))
    mean = values.mean(others, keepdim=True)
    std = values.std(others, keepdim=True)
    rounding = 8 * torch.finfo(values.dtype).eps * mean.abs()
    std = torch.where(std > rounding, std, 1.0)
    return lambda inputs: ((inputs.to(values.dtype) - mean) / std).float()


def refuse_other_examples(
    where: str, inputs: Tensor, labels: Tensor, num_classes: int | None, input_shape: Sequence[int] | None
) -> None:
    """Check that inputs and labels agree with each other and with the attributes of their data module.

    Raises:
        DataError: they differ; the message begins with `where`, the name of their split or batch.
    """
    if len(inputs) != len(labels):
        raise DataError(f"{where} has {len(inputs)} inputs and {len(labels)} labels")
    lowest, highest = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if num_classes is not None and not 0 <= lowest <= highest < num_classes:
        raise DataError(
            f"labels of {where} run from {lowest} to {highest}; they must be from 0 to {num_classes - 1}, for "
            f"num_classes={num_classes}"
        )
    if input_shape is not None and math.prod(inputs.shape[1:]) != math.prod(input_shape):
        raise DataError(
            f"inputs of {where} have the shape {tuple(inputs.shape[1:])}, but input_shape of the data is "
            f"{tuple(input_shape)}"
        )

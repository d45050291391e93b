"""torchvision's classification data sets, held in memory as bytes."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor

from fgtrain.data.files import refuse_damaged_idx
from fgtrain.data.in_memory import InMemoryDataModule, Transform, standardize
from fgtrain.errors import DataError


class _Source(NamedTuple):
    input_shape: tuple[int, int, int]
    num_classes: int
    val_size: int
    files: str


_IDX_FILES = "{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte, unpacked, in ROOT/NAME/raw"
_SOURCES = {
    "MNIST": _Source((1, 28, 28), 10, 5000, _IDX_FILES),
    "FashionMNIST": _Source((1, 28, 28), 10, 5000, _IDX_FILES),
    "CIFAR10": _Source((3, 32, 32), 10, 5000, "cifar-10-batches-py in ROOT"),
    "CIFAR100": _Source((3, 32, 32), 100, 5000, "cifar-100-python in ROOT"),
}


class TorchvisionImages(InMemoryDataModule):
    """MNIST, FashionMNIST, CIFAR10 or CIFAR100 through torchvision, downloaded on first use.

    The validation set is the last part of torchvision's training set: 5000 images, or a tenth of a smaller one.

    Args:
        name: name of torchvision's class.
        root: folder of the data, in torchvision's layout.
        batch_size: training examples per step and process.
        train_size: use only the first `train_size` training images; None uses all.
        seed: seed of the order of the training examples.
    """

    def __init__(
        self,
        name: Literal["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"],
        root: str,
        batch_size: int,
        train_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        if name not in _SOURCES:
            raise ValueError(f"data name must be one of {', '.join(_SOURCES)}, got {name!r}")
        if train_size is not None and train_size < 1:
            raise ValueError(f"train_size must be at least 1 or null, got {train_size}")
        self.dataset = name
        self.root = root
        self.train_size = train_size
        self.input_shape = _SOURCES[name].input_shape
        self.num_classes = _SOURCES[name].num_classes

    def prepare_data(self) -> None:
        self._read(train=True, download=True)
        self._read(train=False, download=True)

    def load(self) -> tuple[dict[str, tuple[Tensor, Tensor]], Transform]:
        images, labels = self._read(train=True)
        end = len(labels) - min(_SOURCES[self.dataset].val_size, len(labels) // 10)
        train = (images[:end][: self.train_size], labels[:end][: self.train_size])
        val = (images[end:], labels[end:])
        return {"train": train, "val": val, "test": self._read(train=False)}, standardize(train[0])

    def _read(self, *, train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) as bytes, and labels (N,)."""
        files = _SOURCES[self.dataset].files.replace("ROOT", self.root).replace("NAME", self.dataset)
        remedy = f"put {files}, or name another folder with data.root=..."
        try:
            Path(self.root).mkdir(parents=True, exist_ok=True)
            for path in sorted(Path(self.root, self.dataset, "raw").glob("*-ubyte")):
                if path.is_file():
                    refuse_damaged_idx(path, self.input_shape[1:] if "idx3" in path.name else ())
            found = getattr(torchvision.datasets, self.dataset)(self.root, train=train, download=download)
            return _tensors(found)
        except DataError as error:
            raise DataError(f"{error}; {remedy}") from error
        except Exception as error:  # torchvision raises many errors for damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.dataset} is not in data.root={self.root} and cannot be downloaded, or is damaged ({reason}); "
                f"{remedy}"
            ) from error


def _tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    images = torch.as_tensor(np.asarray(dataset.data))
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(dataset.targets)
    if images.dtype != torch.uint8 or labels.shape != (len(images),):
        shapes = f"{tuple(images.shape)} {images.dtype} and {tuple(labels.shape)}"
        raise DataError(f"images and labels in {dataset.root} do not match: {shapes}")
    return images, labels

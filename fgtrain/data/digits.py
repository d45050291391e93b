"""scikit-learn's handwritten digits: a small, real data set that needs no download."""

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from fgtrain.data.in_memory import InMemoryDataModule, Transform, standardize
from fgtrain.data.splits import split_by_class


class Digits(InMemoryDataModule):
    """1797 images of 8 x 8, ten classes, split 70 / 10 / 20 % by class for training, validation and test.

    The split is the same for every seed. Source: Alpaydin and Kaynak 1998, UCI, as shipped with scikit-learn.

    Args:
        batch_size: training examples per step and process.
        seed: seed of the order of the training examples.
        classes: use only these digits, labelled 0, 1, ... in this order; None uses all.
    """

    input_shape = (1, 8, 8)

    def __init__(self, batch_size: int, seed: int = 0, classes: Sequence[int] | None = None) -> None:
        super().__init__(batch_size, seed)
        self.classes = list(range(10)) if classes is None else list(classes)
        if len(set(self.classes)) < max(2, len(self.classes)) or not set(self.classes) <= set(range(10)):
            raise ValueError(f"classes must be at least two different digits, got {self.classes}")
        self.num_classes = len(self.classes)

    def load(self) -> tuple[dict[str, tuple[Tensor, Tensor]], Transform]:
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 1, 8, 8).astype("uint8")
        splits = split_by_class(images, labels)
        splits = {name: self._chosen(*split) for name, split in splits.items()}
        return splits, standardize(splits["train"][0])

    def _chosen(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        is_class = labels.unsqueeze(1) == torch.tensor(self.classes)
        return images[is_class.any(1)], is_class[is_class.any(1)].int().argmax(1)

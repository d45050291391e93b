"""Parts of a data set for training, validation and test."""

import numpy as np
from sklearn.model_selection import train_test_split
from torch import Tensor, from_numpy


def split_by_class(inputs: np.ndarray, labels: np.ndarray) -> dict[str, tuple[Tensor, Tensor]]:
    """70 / 10 / 20 % of every class as "train", "val" and "test". The split is the same at every call."""
    rest, test, rest_labels, test_labels = train_test_split(
        inputs, labels, test_size=0.2, stratify=labels, random_state=0
    )
    train, val, train_labels, val_labels = train_test_split(
        rest, rest_labels, test_size=0.125, stratify=rest_labels, random_state=0
    )
    return {
        "train": (from_numpy(train), from_numpy(train_labels)),
        "val": (from_numpy(val), from_numpy(val_labels)),
        "test": (from_numpy(test), from_numpy(test_labels)),
    }

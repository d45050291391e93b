"""scikit-learn's handwritten digits: real, small, and always there."""

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, from_numpy

from fgtrain.data.in_memory import InMemoryDataModule, Transform, standardize


class Digits(InMemoryDataModule):
    """1797 images of 8 x 8, ten classes, split 70 / 10 / 20 % by class for training, validation and test.

    The split is the same for every seed. Source: Alpaydin and Kaynak 1998, UCI, as shipped with scikit-learn.
    """

    input_shape = (1, 8, 8)
    num_classes = 10

    def load(self) -> tuple[dict[str, tuple[Tensor, Tensor]], Transform]:
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 1, 8, 8).astype("uint8")
        rest, test, rest_labels, test_labels = train_test_split(
            images, labels, test_size=0.2, stratify=labels, random_state=0
        )
        train, val, train_labels, val_labels = train_test_split(
            rest, rest_labels, test_size=0.125, stratify=rest_labels, random_state=0
        )
        splits = {
            "train": (from_numpy(train), from_numpy(train_labels)),
            "val": (from_numpy(val), from_numpy(val_labels)),
            "test": (from_numpy(test), from_numpy(test_labels)),
        }
        return splits, standardize(splits["train"][0])

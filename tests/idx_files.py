"""Files in the format of MNIST."""

import struct

import numpy as np


def write_idx(path, array):
    """An uncompressed file of the MNIST format."""
    array = np.asarray(array, dtype=np.uint8)
    header = struct.pack(f">{1 + array.ndim}i", 0x800 + array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root):
    """scikit-learn's digits as MNIST files, 28 x 28."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.kron(images.reshape(-1, 8, 8) * 15, np.ones((3, 3)))
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    for name in ("MNIST", "FashionMNIST"):
        folder = root / name / "raw"
        folder.mkdir(parents=True)
        for prefix, part in (("train", slice(0, 1500)), ("t10k", slice(1500, None))):
            write_idx(folder / f"{prefix}-images-idx3-ubyte", images[part])
            write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels[part])

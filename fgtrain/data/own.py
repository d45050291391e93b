"""Your own data, from a CSV file or a folder of images, held in memory and split 70 / 10 / 20 %."""

import csv
import math
import sys
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

from fgtrain.data.files import refuse_unreadable
from fgtrain.data.in_memory import InMemoryDataModule, Transform, standardize
from fgtrain.data.splits import split_by_class
from fgtrain.errors import ConfigError, DataError

KINDS = (*IMG_EXTENSIONS, ".gif")
"""The ends of the names of images."""

Splits = tuple[dict[str, tuple[Tensor, Tensor]], Transform]


class CsvTable(InMemoryDataModule):
    """A table with a header: one column holds the class, all others hold numbers.

    If all classes are numbers, their values count: 1 and 1.0 are one class.

    Args:
        path: the CSV file.
        batch_size: training examples per step and process.
        seed: key of the order of the training examples.
        label: the column of the class, as numbers or words; None for the last one.

    Raises:
        ConfigError: there is no path, or the table has no such column.
        DataError: the file cannot be read, does not fit into memory, lacks a label, or holds something other than
            finite numbers.
    """

    def __init__(self, path: str | None, batch_size: int, seed: int = 0, label: str | None = None) -> None:
        super().__init__(batch_size, seed)
        header, rows = _table(_existing(path))
        if label is not None and label not in header:
            raise ConfigError(f"{path} has no column {label!r}; it has {', '.join(header)}")
        column = len(header) - 1 if label is None else header.index(label)
        labels = [row.pop(column).strip() for row in rows]
        if "" in labels:
            empty = f"row {labels.index('') + 1} has nothing in the column {header[column]!r}, which names the class"
            raise DataError(f"{path}: {empty}; give it a class, remove it, or choose another column by data.label=...")
        values = _values(labels)
        if odd := [i for i, value in enumerate(values) if isinstance(value, Decimal) and not value.is_finite()]:
            raise DataError(
                f"{path}: row {odd[0] + 1} has {header[column]}={labels[odd[0]]}; give it a class, or remove it"
            )
        classes, self._labels = np.unique(np.array(values, dtype=object), return_inverse=True)
        self._classes = [str(name) for name in classes]
        names = [*header[:column], *header[column + 1 :]]
        self._inputs = np.fromiter((_number(cell) for row in rows for cell in row), float).reshape(len(rows), -1)
        with np.errstate(over="ignore"):
            unusable = ~np.isfinite(self._inputs.astype(np.float32))
        for row, place in np.argwhere(unusable):
            raise DataError(
                f"{path}: row {row + 1} has {rows[row][place]!r} in the column {names[place]!r}; all columns but "
                f"{header[column]!r} must hold finite numbers, below 3e38"
            )
        self.num_classes, self.input_shape = len(classes), self._inputs.shape[1:]

    def load(self) -> Splits:
        return _split(self._inputs, self._labels, self._classes)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _values(labels: list[str]) -> list[Any]:
    """The labels as exact numbers, if all are; else as they are."""
    try:
        return [Decimal(label) for label in labels]
    except InvalidOperation:
        return labels


class ImagesOfFolders(InMemoryDataModule):
    """Images in one folder per class, cut to a square and scaled to one size: `path/cat/1.png`, `path/dog/1.png`.

    Of several frames, the first is taken. Other files in the folders are left out, and a line on stderr says so.

    Args:
        path: the folder of the classes.
        batch_size: training examples per step and process.
        seed: key of the order of the training examples.
        image_size: height and width of the images.

    Raises:
        ConfigError: there is no path.
        DataError: it holds no images, or one that cannot be read or whose pixels have more than eight bits.
    """

    def __init__(self, path: str | None, batch_size: int, seed: int = 0, image_size: int = 32) -> None:
        super().__init__(batch_size, seed)
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        try:
            self._folder = _Folders(str(_existing(path)), loader=_eight_bits, is_valid_file=_is_image)
        except OSError as error:
            kinds = ", ".join(KINDS)
            raise DataError(f"{path} must hold a folder of images ({kinds}) for every class; {error}") from error
        self.image_size = image_size
        self.num_classes, self.input_shape = len(self._folder.classes), (3, image_size, image_size)

    def load(self) -> Splits:
        if self.trainer is None or self.trainer.is_global_zero:
            _tell_of_others(Path(self._folder.root), tuple(self._folder.classes))
        images = []
        for path, _ in self._folder.samples:
            try:
                image = self._folder.loader(path)
            except DataError:
                raise
            except Exception as error:  # Pillow raises errors of all kinds for damaged files
                raise DataError(f"{path} cannot be read as an image; {error}") from error
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.resize((self.image_size,) * 2, box=(left, top, left + side, top + side))
            images.append(pil_to_tensor(square).numpy())
        return _split(np.stack(images), np.array(self._folder.targets), self._folder.classes)


class _Folders(ImageFolder):
    """Without hidden folders and files, which tools leave beside the user's: `.ipynb_checkpoints`, `._1.png`."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        return classes, {name: i for i, name in enumerate(classes)}


def _is_image(path: str) -> bool:
    return path.lower().endswith(KINDS) and not Path(path).name.startswith(".")


@cache
def _tell_of_others(root: Path, classes: Sequence[str]) -> None:
    """Say once which files in the folders of the classes are not images."""
    found = [path for name in classes for path in sorted((root / name).rglob("*"))]
    others = [path for path in found if path.is_file() and not (path.name.startswith(".") or _is_image(str(path)))]
    if others:
        files = "1 file that is not an image" if len(others) == 1 else f"{len(others)} files that are not images"
        print(f"fgtrain: left out of {root}: {files} ({', '.join(KINDS)}), such as {others[0]}", file=sys.stderr)


def _eight_bits(path: str) -> Image.Image:
    with Image.open(path) as image:
        if image.mode[0] in "IF":  # Pillow would make all but the darkest pixels white
            raise DataError(f"{path} has pixels of more than eight bits; convert it to eight")
        return image.convert("RGB")


def _existing(path: str | None) -> Path:
    if path is None:
        raise ConfigError("data.path is not set; give the path of your data")
    if not Path(path).exists():
        raise ConfigError(f"data.path={path} does not exist")
    return Path(path)


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a CSV file."""
    refuse_unreadable(path, 20)  # bytes for a cell as text and as a number
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin UTF-8 with a mark
            reader = csv.reader(file)
            (_, header), *rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file with a header; {error}") from error
    odd = [line for line, row in rows if len(row) != len(header)]
    if odd or not rows or len(header) < 2:
        few = "it needs rows, and two columns at least, with commas between them"
        what = f"line {odd[0]} has another number of columns" if odd else few
        raise DataError(f"{path}: {what}")
    return [name.strip() for name in header], [row for _, row in rows]


def _split(inputs: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Splits:
    counts = np.bincount(labels)
    if len(counts) < 2:
        raise DataError(f"the data have one class only, {classes[0]}; give examples of another one")
    try:
        splits = split_by_class(inputs, labels)
    except ValueError as error:
        raise DataError(
            f"{len(labels)} examples of {len(counts)} classes cannot be split into training, validation and test: "
            f"class {classes[int(counts.argmin())]} has only {counts.min()}; give ten of every class"
        ) from error
    return splits, standardize(splits["train"][0])

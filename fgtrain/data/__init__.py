"""LightningDataModules. Their `input_shape` and `num_classes`, if any, are passed to the model's constructor."""

from fgtrain.data.digits import Digits
from fgtrain.data.in_memory import InMemoryDataModule, TensorLoader
from fgtrain.data.mnist1d import Mnist1D
from fgtrain.data.mnist_subset import MnistSubset
from fgtrain.data.own import CsvTable, ImagesOfFolders
from fgtrain.data.steps import Steps
from fgtrain.data.streams import Recall, SeriesStream, TextStream
from fgtrain.data.text import Text
from fgtrain.data.vision import TorchvisionImages

__all__ = [
    "CsvTable",
    "Digits",
    "ImagesOfFolders",
    "InMemoryDataModule",
    "Mnist1D",
    "MnistSubset",
    "Recall",
    "SeriesStream",
    "Steps",
    "TensorLoader",
    "Text",
    "TextStream",
    "TorchvisionImages",
]

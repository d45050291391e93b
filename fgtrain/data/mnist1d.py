"""MNIST-1D: signals of 40 numbers in ten classes, made here from a recipe."""

import numpy as np
import torch
from torch import Tensor

from fgtrain.data.in_memory import InMemoryDataModule, Transform, standardize

TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
"""The digits 0 to 9 as heights of a pen that moves to the right."""

POINTS = len(TEMPLATES[0])  # of a template
SHORTEST_PADDING, LONGEST_PADDING = 36, 60  # points without signal behind it
SIZE = POINTS + LONGEST_PADDING  # points of a signal before it is downsampled
SCALE = 0.4  # the signal is multiplied by 1 + SCALE times a uniform number from -1/2 to 1/2
SHIFTS = 48  # the signal is shifted in a circle by fewer points
CORRELATED, BLUR = 0.25, 2  # standard deviations of the noise around the signal and of its blur, in points
INDEPENDENT = 0.02  # standard deviation of the noise on every point
SHEAR = 0.75  # a line is subtracted that falls or rises by up to half of it
LENGTH = 40  # points of an example
EXAMPLES_PER_CLASS = 500


class Mnist1D(InMemoryDataModule):
    """5,000 signals (1, 40) in ten classes: 3,500 for training, 500 for validation, 1,000 for testing.

    Each is one of ten templates of 12 points: padded to a random length and stretched, scaled, shifted in a circle,
    surrounded by smooth noise, given independent noise, sheared and downsampled. With backprop and Adam, logistic
    regression reaches 32 %, an MLP with one hidden layer 58 %, and three convolutions 87 %.

    A data_seed of 42 gives the numbers that the authors publish, to rounding. Their test set is the test set here.
    The last 500 of their 4,000 training examples are for validation here.

    Args:
        batch_size: training examples per step and process.
        seed: key of the order of the training examples.
        data_seed: key of the examples, from 0 to 2^32 - 1; they are the same for every `seed`.

    Source: Greydanus and Kobak 2024, arXiv:2011.14439.
    """

    input_shape = (1, LENGTH)
    num_classes = len(TEMPLATES)

    def __init__(self, batch_size: int, seed: int = 0, data_seed: int = 42) -> None:
        super().__init__(batch_size, seed)
        if not 0 <= data_seed < 2**32:
            raise ValueError(f"data_seed must be from 0 to 2^32 - 1, got {data_seed}")
        self.data_seed = data_seed

    def load(self) -> tuple[dict[str, tuple[Tensor, Tensor]], Transform]:
        signals, labels = mnist1d_signals(self.data_seed)
        inputs = torch.from_numpy(signals).float().unsqueeze(1)
        sizes = [3500, 500, 1000]
        parts = zip(inputs.split(sizes), labels.split(sizes), strict=True)
        splits = dict(zip(("train", "val", "test"), parts, strict=True))
        return splits, standardize(splits["train"][0])


def mnist1d_signals(seed: int) -> tuple[np.ndarray, Tensor]:
    """Signals (N, 40) with mean 0 and variance 1 over all their numbers, and labels (N,), in random order."""
    rng = np.random.RandomState(seed)  # NumPy promises that its stream never changes
    labels = np.arange(len(TEMPLATES)).repeat(EXAMPLES_PER_CLASS)
    padding, scale, shift, around, on, slope = map(np.array, zip(*(_draws(rng) for _ in labels), strict=True))
    order = rng.permutation(len(labels))

    places = np.outer(POINTS + padding - 1, np.linspace(0, 1, SIZE))  # where the points lie on template and padding
    templates = np.pad(_templates(), [(0, 0), (0, LONGEST_PADDING)])[labels]
    signals = _interpolated(templates, places) * (1 + SCALE * (scale[:, None] - 0.5))
    shifted = (np.arange(SIZE) - shift[:, None]) % SIZE
    signals, places = np.take_along_axis(signals, shifted, 1), np.take_along_axis(places, shifted, 1)
    signals = np.where(places < POINTS, signals, _blurred(CORRELATED * around)) + INDEPENDENT * on
    signals -= SHEAR * (slope[:, None] - 0.5) * np.linspace(-0.5, 0.5, SIZE)
    signals = _interpolated(signals, np.linspace(0, SIZE - 1, LENGTH)[None].repeat(len(labels), 0))
    signals = (signals - signals.mean()) / signals.std()
    return signals[order], torch.from_numpy(labels[order])


def _draws(rng: np.random.RandomState) -> tuple[float | np.ndarray, ...]:
    """The random numbers of one example: padding, scale, shift, smooth noise, independent noise, slope."""
    padding = SHORTEST_PADDING + int(rng.rand() * (LONGEST_PADDING - SHORTEST_PADDING + 1))
    return padding, rng.rand(), rng.randint(SHIFTS), rng.randn(SIZE), rng.randn(SIZE), rng.rand()


def _templates() -> np.ndarray:
    """(10, 12): each with variance 1/36 and 0 at both ends."""
    heights = np.array(TEMPLATES)
    heights = heights / heights.std(1, keepdims=True) / 6
    return heights - heights[:, :1]


def _interpolated(signals: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Values (N, Q) of signals (N, P) at places (N, Q) between 0 and P - 1, on straight lines between their points."""
    left = np.minimum(places.astype(int), signals.shape[1] - 2)
    before, behind = np.take_along_axis(signals, left, 1), np.take_along_axis(signals, left + 1, 1)
    return before + (places - left) * (behind - before)


def _blurred(noise: np.ndarray) -> np.ndarray:
    """Noise (N, P) under a Gaussian window that ends at four standard deviations; mirrored at its ends."""
    distances = np.arange(-4 * BLUR, 4 * BLUR + 1)
    window = np.exp(-0.5 * (distances / BLUR) ** 2)
    mirrored = np.pad(noise, [(0, 0), (4 * BLUR, 4 * BLUR)], mode="symmetric")
    return np.lib.stride_tricks.sliding_window_view(mirrored, len(window), 1) @ (window / window.sum())

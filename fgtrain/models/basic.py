"""The networks of the forward-gradient literature: logistic regression, an MLP and a small CNN."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Flattened input, hidden layers of Linear and ReLU, linear output.

    Args:
        input_shape: shape of one input.
        num_classes: number of outputs.
        hidden: widths of the hidden layers; empty for logistic regression.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, hidden: Sequence[int] = (64,)) -> None:
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden must hold positive widths, got {list(hidden)}")
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))


class CNN(nn.Sequential):
    """The CNN of Baydin et al. 2022 (arXiv:2202.08587): four 3x3 convolutions, two poolings, a dense layer.

    Args:
        input_shape: (channels, height, width), height and width at least 4.
        num_classes: number of outputs.
        channels: output channels of every convolution.
        hidden: width of the dense layer.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, channels: int = 64, hidden: int = 1024) -> None:
        in_channels, height, width = input_shape
        if min(height, width) < 4:
            raise ValueError(f"CNN pools twice by 2 and needs images of at least 4 x 4, got {height} x {width}")
        super().__init__(
            _conv_relu(in_channels, channels),
            _conv_relu(channels, channels),
            nn.MaxPool2d(2),
            _conv_relu(channels, channels),
            _conv_relu(channels, channels),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(channels * (height // 4) * (width // 4), hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )


def _conv_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU(inplace=True))


class ImageAdapter(nn.Module):
    """Adapts images to a network that expects three channels and a minimum size.

    Args:
        network: a network that takes images (B, 3, H, W).
        size: height and width to which images are enlarged; None to keep their size.
    """

    def __init__(self, network: nn.Module, size: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = nn.functional.interpolate(images, (self.size, self.size), mode="bilinear")
        return self.network(images)

"""The networks of the forward-gradient literature: logistic regression, an MLP and a small CNN."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fgtrain.models.initialization import Init, initialize
from fgtrain.network.chains import Residual


class MLP(nn.Sequential):
    """Flattened input, hidden layers of Linear and ReLU, linear output.

    With `residual`, a hidden layer x -> relu(W x + b) whose input has its width becomes x -> x + W relu(x) + b. The
    chain is then a stem, one `Residual` per such layer, and a head. Without their skips, it is the network without
    `residual`.

    Args:
        input_shape: shape of one input.
        num_classes: number of outputs.
        hidden: widths of the hidden layers; empty for logistic regression.
        init: how the weights are drawn, see `initialize`.
        residual: give hidden layers identity skips.

    Raises:
        ValueError: a width below 1; `residual` without two equal neighbouring widths.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        hidden: Sequence[int] = (64,),
        *,
        init: Init = "torch",
        residual: bool = False,
    ) -> None:
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden must hold positive widths, got {list(hidden)}")
        if residual and not any(fan_in == fan_out for fan_in, fan_out in pairwise(hidden)):
            raise ValueError(f"residual needs neighbouring hidden layers of one width, got hidden={list(hidden)}")
        widths = [math.prod(input_shape), *hidden]
        if residual:
            super().__init__(
                nn.Sequential(nn.Flatten(), nn.Linear(widths[0], widths[1])),
                *(
                    _relu_then(nn.Linear(fan_in, fan_out), skip=fan_in == fan_out)
                    for fan_in, fan_out in pairwise(hidden)
                ),
                nn.Sequential(nn.ReLU(), nn.Linear(widths[-1], num_classes)),
            )
        else:
            layers: list[nn.Module] = [nn.Flatten()]
            for fan_in, fan_out in pairwise(widths):
                layers += [nn.Linear(fan_in, fan_out), nn.ReLU(inplace=True)]
            super().__init__(*layers, nn.Linear(widths[-1], num_classes))
        initialize(self, init)


class CNN(nn.Sequential):
    """The CNN of Baydin et al. 2022 (arXiv:2202.08587): four 3x3 convolutions, two poolings, a dense layer.

    On signals, the convolutions and poolings have one dimension. With `residual`, the convolutions after the first
    are blocks x -> x + W * relu(x) + b, as the layers of `MLP` are.

    Args:
        input_shape: (channels, height, width) or (channels, length); each but the channels at least 4.
        num_classes: number of outputs.
        channels: output channels of every convolution.
        hidden: width of the dense layer.
        init: how the weights are drawn, see `initialize`.
        residual: give convolutions identity skips.

    Raises:
        ValueError: inputs that are too small, or neither images nor signals; or a width below 1.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        channels: int = 64,
        hidden: int = 1024,
        *,
        init: Init = "torch",
        residual: bool = False,
    ) -> None:
        if channels < 1 or hidden < 1:
            raise ValueError(f"channels and hidden must be at least 1, got {channels} and {hidden}")
        in_channels, *size = input_shape
        if len(size) not in (1, 2):
            raise ValueError(f"CNN takes images (C, H, W) or signals (C, T), got inputs of shape {tuple(input_shape)}")
        if min(size) < 4:
            least, got = " x ".join("4" * len(size)), " x ".join(map(str, size))
            kind = "images" if len(size) == 2 else "signals"
            raise ValueError(f"CNN pools twice by 2 and needs {kind} of at least {least}, got {got}")
        conv, pool = (nn.Conv1d, nn.MaxPool1d) if len(size) == 1 else (nn.Conv2d, nn.MaxPool2d)

        def layer(fan_in: int) -> nn.Module:
            return conv(fan_in, channels, 3, padding=1)

        flat = channels * math.prod(n // 4 for n in size)
        if residual:
            super().__init__(
                layer(in_channels),
                _relu_then(layer(channels), skip=True),
                pool(2),
                _relu_then(layer(channels), skip=True),
                _relu_then(layer(channels), skip=True),
                nn.Sequential(
                    nn.ReLU(), pool(2), nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
                ),
            )
        else:
            super().__init__(
                nn.Sequential(layer(in_channels), nn.ReLU(inplace=True)),
                nn.Sequential(layer(channels), nn.ReLU(inplace=True)),
                pool(2),
                nn.Sequential(layer(channels), nn.ReLU(inplace=True)),
                nn.Sequential(layer(channels), nn.ReLU(inplace=True)),
                pool(2),
                nn.Flatten(),
                nn.Linear(flat, hidden),
                nn.ReLU(inplace=True),
                nn.Linear(hidden, num_classes),
            )
        initialize(self, init)


def _relu_then(layer: nn.Module, *, skip: bool) -> nn.Module:
    """ReLU and layer; the ReLU leaves its input as it is, which the skip takes too."""
    block = nn.Sequential(nn.ReLU(), layer)
    return Residual(block) if skip else block


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

"""How the weights of a network of ReLUs are drawn."""

import math
from typing import Literal

from torch import nn

from fgtrain.network.chains import Residual

Init = Literal["torch", "he"]
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def initialize(network: nn.Module, init: Init) -> None:
    """Draw the weights of the Linear layers and convolutions with PyTorch's global random numbers.

    "torch" leaves what PyTorch drew when it made the layers: uniform numbers of variance 1 / (3 n), where n is the
    number of inputs of a unit, as biases too. Each ReLU layer then divides the mean square of what it carries by 6,
    and gradients vanish in a network of eight layers.

    "he" draws normal numbers of variance 2 / n, which preserves the mean square through a layer and its ReLU, and of
    variance 1 / n in the last layer, which no ReLU follows. Biases are 0. The last layer of a `Residual` is 0: however
    deep the network is, it starts as its stem and head.

    Args:
        network: its layers are in the order in which it calls them.
        init: "torch" or "he".

    Raises:
        ValueError: `init` is neither.

    Source: He, Zhang, Ren, Sun 2015, arXiv:1502.01852.
    """
    if init not in ("torch", "he"):
        raise ValueError(f"init must be 'torch' or 'he', got {init!r}")
    if init == "torch":
        return
    layers = _layers(network)
    ends = {_layers(module)[-1] for module in network.modules() if isinstance(module, Residual)}
    for layer in layers:
        variance = (1 if layer is layers[-1] else 2) / layer.weight[0].numel()
        nn.init.normal_(layer.weight, std=0 if layer in ends else math.sqrt(variance))
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)


def _layers(network: nn.Module) -> list[nn.Linear | nn.Conv1d | nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, LAYERS)]

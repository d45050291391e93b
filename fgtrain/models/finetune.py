"""Training a part of a network: its head, its normalization layers, low-rank adapters, or parameters by name.

Frozen parameters get no tangent: they need no random numbers and add no variance. Before the first trained parameter,
the forward pass carries no derivatives.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain._torch import BatchOrInstanceNorm
from fgtrain.errors import ConfigError, DataError

NORMS = (BatchOrInstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class LoRA(nn.Module):
    """A frozen layer plus a trained map of low rank: x -> layer(x) + (alpha / rank) up(down(x)).

    `up` starts at zero, so the network is unchanged at the start. With m outputs and n inputs the layer trains
    (m + n) rank numbers instead of m n.

    Args:
        layer: a Linear or a Conv2d without groups.
        rank: rank of the added map.
        alpha: its scale; None for the rank, a factor of 1.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        where: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype, "bias": False}
        self.layer = layer.requires_grad_(False)
        self.down: nn.Module
        if isinstance(layer, nn.Conv2d):
            geometry: dict[str, Any] = {
                name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            }
            self.down = nn.Conv2d(layer.in_channels, rank, **geometry, **where)
            self.up: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, **where)
        else:
            self.down = nn.Linear(layer.in_features, rank, **where)
            self.up = nn.Linear(rank, layer.out_features, **where)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.scale = 1.0 if alpha is None else alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * self.up(self.down(x))


def add_lora(model: nn.Module, rank: int, alpha: float | None = None) -> nn.Module:
    """Freeze a model and wrap every Linear and Conv2d in it in a `LoRA`; returns the model.

    Grouped convolutions stay frozen, and so do layers whose weight other modules read (subclasses of Linear, such as
    the projection in nn.MultiheadAttention).
    """
    model.requires_grad_(False)
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear or (type(child) is nn.Conv2d and child.groups == 1)
    ]
    for parent, name, child in places:
        setattr(parent, name, LoRA(child, rank, alpha))
    return model


class FineTuned(nn.Module):
    """A pre-trained network, a part of which is trained.

    Frozen BatchNorm layers keep their statistics, even in training mode.

    Args:
        network: a function that makes the network; called with those of `input_shape` and `num_classes` that it takes.
        train: "all"; "head", the last Linear layer; "norms" or "lora", these and the head; or patterns of parameter
            names such as ["*layer4*", "*fc*"].
        weights: checkpoint of an earlier run of scripts/train.py, or a state_dict saved by torch.save; None keeps the
            weights of `network`.
        new_head: initialise a new head, for other classes than those of the weights.
        rank: rank of the adapters for train="lora".
        alpha: scale of the adapters, see `LoRA`.
        input_shape: shape of one input.
        num_classes: number of classes.

    Raises:
        ConfigError: nothing is left to train.
        DataError: the weights cannot be read or belong to another network.
    """

    def __init__(
        self,
        network: Callable[..., nn.Module],
        train: str | Sequence[str] = "all",
        weights: str | None = None,
        *,
        new_head: bool = True,
        rank: int = 4,
        alpha: float | None = None,
        input_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        known = {"input_shape": input_shape, "num_classes": num_classes}
        takes = inspect.signature(network).parameters
        self.network = network(**{name: value for name, value in known.items() if name in takes and value is not None})
        if weights is not None:
            _load(self.network, weights)
        head = self._head()
        if new_head and weights is not None:
            head.reset_parameters()
        self._choose(train, head, rank, alpha)
        if not any(p.requires_grad for p in self.parameters()):
            raise ConfigError(f"train={train!r} leaves no parameter of {type(self.network).__name__} to train")

    def forward(self, *inputs: Any) -> Any:
        return self.network(*inputs)

    def train(self, mode: bool = True) -> "FineTuned":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, NORMS) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def _head(self) -> nn.Linear:
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ConfigError(f"{type(self.network).__name__} has no Linear layer as its head; name parameters")
        return linear[-1]

    def _choose(self, train: str | Sequence[str], head: nn.Linear, rank: int, alpha: float | None) -> None:
        if train == "all":
            return
        if not isinstance(train, str):
            for name, p in self.named_parameters():
                p.requires_grad_(any(fnmatchcase(name, pattern) for pattern in train))
            return
        if train not in ("head", "norms", "lora"):
            raise ConfigError(f"train must be all, head, norms, lora or a list of patterns, got {train!r}")
        self.requires_grad_(False)
        if train == "lora":
            parent = next(m for m in self.modules() for child in m.children() if child is head)
            name = next(name for name, child in parent.named_children() if child is head)
            setattr(parent, name, nn.Identity())
            add_lora(self.network, rank, alpha)
            setattr(parent, name, head)
        if train == "norms":
            for module in self.modules():
                if isinstance(module, NORMS):
                    module.requires_grad_(True)
        head.requires_grad_(True)


def _load(network: nn.Module, path: str) -> None:
    if not Path(path).is_file():
        raise DataError(f"model.weights={path} is not a file; give the checkpoint of a run")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"model.weights={path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    named = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if not (isinstance(named, dict) and all(isinstance(name, str) for name in named)):
        raise DataError(f"model.weights={path} holds no named weights; give the checkpoint of a run")
    if "state_dict" in saved:  # from a Lightning module, maybe of a fine-tuned network
        saved = {name.removeprefix("model.").removeprefix("network."): v for name, v in saved["state_dict"].items()}
        if not saved.keys() & network.state_dict().keys():  # the network's names start with network.
            saved = {f"network.{name}": value for name, value in saved.items()}
    try:
        network.load_state_dict(saved)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"model.weights={path} is of another network than {type(network).__name__}: {reason}"
        ) from error

"""Blocks of a network and the small heads that give each of them a separate loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgtrain.errors import UnsupportedOperation
from fgtrain.estimators.base import GradientEstimator
from fgtrain.forward_ad.passes import RepeatedPass
from fgtrain.network.chains import in_turn, is_chain, links


class Part(NamedTuple):
    """A block, or one of its parallel modules, with its head.

    Args:
        modules: the modules, which run in turn.
        head: maps features of their output to an output of the model; None for the last block.
    """

    modules: list[nn.Module]
    head: nn.Module | None


class LocalHeads(GradientEstimator):
    """An estimator with a linear head after every block but the last; the heads learn by gradient descent.

    A block is a layer with parameters and the modules up to the next such layer. It has one or several parts
    (`parts_of`), each with a head. The heads are created at the first call, at zero, and are saved with the estimator's
    state.

    Args:
        head_lr: learning rate of the heads.
        head_size: spatial size, per dimension, to which images are averaged before a head.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, head_lr: float = 0.1, *, head_size: int = 2) -> None:
        super().__init__()
        if not head_lr > 0:
            raise ValueError(f"head_lr must be positive, got {head_lr!r}")
        if head_size < 1:
            raise ValueError(f"head_size must be at least 1, got {head_size!r}")
        self.head_lr = head_lr
        self.head_size = head_size
        self.heads = nn.ModuleDict()

    def blocks_with_heads(self, model: nn.Module, loss_fn: Callable[[Any], Tensor]) -> list[list[Part]]:
        """The parts of every block; creates missing heads, with a trial pass that has no side effects.

        Raises:
            UnsupportedOperation: the model is not a chain of modules with outputs (B, classes).
        """
        *blocks, last = blocks_of(model)
        parts = {str(i): self.parts_of(block) for i, block in enumerate(blocks)}
        keys = {i: [i] if len(found) == 1 else [f"{i}-{k}" for k in range(len(found))] for i, found in parts.items()}
        if self.heads.keys() != {key for of_block in keys.values() for key in of_block}:
            repeated = RepeatedPass(model)
            with torch.no_grad():
                self._create_heads(parts, keys, last, loss_fn)
            repeated.rewind()
        heads = dict(self.heads.items())
        with_heads = [
            [Part(modules, heads[key]) for modules, key in zip(parts[i], keys[i], strict=True)] for i in parts
        ]
        return [*with_heads, [Part(last, None)]]

    def parts_of(self, block: list[nn.Module]) -> list[list[nn.Module]]:
        """The parts of a block that each get a head."""
        return [block]

    def features(self, hidden: Tensor) -> Tensor:
        """The features (B, features) of a block's output (B, ...)."""
        if hidden.dim() == 4:
            height, width = (min(self.head_size, size) for size in hidden.shape[2:])
            hidden = F.adaptive_avg_pool2d(hidden, (height, width))
        return hidden.flatten(1)

    def _create_heads(
        self,
        parts: Mapping[str, list[list[nn.Module]]],
        keys: Mapping[str, list[str]],
        last: list[nn.Module],
        loss_fn: Callable[[Any], Tensor],
    ) -> None:
        stages = {key: Stage(parts[key]) for key in parts}
        end = Stage([last])
        loss_fn(Stages([*stages.values(), end]))
        (logits,) = end.outputs()
        if logits.dim() != 2:
            raise UnsupportedOperation(
                f"local losses need a model with outputs (B, classes), got {tuple(logits.shape)}; "
                "train with another method"
            )
        self.heads.clear()
        for of_block, stage in stages.items():
            for key, output in zip(keys[of_block], stage.outputs(), strict=True):
                self.add_head(key, self.features(output).shape[1], logits.shape[1], output)

    def add_head(self, key: str, num_features: int, num_outputs: int, like: Tensor) -> None:
        """Add a head with zero weights, named `key`."""
        head = nn.Linear(num_features, num_outputs, device="meta", dtype=like.dtype)  # avoids drawing random numbers
        self.heads[key] = head.to_empty(device=like.device)
        for p in head.parameters():
            nn.init.zeros_(p)

    @torch.no_grad()
    def descend(self, params: Iterable[Tensor], grads: Iterable[Tensor]) -> None:
        """Do the heads' step of gradient descent; gradients that are not finite are ignored."""
        for p, g in zip(params, grads, strict=True):
            p.sub_(torch.where(g.isfinite().all(), g, 0.0), alpha=self.head_lr)

    def make_room(self, state: Mapping[str, Tensor]) -> None:
        self.heads.clear()
        for name, weight in state.items():
            if name.startswith("heads.") and name.endswith(".weight"):
                key = name.removeprefix("heads.").removesuffix(".weight")
                self.add_head(key, weight.shape[1], weight.shape[0], weight)


def read_by(head: nn.Module, features: Tensor) -> Tensor:
    """The output of a linear head.

    Raises:
        UnsupportedOperation: the head was made for another number of features.
    """
    if features.shape[1] != head.in_features:
        raise UnsupportedOperation(
            f"the output of a block has {features.shape[1]} features per example, but its head was made for "
            f"{head.in_features}: use inputs of one size, and another estimator for each model"
        )
    return head(features)


def blocks_of(model: nn.Module) -> list[list[nn.Module]]:
    """Layers with parameters, each with the modules up to the next; modules before the first belong to it."""
    if not is_chain(model):
        raise UnsupportedOperation(
            f"local losses need an nn.Sequential, got {type(model).__name__}; make the model one or train with "
            "another method"
        )
    blocks = links(model)
    if len(blocks) > 1 and not any(True for module in blocks[0] for _ in module.parameters()):
        blocks[:2] = [blocks[0] + blocks[1]]
    return blocks


class StandIn(nn.Module):
    """Replaces the model in a loss function, which must call it as a whole."""

    def __getitem__(self, key: Any) -> Any:
        raise UnsupportedOperation(WHOLE)


class Stage(StandIn):
    """A stand-in that runs only one block and its head.

    Args:
        parts: the block's parallel parts, each of them modules that run in turn.
        hidden: the block's input; None for the first block, which takes the model's inputs.
        head: maps the block's output to an output of the model; None if it is one already.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[nn.Module]],
        hidden: Tensor | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._parts = (parts, hidden, head)
        self._outputs: list[Tensor] = []

    def forward(self, x: Any) -> Any:
        parts, hidden, head = self._parts
        self._outputs = [in_turn(modules, x if hidden is None else hidden) for modules in parts]
        x = joined(self._outputs)
        return x if head is None else head(x)

    def outputs(self) -> list[Tensor]:
        """The output of each part."""
        if not self._outputs:
            raise UnsupportedOperation(WHOLE)
        return [output.detach() for output in self._outputs]


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """The output of a block from the outputs of its parts."""
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), dim=1)


class Stages(StandIn):
    """A stand-in that runs the whole model block by block."""

    def __init__(self, stages: list[Stage]) -> None:
        super().__init__()
        self.stages = stages

    def forward(self, x: Any) -> Any:
        return in_turn(self.stages, x)


WHOLE = "local losses need a loss function that calls model(inputs), not parts of the model"

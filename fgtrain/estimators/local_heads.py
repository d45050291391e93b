"""Blocks of a network and the small heads that give each of them a separate loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgtrain._torch import is_inside_transform
from fgtrain.errors import UnsupportedOperation
from fgtrain.estimators.base import GradientEstimator
from fgtrain.forward_ad.native import value_of
from fgtrain.forward_ad.passes import LossFn
from fgtrain.network.blocks import INSIDE_TRANSFORM, forwards_replaced
from fgtrain.network.chains import in_turn, is_chain, links
from fgtrain.network.parameters import slots_of
from fgtrain.network.snapshot import Snapshot


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

    state_of_model = "the heads"

    def __init__(self, head_lr: float = 0.1, *, head_size: int = 2) -> None:
        super().__init__()
        if not head_lr > 0:
            raise ValueError(f"head_lr must be positive, got {head_lr!r}")
        if head_size < 1:
            raise ValueError(f"head_size must be at least 1, got {head_size!r}")
        self.head_lr = head_lr
        self.head_size = head_size
        self.heads = nn.ModuleDict()

    def _blocks_with_heads(self, model: nn.Module, loss_fn: LossFn) -> list[list[Part]]:
        """The parts of every block; creates missing heads, with a trial pass that has no side effects.

        Raises:
            UnsupportedOperation: the model is not a chain of modules with outputs (B, classes).
        """
        *blocks, last = blocks_of(model)
        parts = {str(i): self.parts_of(block) for i, block in enumerate(blocks)}
        keys = {i: [i] if len(found) == 1 else [f"{i}-{k}" for k in range(len(found))] for i, found in parts.items()}
        if self.heads.keys() != {key for of_block in keys.values() for key in of_block}:
            snapshot = Snapshot(model)
            with torch.no_grad():
                self._create_heads(parts, keys, last, model, loss_fn)
            snapshot.restore()
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

    def nets_of(self, model: nn.Module, loss_fn: LossFn) -> "list[list[LocalBlock]]":
        """Every part of every block as a model; the models are reused, since engines store data with a model."""
        blocks = self._blocks_with_heads(model, loss_fn)
        cache = slots_of(model).cached(self, list)
        if [[net.part for net in nets] for nets in cache] != blocks:
            cache[:] = [[LocalBlock(part, self.features) for part in parts] for parts in blocks]
        return cache

    def _create_heads(
        self,
        parts: Mapping[str, list[list[nn.Module]]],
        keys: Mapping[str, list[str]],
        last: list[nn.Module],
        model: nn.Module,
        loss_fn: LossFn,
    ) -> None:
        *outputs, (logits,) = _recorded([*parts.values(), [last]], model, loss_fn)
        if logits.dim() != 2:
            raise UnsupportedOperation(
                f"local losses need a model with outputs (B, classes), got {tuple(logits.shape)}; "
                "train with another method"
            )
        self.heads.clear()
        for of_block, found in zip(parts, outputs, strict=True):
            for key, output in zip(keys[of_block], found, strict=True):
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

    def extra_repr(self) -> str:
        return f"head_lr={self.head_lr}, head_size={self.head_size}"


def read_by(head: nn.Module, features: Tensor) -> Tensor:
    """The output of a linear head.

    Raises:
        UnsupportedOperation: the head was made for another number of features, another dtype or another device.
    """
    if features.shape[1] != head.in_features:
        raise UnsupportedOperation(
            f"the output of a block has {features.shape[1]} features per example, but its head was made for "
            f"{head.in_features}: use inputs of one size, and another estimator for each model"
        )
    now, then = (features.dtype, features.device), (head.weight.dtype, head.weight.device)
    if now != then and (now[1] != then[1] or not torch.is_autocast_enabled(now[1].type)):
        raise UnsupportedOperation(
            f"the output of a block is {now[0]} on {now[1]}, but its head is {then[0]} on {then[1]}: move the "
            "estimator as you have moved the model, by estimator.to(...)"
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


class LocalBlock(nn.Module):
    """A part of a block and its head as a separate model.

    Args:
        part: see `Part`.
        features: see `LocalHeads.features`.

    Attributes:
        hidden: the block's input; None for the first block, which takes the model's inputs.
    """

    def __init__(self, part: Part, features: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.part = part
        self.block = nn.ModuleList(part.modules)
        self.head = part.head
        self.features = features
        self.hidden: Tensor | None = None
        self._output: Tensor | None = None
        self._is_called = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_called:
            raise UnsupportedOperation(ONCE)
        self._is_called = True
        x = in_turn(self.block, only_input(args, kwargs) if self.hidden is None else self.hidden)
        self._output = value_of(x).detach()
        return x if self.head is None else read_by(self.head, self.features(x))

    def in_place_of(self, model: nn.Module, loss_fn: LossFn) -> LossFn:
        """The loss function of the model, whose call runs this part; its parameters are those of the model."""

        def local(_: object) -> Tensor:
            self._is_called = False
            with forwards_replaced({model: self.forward}):
                return loss_fn(model)

        return local

    def take_output(self) -> Tensor:
        """Return the block's output, and free all tensors of the pass."""
        if self._output is None:
            raise UnsupportedOperation(WHOLE)
        output, self._output, self.hidden = self._output, None, None
        return output


def only_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What an `nn.Sequential` is called with."""
    (x,) = (*args, *kwargs.values())
    return x


def _recorded(blocks: Sequence[Sequence[Sequence[nn.Module]]], model: nn.Module, loss_fn: LossFn) -> list[list[Tensor]]:
    """The outputs of every part of every block in one pass.

    Raises:
        UnsupportedOperation: the loss function does not call the model once, as a whole.
    """
    outputs: list[list[Tensor]] = []
    forwards = {module: module.forward for parts in blocks for modules in parts for module in modules}

    def run(*args: Any, **kwargs: Any) -> Any:
        if outputs:
            raise UnsupportedOperation(ONCE)
        x = only_input(args, kwargs)
        if isinstance(x, Tensor) and is_inside_transform(x):
            raise UnsupportedOperation(INSIDE_TRANSFORM)
        with forwards_replaced(forwards):
            for parts in blocks:
                outputs.append([in_turn(modules, x).detach() for modules in parts])
                x = joined(outputs[-1])
        return x

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UnsupportedOperation(WHOLE)

    with forwards_replaced({**dict.fromkeys(forwards, refuse), model: run}):
        loss_fn(model)
    if not outputs:
        raise UnsupportedOperation(WHOLE)
    return outputs


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """The output of a block from the outputs of its parts."""
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), dim=1)


ONCE = (
    "local losses need a loss function that calls the model once: a block gets the output of the block before it in "
    "that call; join the inputs with torch.cat, or train with another method"
)
WHOLE = "local losses need a loss function that calls model(inputs), not parts of the model"

"""Local losses through the network's own tail: the output of a block skips the later blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain._torch import eager_functions, tree_map_only
from fgtrain.errors import UnsupportedOperation
from fgtrain.estimators.base import GradientEstimator
from fgtrain.estimators.gradients import add_grad
from fgtrain.forward_ad.native import value_of
from fgtrain.forward_ad.passes import LossFn, plain_losses
from fgtrain.network.blocks import Forward, entering, find_blocks, forwards_replaced, frozen, keeps_shape
from fgtrain.network.parameters import slots_of, trainable_params
from fgtrain.network.snapshot import Snapshot


def local_gradients(
    estimator: GradientEstimator,
    model: nn.Module,
    loss_fn: LossFn,
    blocks: Sequence[str] | None,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of the model, and the gradient of every block's local loss.

    The local loss of block l is the loss of the model with the blocks before l replaced by their output, a constant,
    and the blocks after l by identities. Parameters that the model uses just before a block are trained with it.
    Parameters after the last block are trained with the last block.

    Args:
        estimator: estimates the local gradients.
        model: a model whose blocks keep the shape of the hidden state; it calls each block once.
        loss_fn: maps the model to its losses.
        blocks: names of the blocks; None to search for them.
        generator: source of the directions.

    Raises:
        UnsupportedOperation: the model has no such block, or calls one several times.
    """
    trainable_params(model)  # refuses a model without any
    grads: dict[str, Tensor] = {}
    snapshot = Snapshot(model)
    with eager_functions():
        chains: dict[Any, _Chain] = slots_of(model).cached(_examined, dict)
        key = None if blocks is None else tuple(blocks)
        chain = chains.get(key) or chains.setdefault(key, _examined(model, loss_fn, blocks))
        modules = dict(model.named_modules())
        ahead: Any = None
        for i, name in enumerate(chain.names):
            snapshot.restore()
            own = {p for n in [name, *chain.around[i]] for p in modules[n].parameters(recurse=n == name)}
            run = _OneBlock([modules[n] for n in chain.names], chain.outputs, i, ahead)
            with forwards_replaced(run.forwards):
                if any(p.requires_grad for p in own):
                    with frozen(p for p in model.parameters() if p not in own):
                        found = estimator(model, loss_fn, generator=generator).grads
                    for at, g in found.items():
                        if slots_of(model).params[at] in own:  # not one that the loss says is trained
                            add_grad(grads, at, g)  # tied: several local losses
                if not run.held or not estimator.loss_at_parameters:
                    run.held.clear()
                    snapshot.restore_random_state()
                    plain_losses(model, loss_fn)
            ahead = run.held[0]
    snapshot.restore()
    return plain_losses(model, loss_fn), grads


@dataclass
class _Chain:
    """The blocks of a model.

    Args:
        names: names of the blocks, in the order of their calls.
        outputs: number of values that each block returns; None for a single tensor.
        around: for every block, the names of other modules whose own parameters are trained with it.
    """

    names: list[str]
    outputs: list[int | None] = field(default_factory=list)
    around: list[list[str]] = field(default_factory=list)


def _examined(model: nn.Module, loss_fn: LossFn, blocks: Sequence[str] | None) -> _Chain:
    """The blocks, found in trials that leave no trace."""
    snapshot = Snapshot(model)
    with torch.no_grad():
        found = find_blocks(
            model, lambda: loss_fn(model), keeps_shape, blocks, "it changes the shape of what enters it"
        )
        snapshot.restore()
        chain, calls = _Chain(list(found)), list[str]()
        names = {module: name for name, module in model.named_modules()}
        inner = {module for block in found.values() for module in block.modules()}
        around: dict[str, set[int]] = {}

        def watched(block: nn.Module, forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                calls.append(names[block])
                out = forward(*args, **kwargs)
                chain.outputs.append(len(out) if isinstance(out, tuple) else None)
                return out

            return run

        def note(module: nn.Module, _: Any) -> None:
            if module in names:  # it may be a copy
                around.setdefault(names[module], set()).add(min(len(calls), len(found) - 1))

        holding = [m for m in names if m not in inner and any(True for _ in m.parameters(recurse=False))]
        hooks = [module.register_forward_pre_hook(note) for module in holding]
        try:
            with forwards_replaced({block: watched(block, block.forward) for block in found.values()}):
                loss_fn(model)
        finally:
            for hook in hooks:
                hook.remove()
            snapshot.restore()
    if not found:
        raise UnsupportedOperation(
            f"{type(model).__name__} has no block: no member of an nn.Sequential or nn.ModuleList returns what has the "
            "shape of its input; name the blocks, or train with another method"
        )
    if calls != chain.names:
        raise UnsupportedOperation("local losses need blocks that the model calls once each, one after the other")
    if any(n is not None and n > 1 for n in chain.outputs):
        skipped = {b: _OneBlock.identity(n) for b, n in zip(found.values(), chain.outputs, strict=True)}
        try:
            with forwards_replaced(skipped):
                loss_fn(model)
        except (TypeError, AttributeError) as error:
            raise UnsupportedOperation(
                "the model uses more of a block's output than its hidden state, but a skipped block has no more; train "
                "with another method"
            ) from error
        finally:
            snapshot.restore()
    # A module that holds parameters without being called (a list of them, say) counts as used first.
    uncalled = [names[module] for module in holding if names[module] not in around]
    chain.around = [[n for n, places in around.items() if i in places] for i in range(len(found))]
    chain.around[0] += uncalled
    return chain


class _OneBlock:
    """Forward methods with which a model runs only one of its blocks, and its tail on the output of that block.

    All outputs are copies, because modules between blocks may work in place.

    Args:
        blocks: the blocks of the model.
        outputs: see `_Chain`.
        i: index of the block that runs.
        ahead: output of the previous block; None for the first block.

    Attributes:
        forwards: {module: forward}.
        held: output of the block in the first pass, as the only item. A later pass, such as one that examines the
            losses at the first call, may draw another dropout mask.
    """

    def __init__(self, blocks: Sequence[nn.Module], outputs: Sequence[int | None], i: int, ahead: Any) -> None:
        self.held: list[Any] = []
        self.forwards = {b: self.identity(n) for b, n in zip(blocks, outputs, strict=True)}
        if i:
            self.forwards[blocks[i - 1]] = lambda *_, **__: tree_map_only(Tensor, Tensor.clone, ahead)
        self.forwards[blocks[i]] = self._holding(blocks[i].forward)

    @staticmethod
    def identity(num_outputs: int | None) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            x = entering(args, kwargs).clone()
            return x if num_outputs is None else (x, *[None] * (num_outputs - 1))

        return run

    def _holding(self, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            if not self.held:
                self.held.append(tree_map_only(Tensor, lambda x: value_of(x).detach().clone(), out))
            return out

        return run

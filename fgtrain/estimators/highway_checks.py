"""What Highway finds out about a model at its first call: by which paths the loss depends on the residual blocks.

The passes here run a model whose blocks are identities plus constants. If a loss becomes nan when a tensor is replaced
by nan, it depends on that tensor.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain._torch import tree_leaves, tree_map_only
from fgtrain.errors import UnsupportedOperation
from fgtrain.forward_ad.passes import LossFn, plain_losses
from fgtrain.network.blocks import Forward, with_hidden
from fgtrain.network.parameters import slots_of
from fgtrain.network.residual_blocks import ResidualBlocks
from fgtrain.network.snapshot import Snapshot

OTHER_PARAMS = (
    "the blocks run with other tensors in place of their parameters, as by torch.func.functional_call; call the model "
    "with its own parameters, or train with Backprop"
)


def is_chain_of_blocks(blocks: ResidualBlocks, model: nn.Module, loss_fn: LossFn, losses: Tensor) -> bool:
    """Whether the losses depend on the hidden state between two blocks of a segment through the second block only."""
    with blocks.as_skips(between_blocks=_nan):
        try:
            return _are(losses, model, blocks.from_first(loss_fn))
        except UnsupportedOperation:  # which blocks run depends on the hidden state
            return False


def refuse_other_paths(
    blocks: ResidualBlocks, model: nn.Module, loss_fn: LossFn, losses: Tensor, *, weights_learn: bool
) -> None:
    """Refuse a loss that depends on a block by a path that Highway leaves out.

    Args:
        blocks: the recorded residual blocks of the model.
        model: the model.
        loss_fn: maps the model to its losses.
        losses: the losses of the recorded pass.
        weights_learn: whether the weights of blocks learn from their uses outside the blocks.

    Raises:
        UnsupportedOperation: the losses use another output of a block that depends on its parameters; or they use
            weights of blocks directly, and `weights_learn` is false.
    """
    run = blocks.from_first(loss_fn)
    others_nan = tree_map_only(Tensor, _nan, [segment.outputs for segment in blocks.segments])
    with blocks.as_skips(other_outputs=others_nan):
        uses_others = not _are(losses, model, run)
    if uses_others and _others_are_learnt(blocks, model, loss_fn):
        raise UnsupportedOperation(
            "the loss uses another output of a residual block than its hidden state, such as an auxiliary loss, and "
            "the block would not learn from it; leave it out, or train with another method"
        )
    inside = {id(p) for p in blocks.params}
    weights_nan = {name: _nan(p) for name, p in slots_of(model).params.items() if id(p) in inside}
    with blocks.as_skips():
        if not weights_learn and not _are(losses, model, run, weights_nan):
            raise UnsupportedOperation(
                "the loss uses weights of residual blocks, as a penalty does, and they would not learn from it without "
                "a backward pass; use the optimizer's weight_decay, or Highway(Backprop())"
            )


def _others_are_learnt(blocks: ResidualBlocks, model: nn.Module, loss_fn: LossFn) -> bool:
    """Whether another output of a block than its hidden state depends on its parameters."""
    found = []

    def looked_at(forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.enable_grad():
                out = forward(*args, **kwargs)
            others = tree_leaves(with_hidden(out, torch.empty(0)))
            found.extend(x for x in others if isinstance(x, Tensor) and x.requires_grad)
            return tree_map_only(Tensor, Tensor.detach, out)

        return run

    snapshot = Snapshot(model)
    with torch.no_grad(), blocks.replaced_by(looked_at):
        loss_fn(model)
    snapshot.restore()
    return bool(found)


def _nan(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan) if x.is_floating_point() or x.is_complex() else x


def _are(losses: Tensor, model: nn.Module, loss_fn: LossFn, values: Mapping[str, Tensor] | None = None) -> bool:
    """Whether losses with `values` in place of some parameters are nan where `losses` are; the pass is undone."""
    snapshot = Snapshot(model)
    try:
        return torch.equal(plain_losses(model, loss_fn, values).isnan(), losses.isnan())
    finally:
        snapshot.restore()

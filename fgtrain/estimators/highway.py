"""The gradient after the last residual block, sent back along the skips to every block."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain._torch import eager_functions
from fgtrain.errors import UnsupportedOperation
from fgtrain.estimators.backprop import Backprop, refuse_backward_inside, stored_grads
from fgtrain.estimators.base import Estimate, GradientEstimator, Reduce, require_positive_int
from fgtrain.estimators.exact_head import gradient_of_last_layer
from fgtrain.estimators.gradients import add_grad, average_grads
from fgtrain.estimators.highway_backprop import by_backprop, learning_by_backprop
from fgtrain.estimators.highway_checks import OTHER_PARAMS, is_chain_of_blocks, refuse_other_paths
from fgtrain.estimators.highway_forward import (
    delta_by_forward_mode,
    estimated,
    gradients_before,
    learning_by_estimator,
)
from fgtrain.forward_ad.passes import LossFn, plain_losses
from fgtrain.network.blocks import cut_between_blocks, find_blocks, frozen, has_identity_skip, list_of_names
from fgtrain.network.parameters import slots_of, trainable_params
from fgtrain.network.residual_blocks import ResidualBlocks
from fgtrain.network.snapshot import Snapshot

_NO_SKIP = "it does not return its input where its parameters are 0"


class Highway(GradientEstimator):
    """The gradient after the last residual block, which the skips carry back unchanged to every block.

    Formula: block l computes h_l+1 = h_l + f_l(h_l). In backpropagation the gradient df / dh_l+1 is a sum over all
    paths from block l to the loss. Here only the path along the skips counts. Its Jacobian is the identity, so all
    consecutive blocks share delta, the gradient after the last of them:

        g_l = estimate of d/d(parameters of block l) of sum delta . block_l(h_l),

    by backpropagation within the block, or by any estimator without a backward pass. The rest of the model (stem,
    blocks that change the shape, head) is differentiated exactly, with residual blocks as identities plus constants.

    With iterations=k, the paths through up to k branches count too. One iteration is enough for the accuracy of
    backpropagation in most networks. After block l,

        d_l^k = delta + sum over later blocks m of J_m^T d_m^(k - 1),    d_l^0 = delta,

    replaces delta, where J_m is the Jacobian of branch m. With as many iterations as calls of blocks, it is exact.

    Without a backward pass: if `estimator` takes none, the method takes none. Forward mode gives delta exactly, with
    one direction for every number of an example's hidden state, or of a token's if what follows treats tokens alike.
    Where only element-wise functions lead from the output z of a layer to the hidden state h (a sum, a dropout mask, an
    activation function), dh / dz has a diagonal D, the derivative of h along a direction of ones. The layer's gradient
    is then that for the output gradient D delta, in closed form. This holds for the last layer of a branch and for the
    embeddings or the layer before the first block. The last layer of the model has its exact gradient, as with
    exact_head of `ActivityPerturbation`. `estimator` gives the gradients of every other layer of a block, one layer at
    a time, so that the noise on one layer does not disturb another. A layer that treats tokens one by one gets a loss
    for every token, delta . h of that token; any other layer, such as one before attention, gets one for every example.

    Bias: biased, because the gradient that passes back through more than k residual branches is left out. Only the last
    k + 1 blocks and what follows them have the exact gradient. The bias and the variance of `estimator` come on top,
    except for layers with a closed form. For `ActivityPerturbation`, N is the number of units of one layer, times the
    tokens of an example unless tokens have their own losses.

    Cost: with backpropagation about three forward passes (one for the values, two for the gradients of the blocks), and
    about 2 + i more for iteration i. Without a backward pass, that of delta, and for every block one pass for each
    layer that is estimated. At any depth, memory holds the activations of one block and of the rest of the model. Ranks
    exchange the whole gradient.

    The first call finds the residual blocks: with its parameters at zero, a residual block returns its input. If the
    loss uses the output of a block other than through the next block, as that of an early exit does, memory also holds
    the hidden state after every block.

    Args:
        estimator: estimates the gradients of the blocks, and those of the rest that have no closed form, without a
            backward pass. `Backprop` or None for backpropagation.
        blocks: names of the residual blocks; None to search every `nn.Sequential` and `nn.ModuleList`.
        chunk_size: number of directions in one pass, if forward mode computes delta; None for all.
        iterations: k >= 0, without a backward pass 0. None for 1 with backpropagation, else 0.

    Raises:
        ValueError: an argument is out of its range.
        UnsupportedOperation: the model has no residual block; or a block takes more from trained layers than its hidden
            state; or forward mode computes delta, and examples are mixed after a block.
        LossError: forward mode computes delta, and losses are not per example (B,).

    Source: Fagnou, Caillon, Delattre, Allauzen 2025, arXiv:2501.17086. The closed forms and the losses of tokens are
    fgtrain's own, tested in tests/test_highway_forward.py.

    Without iterations, the last block and the head have the gradient of backpropagation; the stem lacks the path
    through the branch:

    >>> from fgtrain.models import Residual
    >>> model = nn.Sequential(nn.Linear(3, 4), Residual(nn.Linear(4, 4)), nn.Linear(4, 1))
    >>> loss = lambda net: net(torch.ones(2, 3)).square().mean()
    >>> estimate, exact = Highway(iterations=0)(model, loss), Backprop()(model, loss)
    >>> {name: torch.allclose(g, exact.grads[name]) for name, g in estimate.grads.items() if "weight" in name}
    {'0.weight': False, '1.block.weight': True, '2.weight': True}
    """

    scalar_reducible = False
    gives_derivatives = False

    def __init__(
        self,
        estimator: GradientEstimator | None = None,
        blocks: Sequence[str] | None = None,
        *,
        chunk_size: int | None = 256,
        iterations: int | None = None,
    ) -> None:
        super().__init__()
        if chunk_size is not None:
            require_positive_int("chunk_size", chunk_size)
        if iterations:
            require_positive_int("iterations", iterations)
        self.estimator = estimator or Backprop()
        name = type(self.estimator).__name__
        if self.estimator.backpropagates and "exact" not in self.estimator.claims:
            raise ValueError(f"{name} cannot train residual blocks: use Backprop, or a method without a backward pass")
        if iterations and not self.estimator.backpropagates:
            raise ValueError(
                f"iterations={iterations} takes the gradient back through the branches, and {name} does not "
                "backpropagate: use Backprop in the blocks, or iterations=0"
            )
        self.iterations = int(self.estimator.backpropagates) if iterations is None else iterations
        self.blocks = list_of_names(blocks)
        self.chunk_size = chunk_size
        self.backpropagates = self.estimator.backpropagates
        self.backward_pass = "none" if self.estimator.backward_pass == "none" else "within a block"

    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        # A recorded pass finds the residual blocks that run one after the other, and what their branches add. Passes
        # with these as constants give the gradient after the blocks (delta) and the gradients outside them, by
        # backpropagation or by forward mode. In a last pass, every block gets its own gradients from delta as it runs.
        trainable_params(model)  # refuses a model without any
        params = slots_of(model).params
        stored = stored_grads(params)
        snapshot = Snapshot(model)
        with eager_functions(), cut_between_blocks():  # compiled code would ignore replaced forwards
            blocks, losses = self._recorded(model, loss_fn, snapshot)
            loss_fn = blocks.from_first(loss_fn)
            snapshot.restore()
            if self.backpropagates:
                grads, branches = by_backprop(model, loss_fn, blocks, self.iterations, snapshot)
                learning = learning_by_backprop(blocks, branches)
            else:
                deltas = list[Tensor | None]()
                for segment in range(len(blocks.segments)):
                    deltas.append(delta_by_forward_mode(model, loss_fn, blocks, segment, self.chunk_size))
                    snapshot.restore()
                grads = gradients_before(model, loss_fn, blocks, deltas)
                snapshot.restore()
                grads |= self._grads_of_rest(model, loss_fn, blocks, grads, generator)
                learning = learning_by_estimator(blocks, deltas, self.estimator, generator)
            snapshot.restore()
            names = {id(p): name for name, p in params.items()}
            with learning as found, torch.enable_grad():
                loss_fn(model)
            for p, g in found:
                if id(p) not in names:
                    raise UnsupportedOperation(OTHER_PARAMS)
                add_grad(grads, names[id(p)], g)
        refuse_backward_inside(params, stored)
        grads = {name: grads[name] for name in params if name in grads}
        return Estimate(losses.mean(), average_grads(grads, slots_of(model).trainable(), reduce))

    def _recorded(self, model: nn.Module, loss_fn: LossFn, snapshot: Snapshot) -> tuple[ResidualBlocks, Tensor]:
        """The residual blocks of the model, with a recorded pass, and the losses of this pass.

        The first call finds out whether something else than the next block uses the output of a block. If so, every
        block is a segment of its own.
        """
        modules = self._blocks_of(model, loss_fn)
        separate: dict[tuple[Any, ...], bool] = slots_of(model).cached(ResidualBlocks, dict)
        key = self.backpropagates, *modules
        blocks = ResidualBlocks(model, modules, separate.get(key, False))
        with blocks.recording():
            losses = plain_losses(model, loss_fn)
        if key in separate:
            return blocks, losses
        snapshot.restore()
        refuse_other_paths(blocks, model, loss_fn, losses, weights_learn=self.backpropagates)
        separate[key] = not is_chain_of_blocks(blocks, model, loss_fn, losses)
        return self._recorded(model, loss_fn, snapshot) if separate[key] else (blocks, losses)

    def _blocks_of(self, model: nn.Module, loss_fn: LossFn) -> list[nn.Module]:
        """The residual blocks, found at the first call by a pass whose effects are undone."""
        cache: list[str] = slots_of(model).cached(self, list)
        if not cache:
            snapshot = Snapshot(model)
            with torch.no_grad():
                cache[:] = find_blocks(model, lambda: loss_fn(model), has_identity_skip, self.blocks, _NO_SKIP)
            snapshot.restore()
        if not cache:
            raise UnsupportedOperation(
                f"{type(model).__name__} has no residual block: no member of an nn.Sequential or nn.ModuleList returns "
                "its input where its parameters are 0; name the blocks, or train with another method"
            )
        modules = dict(model.named_modules())
        return [modules[name] for name in cache]

    def _grads_of_rest(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        blocks: ResidualBlocks,
        known: Iterable[str],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The gradients of the parameters outside blocks, except the known ones: exact for the last layer."""
        params = slots_of(model).params
        with frozen([*blocks.params, *(params[name] for name in known)]), blocks.as_skips():
            snapshot = Snapshot(model)
            grads = gradient_of_last_layer(model, loss_fn)
            with frozen([params[name] for name in grads]):
                if slots_of(model).trainable():
                    snapshot.restore()
                    grads |= estimated(self.estimator, model, loss_fn, generator)
        return grads

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, chunk_size={self.chunk_size}, iterations={self.iterations}"

"""A separate loss for every block, with any estimator for its gradient."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fgtrain._torch import eager_functions
from fgtrain.estimators.activity import ActivityPerturbation
from fgtrain.estimators.base import Estimate, GradientEstimator, Reduce
from fgtrain.estimators.gradients import add_grad, average_grads
from fgtrain.estimators.local_heads import LocalHeads, joined
from fgtrain.estimators.local_tail import local_gradients
from fgtrain.forward_ad.passes import LossFn, check_losses, plain_losses
from fgtrain.network.blocks import cut_between_blocks, list_of_names
from fgtrain.network.chains import SideBySide
from fgtrain.network.parameters import slots_of, trainable_params
from fgtrain.network.snapshot import Snapshot


class LocalLosses(LocalHeads):
    """A separate loss for every block; no derivative crosses from one block to the next.

    Formula, for head="linear": block l is a layer with parameters and the modules up to the next such layer. Its input
    is the output h_{l-1} of the previous block, as a constant. Its output h_l feeds a linear head A_l. With the local
    loss F_l = (1/B) sum_i loss(A_l h_l,i),

        g_l = estimate of dF_l / d(parameters of block l),

    by any estimator, by default activity perturbation. The last block needs no head: its loss is the model's. The heads
    learn from the same losses by gradient descent. What the loss adds for weights, such as a penalty, counts in the
    block that owns them. If a block is one `SideBySide`, each of its modules has a head and a
    loss (the groupwise losses of Ren et al.), so the noise on one group's units affects only its own loss.

    With head="tail", the local loss of a block is the loss of the model in which the later blocks are identities. There
    are no heads to learn, and the blocks keep the shape of the hidden state (`fgtrain.estimators.local_tail`).

    Bias: local gradients differ from those of the model's loss, except in the last block. Bias and variance with
    respect to the local gradients are those of `estimator`. The variance is smaller than for the whole model, because
    the noise is on one block's units at a time.

    Cost: that of `estimator` for each block with its head, one after the other. Only one block's activations are kept
    at a time. Ranks exchange the whole gradient.

    State: the heads are created at the first call, at zero, and are saved with the estimator's state.

    Args:
        estimator: estimates the local gradients; None for activity perturbation with an exact head and shrinkage.
        head_lr: learning rate of linear heads.
        head_size: spatial size, per dimension, to which images are averaged before a linear head.
        head: "linear" or "tail".
        blocks: names of the blocks for head="tail"; None to search every `nn.Sequential` and `nn.ModuleList`.

    Raises:
        ValueError: an argument is out of its range.
        UnsupportedOperation: with linear heads, the model is not an `nn.Sequential` (nested ones are read as one), or
            loss_fn does not call it as model(inputs). With the tail, it has no block that keeps the shape of its input.

    Source: Ren, Kornblith, Liao, Hinton 2023, arXiv:2210.03310, section 4.

    With exact local gradients, the last block has the model's gradient. The first has none yet, since its head is zero:

    >>> from fgtrain.estimators.backprop import Backprop
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> inputs, targets = torch.randn(8, 3), torch.randn(8, 2)
    >>> losses = lambda net: (net(inputs) - targets).square().sum(1)
    >>> local, exact = LocalLosses(Backprop())(model, losses).grads, Backprop()(model, losses).grads
    >>> torch.allclose(local["2.weight"], exact["2.weight"]), bool(local["0.weight"].any())
    (True, False)
    """

    scalar_reducible = False

    def __init__(
        self,
        estimator: GradientEstimator | None = None,
        head_lr: float = 0.1,
        *,
        head_size: int = 2,
        head: Literal["linear", "tail"] = "linear",
        blocks: Sequence[str] | None = None,
    ) -> None:
        super().__init__(head_lr, head_size=head_size)
        if head not in ("linear", "tail"):
            raise ValueError(f"head must be linear or tail, got {head!r}")
        if blocks is not None and head != "tail":
            raise ValueError("blocks are named for head='tail'; linear heads follow the layers of an nn.Sequential")
        self.head = head
        self.state_of_model = LocalHeads.state_of_model if head == "linear" else ""
        self.blocks = list_of_names(blocks)
        self.estimator = estimator or ActivityPerturbation(exact_head=True, shrinkage=True)
        if head == "linear" and self.estimator.state_of_model:
            raise ValueError(
                f"{type(self.estimator).__name__} keeps {self.estimator.state_of_model} of one model and cannot serve "
                "several blocks with linear heads; use another estimator, or head='tail'"
            )
        self.backpropagates = self.estimator.backpropagates
        self.backward_pass = "none" if self.estimator.backward_pass == "none" else "within a block"
        self.gives_derivatives = head == "linear" and self.estimator.gives_derivatives
        self.loss_at_parameters = self.estimator.loss_at_parameters

    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        with eager_functions(), cut_between_blocks():  # compiled code would ignore replaced forwards
            return self._estimate(model, loss_fn, generator, reduce)

    def _estimate(
        self, model: nn.Module, loss_fn: LossFn, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        if self.head == "tail":
            losses, found = local_gradients(self.estimator, model, loss_fn, self.blocks, generator)
            return Estimate(losses.mean(), average_grads(found, trainable_params(model), reduce))
        trainable_params(model)  # refuses a model without any
        names = {id(p): name for name, p in slots_of(model).params.items()}
        grads: dict[str, Tensor] = {}
        estimate, hidden = None, None
        for nets in self.nets_of(model, loss_fn):
            outputs = []
            for net in nets:
                net.hidden = hidden
                estimate = self._estimate_of(net, net.in_place_of(model, loss_fn), generator)
                outputs.append(net.take_output())
                params, of_head = slots_of(net).trainable(), {}
                for name, g in average_grads(estimate.grads, params, reduce).items():
                    own = names.get(id(params[name]))
                    if own is None:
                        of_head[name] = g
                    else:  # two blocks may share a weight
                        add_grad(grads, own, g)
                self.descend([params[name] for name in of_head], of_head.values())
            hidden = joined(outputs)
        assert estimate is not None
        return estimate._replace(grads=grads)

    def _estimate_of(self, net: nn.Module, loss_fn: LossFn, generator: torch.Generator) -> Estimate:
        if any(p.requires_grad for p in net.parameters()):
            before = None if self.estimator.loss_at_parameters else Snapshot(net)
            estimate = self.estimator(net, loss_fn, generator=generator)
            if before is not None:  # the output is that of perturbed parameters
                before.restore()
                plain_losses(net, loss_fn)
            return estimate
        with torch.no_grad():  # a frozen last block only gives the loss
            return Estimate(check_losses(loss_fn(net)).mean(), {})

    def parts_of(self, block: list[nn.Module]) -> list[list[nn.Module]]:
        only = block[0] if len(block) == 1 else None
        return [[module] for module in only] if isinstance(only, SideBySide) else [block]

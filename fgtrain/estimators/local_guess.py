"""Gradients of small local losses as directions, with exact directional derivatives as coefficients."""

import torch
from torch import Tensor, nn

from fgtrain._torch import eager_functions
from fgtrain.estimators.base import Claim, Estimate, Reduce
from fgtrain.estimators.gradients import average_grads, of_mean_loss
from fgtrain.estimators.local_heads import LocalBlock, LocalHeads
from fgtrain.forward_ad import jvp
from fgtrain.forward_ad.passes import LossFn, check_losses
from fgtrain.network.blocks import cut_between_blocks
from fgtrain.network.parameters import slots_of, trainable_params
from fgtrain.network.snapshot import Snapshot
from fgtrain.tangents.directions import LastTangent


class LocalGuess(LocalHeads):
    """The gradient, projected block by block on the gradient of a local loss (Fournier et al.).

    Formula: block l of the network (a layer with parameters and the modules up to the next such layer) feeds a linear
    head. The loss of the head's output has the gradient v_l in the block's parameters. Then g_l = d_l v_l / ||v_l||^2
    with the exact d_l = grad f . v_l. One forward pass with L directions gives all d_l. The last block needs no head:
    its v_L is the gradient itself. The heads learn from the same local losses by gradient descent.

    Bias: biased, since g is the projection of the gradient on span(v_1 .. v_L). It is always a descent direction:
    grad f . g = ||g||^2.

    Relative squared error: 1 - ||g||^2 / ||grad f||^2. It depends on the guesses and has no closed form.

    Cost: a forward and a backward pass of every block and its head, with one block's activations in memory, and one
    forward pass that has l directions in block l. It uses backpropagation, but only within a block. Ranks average
    guesses, head gradients and the L derivatives, so that R processes are equivalent to one on the whole batch.

    State: the heads are created at the first call, at zero, and are saved with the estimator's state.

    Args:
        head_lr: learning rate of the heads.
        head_size: spatial size, per dimension, to which images are averaged before a head.

    Raises:
        ValueError: an argument is out of its range.
        UnsupportedOperation: the model is not an `nn.Sequential` (nested ones are read as one), or loss_fn does not
            call it as model(inputs).

    Source: Fournier, Rivaud, Belilovsky, Eickenberg, Oyallon 2023, arXiv:2306.06968.

    With one block, the estimate is the gradient itself:

    >>> model, x = nn.Sequential(nn.Linear(3, 1)), torch.ones(2, 3)
    >>> estimate = LocalGuess()(model, lambda m: m(x).square().mean())
    >>> value = model(x).mean()
    >>> torch.allclose(estimate.grads["0.bias"], 2 * value)
    True
    """

    scalar_reducible = False
    backward_pass = "within a block"
    claims: frozenset[Claim] = frozenset({"descent"})

    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        trainable_params(model)  # refuses a model without any
        names = {id(p): name for name, p in slots_of(model).params.items()}
        snapshot = Snapshot(model)
        with eager_functions(), torch.enable_grad(), cut_between_blocks():
            nets = [net for (net,) in self.nets_of(model, loss_fn)]
            guesses = self._guesses(nets, model, loss_fn, reduce)
        snapshot.restore()
        with torch.no_grad():
            tangents = {
                names[id(p)]: LastTangent(v, num) for num, guess in enumerate(guesses, start=1) for p, v in guess
            }
            losses, derivatives = jvp(model, loss_fn, tangents)
            derivatives = of_mean_loss(losses, derivatives, reduce)
            grads = {}
            for guess, d in zip(guesses, derivatives, strict=True):
                square = torch.stack([v.square().sum() for _, v in guess]).sum()
                factor = torch.where(square > 0, d / square, 0.0)  # no guess from a head that is still zero
                grads |= {names[id(p)]: factor * v for p, v in guess}
        return Estimate(losses.mean(), grads, derivatives)

    def _guesses(
        self, nets: list[LocalBlock], model: nn.Module, loss_fn: LossFn, reduce: Reduce | None
    ) -> list[list[tuple[nn.Parameter, Tensor]]]:
        """(parameter, direction) for every trainable parameter, block by block; also does the heads' step."""
        found, hidden, seen = [], None, set()
        for net in nets:
            net.hidden = hidden
            loss = check_losses(net.in_place_of(model, loss_fn)(net)).mean()
            hidden = net.take_output()
            wanted = {name: p for name, p in net.named_parameters() if p.requires_grad and id(p) not in seen}
            if not wanted:  # a frozen last block
                continue
            slopes = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            # Those of an embedding may be sparse.
            grads = {name: g.to_dense() for name, g in zip(wanted, slopes, strict=True) if g is not None}
            grads = average_grads(grads, wanted, reduce)
            of_head = [name for name in grads if name.startswith("head.")]
            self.descend([wanted[name] for name in of_head], [grads.pop(name) for name in of_head])
            seen |= {id(wanted[name]) for name in grads}
            if grads:
                found.append([(wanted[name], g) for name, g in grads.items()])
        return found

"""Highway without a backward pass.

Forward mode gives the gradient delta after the residual blocks. From delta follow the gradients of the layers that have
a closed form, in the blocks and before them. An estimator gives the others, one layer at a time.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain._torch import tree_map_only
from fgtrain.errors import LossError, NoTangent, UnsupportedOperation
from fgtrain.estimators.base import GradientEstimator
from fgtrain.estimators.highway_backprop import Branches
from fgtrain.estimators.highway_checks import OTHER_PARAMS
from fgtrain.forward_ad import jvp
from fgtrain.forward_ad.native import value_of
from fgtrain.forward_ad.passes import LossFn
from fgtrain.forward_ad.row_losses import Evaluated, WithRows, marks, reached
from fgtrain.layer_noise.closed_forms import closed_forms
from fgtrain.layer_noise.layers import candidates
from fgtrain.network.blocks import Forward, forwards_replaced, frozen, hidden_of
from fgtrain.network.parameters import slots_of
from fgtrain.network.residual_blocks import ResidualBlocks
from fgtrain.network.snapshot import Snapshot


@contextmanager
def learning_by_estimator(
    blocks: ResidualBlocks, deltas: list[Tensor | None], estimator: GradientEstimator, generator: torch.Generator
) -> Generator[list[tuple[nn.Parameter, Tensor]]]:
    """A context in which a call of a block appends estimates of its parameters' gradients to the yielded list.

    Args:
        blocks: the residual blocks of the model.
        deltas: the gradient after every segment; None for one that the loss does not depend on.
        estimator: estimates the gradients; takes no backward pass.
        generator: source of the directions.
    """
    found: list[tuple[nn.Parameter, Tensor]] = []
    after_next = Branches([deltas]).after_blocks(blocks)

    def learn(block: nn.Module, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not all(p.is_leaf for p in block.parameters()):
                raise UnsupportedOperation(OTHER_PARAMS)
            args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            delta = after_next(None)[1]
            grads, out = _gradients_and_output(estimator, block, partial(forward, *args, **kwargs), delta, generator)
            params = slots_of(block).params
            found.extend((params[name], g) for name, g in grads.items())
            return out

        return run

    with forwards_replaced({block: learn(block, forward) for block, forward in blocks.forwards.items()}):
        yield found


def _gradients_and_output(
    estimator: GradientEstimator,
    block: nn.Module,
    run: Callable[[], Any],
    delta: Tensor | None,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], Any]:
    """The gradients of sum delta . output in the parameters of a block, and its output; `run` runs the block.

    There are no gradients if the loss does not depend on the block (delta is None), if the block is frozen, or if it
    left its branch out in this pass, as LayerDrop does.
    """
    if delta is None or not any(p.requires_grad for p in block.parameters()):
        with torch.no_grad():
            return {}, run()
    held: list[Any] = []

    def output(_: object) -> Tensor:
        out = run()
        held[:] = [tree_map_only(Tensor, lambda x: value_of(x).detach(), out)]
        return hidden_of(out)

    before = None if estimator.loss_at_parameters else Snapshot(block)
    grads = gradients_within(estimator, block, output, delta, generator)
    if before is None:
        return grads, held[0]
    before.restore()  # the output so far is that of perturbed parameters
    with torch.no_grad():
        return grads, run()


def gradients_within(
    estimator: GradientEstimator,
    block: nn.Module,
    output: Callable[[Any], Tensor],
    delta: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The gradients of sum delta . output(block) in the parameters of a block.

    They are exact for layers with a closed form. The estimator gets every other layer alone, so that the noise on one
    layer does not disturb the others, and then the parameters of no layer. The losses of a layer that treats rows one
    by one, such as the tokens of an MLP, are those of the rows; the others are those of the examples.

    Args:
        estimator: estimates the gradients that have no closed form.
        block: any module.
        output: maps the block to its output.
        delta: the gradient of the output, in its shape.
        generator: source of the directions.
    """
    snapshot = Snapshot(block)
    grads, dependence = closed_forms(block, lambda module: output(module).flatten(), delta)

    def estimate(names: Collection[str], losses: Callable[[Tensor], Tensor], estimator: GradientEstimator) -> None:
        if names:
            snapshot.restore()
            others = (p for name, p in slots_of(block).params.items() if name not in names)
            with frozen(others), suppress(NoTangent):
                grads.update(estimated(estimator, block, lambda m: losses(delta * output(m)), generator))

    for name in dependence.biases:
        if name not in grads:
            by_rows = name in dependence.by_rows and delta.dim() > 2
            estimate(dependence.params([name]), per_row if by_rows else per_example, estimator)
    rest = estimator.without_layers() if dependence.biases else estimator  # it may hold layers that no pass calls
    estimate(slots_of(block).trainable().keys() - grads.keys(), per_example, rest)
    return grads


def per_row(each: Tensor) -> Tensor:
    """As `per_example`, for the rows of (.., C)."""
    return per_example(each.flatten(0, -2))


def estimated(
    estimator: GradientEstimator, model: nn.Module, loss_fn: LossFn, generator: torch.Generator
) -> dict[str, Tensor]:
    """The gradients of an estimator, or of its substitute for a model without layers to perturb."""
    estimator = estimator if candidates(model) else estimator.without_layers()
    return estimator(model, loss_fn, generator=generator).grads


def per_example(each: Tensor) -> Tensor:
    """Losses (B,) whose mean is the sum of all elements (B, ..)."""
    return each.unsqueeze(-1).flatten(1).sum(1) * len(each)


def gradients_before(
    model: nn.Module, loss_fn: LossFn, blocks: ResidualBlocks, deltas: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """The gradients of the layers outside blocks that have a closed form, because they are just before a segment.

    Args:
        model: a model with residual blocks.
        loss_fn: maps the model to its losses.
        blocks: the recorded residual blocks of the model.
        deltas: the gradient of every segment's hidden state; None if the loss does not depend on it.
    """
    grads: dict[str, Tensor] = {}
    snapshot = Snapshot(model)
    for segment, delta in enumerate(deltas):
        if delta is not None:
            snapshot.restore()
            run = partial(_hidden_and_rest, loss_fn=loss_fn, blocks=blocks, segment=segment)
            with frozen(blocks.params):
                grads |= closed_forms(model, run, delta, segment)[0]
    return grads


def _hidden_and_rest(model: nn.Module, loss_fn: LossFn, blocks: ResidualBlocks, segment: int) -> Tensor:
    """One vector: the hidden state after a segment, then the losses and the hidden states after earlier segments.

    A layer has a closed form only if it changes nothing but the first part: the other parts are its other paths.
    """
    hidden: list[Tensor] = []

    def after_segment(s: int, x: Tensor) -> Tensor:
        if s > segment:
            return x
        hidden.append(x.flatten())
        return value_of(x).detach()

    with blocks.as_skips(after_segment):
        losses = loss_fn(model).flatten()
    return torch.cat([hidden[segment], losses, *hidden[:segment]])


class _Probed(nn.Module):
    """A model and a parameter of zeros that is added after a segment; its gradient is that after the segment."""

    def __init__(self, model: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.model = model
        self.probe = nn.Parameter(torch.zeros_like(like))


def delta_by_forward_mode(
    model: nn.Module, loss_fn: LossFn, blocks: ResidualBlocks, segment: int, chunk_size: int | None
) -> Tensor:
    """The gradient after a segment, from the derivatives along unit directions of its hidden state.

    The directions are those of a row (C,) if there is a loss for each row, as for the tokens of a language model. Else
    they are those of an example.
    """
    like = blocks.segments[segment].end
    if not like.numel():
        raise LossError(
            f"forward mode needs an example, but the hidden state after a block has shape {tuple(like.shape)}"
        )
    probed = _Probed(model, like)
    snapshot = Snapshot(probed)
    with_rows = WithRows(lambda _: loss_fn(model))

    def after_segment(s: int, x: Tensor) -> Tensor:
        return x + probed.probe if s == segment else x

    def run(direction: Tensor) -> tuple[Evaluated, Evaluated | None]:
        snapshot.restore()
        with torch.no_grad(), blocks.as_skips(after_segment):
            return with_rows.split(*jvp(probed, with_rows, {"probe": direction.view(-1, *like.shape)}))

    choices = {"rows": like.flatten(0, -2), "examples": like.flatten(1)}
    right: dict[int, str] = slots_of(model).cached(delta_by_forward_mode, dict)
    for choice in sorted(choices, key=lambda c: c != right.get(segment, "rows")):  # the one of earlier calls first
        delta = _of_rows(run, choices[choice], chunk_size)
        if delta is not None:
            right[segment] = choice
            return delta.view(like.shape)
    losses = run(torch.ones_like(like))[0].losses
    if losses.shape != like.shape[:1]:
        raise LossError(
            f"forward mode needs one loss for each of the {len(like)} examples in the hidden state, got losses of "
            f"shape {tuple(losses.shape)}; use reduction='none', or Highway(Backprop())"
        )
    raise UnsupportedOperation(
        "examples are mixed after a residual block (BatchNorm in training mode, a contrastive loss), so forward mode "
        "does not give the gradient of each; use Highway(Backprop())"
    )


def _of_rows(
    run: Callable[[Tensor], tuple[Evaluated, Evaluated | None]], like: Tensor, chunk_size: int | None
) -> Tensor | None:
    """The gradient (R, C) of the mean of R losses; None if there are not R, or one depends on several rows.

    Args:
        run: gives the losses and those of the rows, with their derivatives along directions (K, R, C).
        like: the hidden state (R, C).
        chunk_size: number of directions in one pass; None for all.
    """
    num_rows, size = like.shape
    marked, found = torch.zeros(0), list[Tensor]()
    chunk_size = chunk_size or size
    for start in range(0, size, chunk_size):
        units = like.new_zeros(min(chunk_size, size - start), size)
        units.fill_diagonal_(1)
        direction = units.roll(start, 1).unsqueeze(1).expand(-1, num_rows, -1)
        if not found:  # more directions tell whether the losses depend on one row each
            direction = torch.cat([direction, marks(num_rows, like).unsqueeze(2).expand(-1, -1, size)])
        evaluated, rows = run(direction)
        if rows is not None and rows.has_mean_of(evaluated) and len(rows.losses) == num_rows:
            evaluated = rows
        if evaluated.losses.numel() != num_rows:
            return None
        derivatives = evaluated.derivatives.view(-1, num_rows)
        if not found:
            marked = derivatives[len(units) :]
        found.append(derivatives[: len(units)])
    every = torch.cat(found)
    if every.isfinite().all() and reached(marked)[1].any():
        return None
    return every.T / num_rows

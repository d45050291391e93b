"""Assigns the rows of a layer's output to examples by testing which losses depend on them.

A pass carries directions that mark the rows of every example, see `row_losses.marks`. The assignment is right if every
loss depends on its own rows only.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fgtrain.errors import LossError, NoTangent, UnsupportedOperation
from fgtrain.forward_ad.dual import Dual, primal_of, tangent_of
from fgtrain.forward_ad.passes import NO_TANGENT, LossFn
from fgtrain.forward_ad.row_losses import Evaluated, WithRows, marks, num_marks, reached
from fgtrain.layer_noise.layer_call import LayerCall
from fgtrain.layer_noise.layers import run_perturbed
from fgtrain.layer_noise.noise import WITHOUT_HEAD, LayerNoise, LocalGrads
from fgtrain.network.parameters import slots_of
from fgtrain.network.snapshot import Snapshot


class Rows(NamedTuple):
    """The position of the examples in the output of a layer.

    Args:
        dim: the dimension of the examples.
        order: "single" for one row per example; "blocks" for all rows of one example, then those of the next;
            "interleaved" for one row of each example, then the next row of each; "tokens" if every place in all
            dimensions before the last is an example.
    """

    dim: int = 0
    order: Literal["single", "blocks", "interleaved", "tokens"] = "single"

    def fits(self, shape: torch.Size, num_examples: int) -> bool:
        """Whether an output of this shape can hold the examples in this way."""
        if self.order == "tokens":
            return math.prod(shape[:-1]) == num_examples
        size = shape[self.dim]
        return size == num_examples if self.order == "single" else size > 0 and size % num_examples == 0

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Repeat values (.., B) of the examples for their rows in an output of this shape: (.., size), or all sizes."""
        if self.order == "tokens":
            return values.unflatten(-1, shape[:-1])
        times = shape[self.dim] // values.shape[-1]
        if times == 1:
            return values
        if self.order == "blocks":
            return values.repeat_interleave(times, -1)
        return values.repeat(*[1] * (values.dim() - 1), times)


class ExaminedPass:
    """A pass, and tests of how its losses depend on its layers. A test is another pass, without side effects.

    Args:
        model: the model of the pass.
        loss_fn: its loss function.

    Attributes:
        rows: the losses of the rows of the model's last output and their derivatives, if the losses are their mean.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self.model = model
        self.rows: Evaluated | None = None
        self._loss_fn = loss_fn

    def run(self, tangents: Mapping[str, Any], *, follows: bool = True) -> Evaluated:
        """As `run_perturbed`.

        Raises:
            NoTangent: the losses carry no derivative.
        """
        with_rows = WithRows(self._loss_fn)
        losses, found = run_perturbed(self.model, with_rows, tangents, follows=follows)
        if found is None:
            raise NoTangent(NO_TANGENT)
        evaluated, rows = with_rows.split(losses, found)
        self.rows = rows if rows is not None and rows.has_mean_of(evaluated) else None
        return evaluated

    def reached(self, rows: Mapping[str, Rows], num_examples: int) -> Tensor:
        """As `row_losses.reached`, for the rows of layers in another pass."""
        marked, with_rows, after = _Marked(rows, num_examples), WithRows(self._loss_fn), Snapshot(self.model)
        try:
            losses, found = run_perturbed(self.model, with_rows, {name: LayerNoise(name, marked) for name in rows})
        finally:
            after.restore()
        if found is None:
            return torch.zeros(2, num_examples, dtype=torch.bool)
        evaluated, of_rows = with_rows.split(losses, found)
        is_right = of_rows is None or evaluated.losses.numel() == num_examples
        return reached(evaluated.derivatives if is_right else of_rows.derivatives)


def rows_of_examples(examined: ExaminedPass, calls: Sequence[LayerCall], losses: Tensor) -> Mapping[str, Rows]:
    """{name of the weight: position of the examples in its layer's output}, found at the first use.

    Layers with rows that belong to several examples are omitted. If later layers or the loss mix the examples
    (BatchNorm, a contrastive loss), a test is impossible. Then the first dimension is assumed to be the examples, if it
    is the only one of their number. The test is repeated if other positions become possible, as for losses of tokens
    instead of sequences.

    Args:
        examined: the pass.
        calls: the layer calls of the pass.
        losses: the losses of the pass.
    """
    if losses.numel() == 1:
        return {}
    cache, choices = slots_of(examined.model).cached(rows_of_examples, dict), _choices(calls, losses.numel())
    key = examined.model.training, tuple(choices.items())
    if key not in cache:
        if not losses.isfinite().all():
            return {}
        cache[key] = _find_rows(examined, choices, losses.numel())
    return cache[key]


def per_example(
    examined: ExaminedPass, calls: Sequence[LayerCall], found: Evaluated
) -> tuple[Evaluated, Mapping[str, Rows]]:
    """The losses per example with their derivatives, and `rows_of_examples`.

    A single loss, () or (1,), is replaced by the losses of the rows, if these are the losses of the examples.

    Args:
        examined: the pass.
        calls: the layer calls of the pass.
        found: what the pass gave.
    """
    if found.losses.numel() == 1 and examined.rows is not None:
        rows = rows_of_examples(examined, calls, examined.rows.losses)
        if rows.keys() == {call.name for call in calls}:
            return examined.rows, rows
    return found, rows_of_examples(examined, calls, found.losses)


def _find_rows(examined: ExaminedPass, choices: Mapping[str, tuple[Rows, ...]], num_examples: int) -> dict[str, Rows]:
    first = {name: rows[0] for name, rows in choices.items() if rows}
    if not first:
        return {}
    own, other = examined.reached(first, num_examples)
    if own.any() and not other.any():
        return first
    found, is_mixed = {}, bool((own & other).all())  # if rows are in another order, some loss misses its own

    def is_right(name: str, rows: Rows, *, alone: bool) -> bool:
        if alone and is_mixed:
            return True
        own, other = examined.reached({name: rows}, num_examples)
        return not (other & ~own).any() if alone else bool(own.any() & ~other.any())

    for name, several in choices.items():
        right = (rows for rows in several if is_right(name, rows, alone=several == (Rows(),)))
        found[name] = next(right, None)
    return {name: rows for name, rows in found.items() if rows is not None}


def _choices(calls: Sequence[LayerCall], num_examples: int) -> dict[str, tuple[Rows, ...]]:
    """Possible positions of the examples in the output of every layer."""
    of_layers: dict[str, list[LayerCall]] = {}
    for call in calls:
        of_layers.setdefault(call.name, []).append(call)
    return {name: _choices_of(calls, num_examples) for name, calls in of_layers.items()}


def _choices_of(calls: Sequence[LayerCall], num_examples: int) -> tuple[Rows, ...]:
    """Possible positions of the examples in a layer's output: not the channels or the positions of a convolution."""
    before_channels = min(call.channels % len(call.shape) for call in calls)
    several = [Rows(0, "blocks"), Rows(0, "interleaved")] if before_channels else []
    if before_channels > 1 and all(call.channels % len(call.shape) == len(call.shape) - 1 for call in calls):
        several.append(Rows(0, "tokens"))
    choices = [*(Rows(dim) for dim in range(before_channels)), *several]
    fitting = [rows for rows in choices if all(rows.fits(call.shape, num_examples) for call in calls)]
    return tuple(rows for rows in fitting if rows.order == "single" or Rows() not in fitting)


class _Marked:
    """A pass with marked rows.

    Args:
        rows: {name of the weight: position of the examples in its layer's output}.
        num_examples: B.
    """

    def __init__(self, rows: Mapping[str, Rows], num_examples: int) -> None:
        self.rows = rows
        self.num_examples = num_examples
        self.num_tangents = num_marks(num_examples)

    def perturb(self, name: str, inputs: Tensor, output: Tensor, local_grads: LocalGrads, channels: int) -> Tensor:
        primal, tangent, rows = primal_of(output), tangent_of(output), self.rows[name]
        marked = rows.spread(marks(self.num_examples, primal), primal.shape)
        behind = primal.dim() + 1 - rows.dim - marked.dim()
        marked = marked.view(-1, *[1] * rows.dim, *marked.shape[1:], *[1] * behind).expand(-1, *primal.shape)
        return Dual(primal, marked.clone() if tangent is None else tangent + marked)


def gradient_of_head(examined: ExaminedPass, calls: Sequence[LayerCall], name: str, found: Evaluated) -> Tensor:
    """The gradient (.., C) of the mean loss in the last layer's output, from its unit directions.

    Args:
        examined: the pass.
        calls: the layer calls of the pass.
        name: name of the last layer's weight.
        found: what the pass gave. Its last derivatives are along the C unit directions of the output and the `marks` of
            its rows.

    Raises:
        LossError: there is not one loss per row.
        UnsupportedOperation: a loss depends on the rows of other examples, or the layer was not called.
    """
    layer = name.removesuffix(".weight")
    head = next((call for call in calls if call.name == name), None)
    if head is None:
        raise UnsupportedOperation(
            f"{layer} was the last layer of the model's first pass but is not called in this one; {WITHOUT_HEAD}"
        )
    *leading, num_channels = head.shape
    num_rows, losses = math.prod(leading), found.losses.shape
    rows = found if losses.numel() == num_rows else examined.rows  # a scalar is the loss of a single row
    if rows is None or rows.losses.numel() != num_rows:
        raise LossError(
            f"the exact gradient of the last layer needs one loss for each of the {num_rows} rows of {layer}, got "
            f"losses of shape {tuple(losses)}; use reduction='none', or F.cross_entropy or F.mse_loss alone, or "
            f"{WITHOUT_HEAD}"
        )
    of_rows = rows.derivatives.view(-1, num_rows)
    sizes = num_channels, num_marks(num_rows)
    units, marked = of_rows[-sum(sizes) :].split(sizes)
    if units.isfinite().all() and reached(marked)[1].any():
        raise UnsupportedOperation(
            f"the exact gradient of the last layer needs losses that each depend on one row of {layer}, but examples "
            f"are mixed after it (BatchNorm in training mode, a contrastive loss); {WITHOUT_HEAD}"
        )
    return (units.T / num_rows).view(head.shape)

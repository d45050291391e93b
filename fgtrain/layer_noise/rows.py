"""Assigns the rows of a layer's output to examples by testing which losses depend on them.

A pass marks rows with tangents of nan. Every loss that depends on a marked row, even by a factor of 0, gets the tangent
nan. One direction marks all rows but those assigned to the first example: the first loss must not have the tangent nan,
but another must. A second direction marks the rows of the first example alone: no other loss may have the tangent nan.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fgtrain.errors import LossError, NoTangent, UnsupportedOperation
from fgtrain.forward_ad.dual import Dual, primal_of, tangent_of
from fgtrain.forward_ad.native import NO_TANGENT
from fgtrain.forward_ad.passes import RepeatedPass
from fgtrain.forward_ad.row_losses import Evaluated, Scaled, WithRows
from fgtrain.layer_noise.layers import run_perturbed
from fgtrain.layer_noise.noise import WITHOUT_HEAD, LayerCall, LayerNoise, LocalGrads, Owner
from fgtrain.network.parameters import slots_of


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

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any], Tensor]) -> None:
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

    def separates(self, rows: Mapping[str, Rows], num_examples: int) -> bool:
        """Whether the first loss depends on no row of another example, and no other loss on those of the first."""
        found = self._again(_Marks(rows, num_examples), rows, num_examples)
        if found is None:
            return False
        of_others, of_first = found.isnan()
        return bool(of_others[1:].any() & ~of_others[0] & ~of_first[1:].any())

    def has_rows_of(self, name: str, num_rows: int, num_channels: int, like: Tensor) -> bool:
        """Whether every row's loss depends on the row of the last layer's output in the same place, and on no other.

        Args:
            name: name of the last layer's weight.
            num_rows: R, the number of rows of its output.
            num_channels: C.
            like: a tensor with the dtype and device of the losses.
        """
        scaled = Scaled.sample(num_rows, num_channels, like)
        found = self._again(_Moved(scaled), [name], num_rows)
        return found is not None and scaled.fits(found[1:], found[0])

    def _again(self, owner: Owner, names: Iterable[str], count: int) -> Tensor | None:
        """The derivatives of the losses, or of the rows if there are as many, in another pass."""
        with_rows, after = WithRows(self._loss_fn), RepeatedPass(self.model)
        try:
            losses, found = run_perturbed(self.model, with_rows, {name: LayerNoise(name, owner) for name in names})
        finally:
            after.rewind()
        if found is None:
            return None
        evaluated, rows = with_rows.split(losses, found)
        return evaluated.derivatives if rows is None or evaluated.losses.numel() == count else rows.derivatives


def rows_of_examples(examined: ExaminedPass, calls: Sequence[LayerCall], losses: Tensor) -> Mapping[str, Rows]:
    """{name of the weight: position of the examples in its layer's output}, found at the first use.

    Layers with rows that belong to several examples are omitted. If later layers or the loss mix the examples
    (BatchNorm, a contrastive loss), a test is impossible. Then the first dimension is assumed to be the examples, if it
    is the only one of their number.

    Args:
        examined: the pass.
        calls: the layer calls of the pass.
        losses: the losses of the pass.
    """
    kept, names = slots_of(examined.model).kept(rows_of_examples, dict), frozenset(call.name for call in calls)
    if names in kept:
        return kept[names]
    if losses.numel() == 1 or not losses.isfinite().all():
        return {}
    kept[names] = _find_rows(examined, calls, losses.numel())
    return kept[names]


def per_example(
    examined: ExaminedPass, calls: Sequence[LayerCall], found: Evaluated
) -> tuple[Evaluated, Mapping[str, Rows]]:
    """The losses per example with their derivatives, and `rows_of_examples`.

    A scalar loss is replaced by the losses of the rows, if these are the losses of the examples.

    Args:
        examined: the pass.
        calls: the layer calls of the pass.
        found: what the pass gave.
    """
    if found.losses.dim() == 0 and examined.rows is not None:
        rows = rows_of_examples(examined, calls, examined.rows.losses)
        if rows.keys() == {call.name for call in calls}:
            return examined.rows, rows
    return found, rows_of_examples(examined, calls, found.losses)


def _find_rows(examined: ExaminedPass, calls: Sequence[LayerCall], num_examples: int) -> dict[str, Rows]:
    choices = {call.name: _choices([c for c in calls if c.name == call.name], num_examples) for call in calls}
    first = {name: rows[0] for name, rows in choices.items() if rows}
    if not first or examined.separates(first, num_examples):
        return first
    found = {}
    for name, rows in choices.items():
        right = (r for r in rows if rows == [Rows()] or examined.separates({name: r}, num_examples))
        found[name] = next(right, None)
    return {name: rows for name, rows in found.items() if rows is not None}


def _choices(calls: Sequence[LayerCall], num_examples: int) -> list[Rows]:
    """Possible positions of the examples in a layer's output: not the channels or the positions of a convolution."""
    before_channels = min(call.channels % len(call.shape) for call in calls)
    several = [Rows(0, "blocks"), Rows(0, "interleaved")] if before_channels else []
    if before_channels > 1 and all(call.channels % len(call.shape) == len(call.shape) - 1 for call in calls):
        several.append(Rows(0, "tokens"))
    choices = [*(Rows(dim) for dim in range(before_channels)), *several]
    fitting = [rows for rows in choices if all(rows.fits(call.shape, num_examples) for call in calls)]
    return [rows for rows in fitting if rows.order == "single" or Rows() not in fitting]


class _Marks:
    """A pass with marked rows.

    Args:
        rows: {name of the weight: position of the examples in its layer's output}.
        num_examples: B.
    """

    num_tangents = 2

    def __init__(self, rows: Mapping[str, Rows], num_examples: int) -> None:
        self.rows = rows
        self.num_examples = num_examples

    def perturb(self, name: str, inputs: Tensor, output: Tensor, local_grads: LocalGrads, channels: int) -> Tensor:
        primal, tangent, rows = primal_of(output), tangent_of(output), self.rows[name]
        of_examples = primal.new_zeros(2, self.num_examples)
        of_examples[0, 1:] = of_examples[1, 0] = torch.nan
        marks = rows.spread(of_examples, primal.shape)
        behind = primal.dim() + 1 - rows.dim - marks.dim()
        marks = marks.view(2, *[1] * rows.dim, *marks.shape[1:], *[1] * behind).expand(2, *primal.shape)
        return Dual(primal, marks.clone() if tangent is None else tangent + marks)


class _Moved:
    """A pass that moves the output of the last layer: along a direction, and along its C unit directions.

    Args:
        scaled: the direction.
    """

    def __init__(self, scaled: Scaled) -> None:
        self.scaled = scaled
        self.num_tangents = 1 + len(scaled.of_channels)

    def perturb(self, name: str, inputs: Tensor, output: Tensor, local_grads: LocalGrads, channels: int) -> Tensor:
        primal, along = primal_of(output), self.scaled.direction
        units = torch.eye(along.shape[1]).unsqueeze(1).expand(-1, *along.shape)
        return Dual(primal, torch.cat([along.unsqueeze(0), units.to(along)]).to(primal).view(-1, *primal.shape))


def gradient_of_head(examined: ExaminedPass, calls: Sequence[LayerCall], name: str, found: Evaluated) -> Tensor:
    """The gradient (.., C) of the mean loss in the last layer's output, from its unit directions.

    Args:
        examined: the pass.
        calls: the layer calls of the pass.
        name: name of the last layer's weight.
        found: what the pass gave. The last C derivatives are along the unit directions of the output.

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
    rows = found if losses == (num_rows,) else examined.rows
    if rows is None or len(rows.losses) != num_rows:
        raise LossError(
            f"the exact gradient of the last layer needs one loss for each of the {num_rows} rows of {layer}, got "
            f"losses of shape {tuple(losses)}; use reduction='none', or F.cross_entropy or F.mse_loss alone, or "
            f"{WITHOUT_HEAD}"
        )
    units, separate = rows.derivatives[-num_channels:], slots_of(examined.model).kept(gradient_of_head, set)
    if num_rows > 1 and name not in separate and units.isfinite().all():
        is_separate = (
            examined.separates({name: Rows()}, num_rows)
            if rows is found
            else examined.has_rows_of(name, num_rows, num_channels, units)
        )
        if not is_separate:
            raise UnsupportedOperation(
                f"the exact gradient of the last layer needs losses that each depend on one row of {layer}, but "
                f"examples are mixed after it (BatchNorm in training mode, a contrastive loss); {WITHOUT_HEAD}"
            )
        separate.add(name)
    return (units.T / num_rows).view(head.shape)

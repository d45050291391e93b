"""Assigns the rows of a layer's output to examples by testing which losses depend on them.

A pass marks rows with tangents of nan. Every loss that depends on a marked row, even by a factor of 0, gets the tangent
nan. All rows but those assigned to the first example are marked. The assignment is right if only the first loss has a
tangent other than nan.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.forward_ad.dual import Dual, primal_of, tangent_of
from fgtrain.forward_ad.passes import RepeatedPass
from fgtrain.layer_noise.layers import run_perturbed
from fgtrain.layer_noise.noise import WITHOUT_HEAD, LayerCall, LayerNoise, LocalGrads
from fgtrain.network.parameters import slots_of


class Rows(NamedTuple):
    """The position of the examples in the output of a layer.

    Args:
        dim: the dimension of the examples.
        order: "single" for one row per example; "blocks" for all rows of one example, then those of the next;
            "interleaved" for one row of each example, then the next row of each.
    """

    dim: int = 0
    order: Literal["single", "blocks", "interleaved"] = "single"

    def fits(self, shape: torch.Size, num_examples: int) -> bool:
        """Whether an output of this shape can hold the examples in this way."""
        size = shape[self.dim]
        return size == num_examples if self.order == "single" else size > 0 and size % num_examples == 0

    def spread(self, values: Tensor, size: int) -> Tensor:
        """Repeat values (.., B) of the examples for their rows, (.., size)."""
        times = size // values.shape[-1]
        if times == 1:
            return values
        if self.order == "blocks":
            return values.repeat_interleave(times, -1)
        return values.repeat(*[1] * (values.dim() - 1), times)


class ExaminedPass:
    """A pass that can be repeated for tests after it has run, without side effects. Create it before the pass.

    Args:
        model: the model of the pass.
        loss_fn: its loss function.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any], Tensor]) -> None:
        self.model = model
        self._loss_fn = loss_fn
        self._repeated = RepeatedPass(model)

    def separates(self, rows: Mapping[str, Rows], num_examples: int) -> bool:
        """Whether the first loss depends on no row that is assigned to another example."""
        marks = _Marks(rows, num_examples)
        with self._repeated.again():
            _, found = run_perturbed(self.model, self._loss_fn, {name: LayerNoise(name, marks) for name in rows})
        if found is None:
            return False
        moved = found[0].isnan()
        return bool(moved[1:].any() & ~moved[0])


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
    choices = [*(Rows(dim) for dim in range(before_channels)), *several]
    fitting = [rows for rows in choices if all(rows.fits(call.shape, num_examples) for call in calls)]
    return [rows for rows in fitting if rows.order == "single" or Rows() not in fitting]


class _Marks:
    """A pass with marked rows.

    Args:
        rows: {name of the weight: position of the examples in its layer's output}.
        num_examples: B.
    """

    num_tangents = 1

    def __init__(self, rows: Mapping[str, Rows], num_examples: int) -> None:
        self.rows = rows
        self.num_examples = num_examples

    def perturb(self, name: str, inputs: Tensor, output: Tensor, local_grads: LocalGrads, channels: int) -> Tensor:
        primal, tangent, rows = primal_of(output), tangent_of(output), self.rows[name]
        of_examples = primal.new_full((self.num_examples,), torch.nan)
        of_examples[0] = 0
        marks = rows.spread(of_examples, primal.shape[rows.dim])
        marks = marks.view(-1, *[1] * (primal.dim() - 1 - rows.dim)).expand(1, *primal.shape)
        return Dual(primal, marks.clone() if tangent is None else tangent + marks)


def gradient_of_head(examined: ExaminedPass, calls: Sequence[LayerCall], name: str, unit_derivatives: Tensor) -> Tensor:
    """The gradient (B, C) of the mean loss in the last layer's output, from the losses' unit derivatives (C, B).

    Args:
        examined: the pass.
        calls: the layer calls of the pass.
        name: name of the last layer's weight.
        unit_derivatives: derivatives of the losses along the unit directions of the output.

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
    if unit_derivatives.dim() != 2 or unit_derivatives.shape[1] != head.shape[0]:
        raise LossError(
            f"the exact gradient of the last layer needs one loss for each of the {head.shape[0]} rows of {layer}, got "
            f"losses of shape {tuple(unit_derivatives.shape[1:])}; use reduction='none', or {WITHOUT_HEAD}"
        )
    num_examples, separate = head.shape[0], slots_of(examined.model).kept(gradient_of_head, set)
    if num_examples > 1 and name not in separate and unit_derivatives.isfinite().all():
        if not examined.separates({name: Rows()}, num_examples):
            raise UnsupportedOperation(
                f"the exact gradient of the last layer needs losses that each depend on one row of {layer}, but "
                f"examples are mixed after it (BatchNorm in training mode, a contrastive loss); {WITHOUT_HEAD}"
            )
        separate.add(name)
    return unit_derivatives.T / num_examples

"""Which rows of a layer's output belong to which example, found by looking which losses they can move.

A pass marks rows: it gives them tangents of nan, and whatever depends on them, be it by a factor of 0, turns nan. Every
row but those of the first example is marked; they are the other examples' where the first loss alone stays a number.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.forward_ad.dual import Dual, primal_of, tangent_of
from fgtrain.forward_ad.passes import RepeatedPass
from fgtrain.layer_noise.layers import run_perturbed
from fgtrain.layer_noise.noise import WITHOUT_HEAD, LayerCall, LayerNoise, LocalGrads
from fgtrain.network.parameters import ParameterSlots, slots_of


class Rows(NamedTuple):
    """Where the examples stand in the output of a layer.

    Args:
        dim: the dimension.
        order: "single", a row for each; "blocks", all rows of one, then those of the next; "interleaved", a row of
            each, then the next row of each.
    """

    dim: int = 0
    order: Literal["single", "blocks", "interleaved"] = "single"

    def fits(self, shape: torch.Size, num_examples: int) -> bool:
        """Whether an output of this shape can have the examples there."""
        size = shape[self.dim]
        return size == num_examples if self.order == "single" else size > 0 and size % num_examples == 0

    def spread(self, values: Tensor, size: int) -> Tensor:
        """Values (.., B) of the examples as those of the rows, (.., size)."""
        times = size // values.shape[-1]
        if times == 1:
            return values
        if self.order == "blocks":
            return values.repeat_interleave(times, -1)
        return values.repeat(*[1] * (values.dim() - 1), times)


class ExaminedPass:
    """A pass that is about to run; afterwards one can look at it again, and no trace of that is left.

    Args:
        model: as in the pass.
        loss_fn: as in the pass.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any], Tensor]) -> None:
        self.model = model
        self._loss_fn = loss_fn
        self._repeated = RepeatedPass(model)

    def separates(self, rows: Mapping[str, Rows], num_examples: int) -> bool:
        """Whether the first loss depends on none of the rows that are said to be other examples'."""
        marks = _Marks(rows, num_examples)
        with self._repeated.again():
            _, found = run_perturbed(self.model, self._loss_fn, {name: LayerNoise(name, marks) for name in rows})
        if found is None:
            return False
        moved = found[0].isnan()
        return bool(moved[1:].any() & ~moved[0])


def rows_of_examples(examined: ExaminedPass, calls: Sequence[LayerCall], losses: Tensor) -> Mapping[str, Rows]:
    """{name of the weight: where its layer's output has the examples}, found at the first use.

    Left out are layers whose rows are not one example's each. Where examples are mixed behind a layer (BatchNorm, a
    contrastive loss) nothing can be told: then its first dimension is taken for the examples, if it has their number
    and no other dimension has.

    Args:
        examined: the pass.
        calls: of the pass.
        losses: of the pass.
    """
    kept, names = _found.setdefault(slots_of(examined.model), {}), frozenset(call.name for call in calls)
    if names in kept:
        return kept[names]
    if losses.numel() == 1 or not losses.isfinite().all():
        return {}
    kept[names] = _find_rows(examined, calls, losses.numel())
    return kept[names]


_found: WeakKeyDictionary[ParameterSlots, dict[frozenset[str], dict[str, Rows]]] = WeakKeyDictionary()


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
    """Where the output of a layer can have the examples: not among the channels or the positions of a convolution."""
    before_channels = min(call.channels % len(call.shape) for call in calls)
    several = [Rows(0, "blocks"), Rows(0, "interleaved")] if before_channels else []
    choices = [*(Rows(dim) for dim in range(before_channels)), *several]
    fitting = [rows for rows in choices if all(rows.fits(call.shape, num_examples) for call in calls)]
    return [rows for rows in fitting if rows.order == "single" or Rows() not in fitting]


class _Marks:
    """A pass with marked rows.

    Args:
        rows: of the layers.
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
    """The gradient of the mean loss in the last layer's output (B, C), from the losses' unit derivatives (C, B).

    Args:
        examined: the pass.
        calls: of the pass.
        name: of the last layer's weight.
        unit_derivatives: of the losses.

    Raises:
        LossError: the losses are not those of the rows.
        UnsupportedOperation: a loss depends on the rows of other examples, or the layer was not called.
    """
    layer = name.removesuffix(".weight")
    head = next((call for call in calls if call.name == name), None)
    if head is None:
        raise UnsupportedOperation(
            f"{layer} was the last layer of the model's first pass and is not called in this; {WITHOUT_HEAD}"
        )
    if unit_derivatives.dim() != 2 or unit_derivatives.shape[1] != head.shape[0]:
        raise LossError(
            f"the exact gradient of the last layer needs one loss for each of the {head.shape[0]} rows of {layer}, got "
            f"losses of shape {tuple(unit_derivatives.shape[1:])}; use reduction='none', or {WITHOUT_HEAD}"
        )
    num_examples, slots = head.shape[0], slots_of(examined.model)
    if num_examples > 1 and name not in _separate_heads.setdefault(slots, set()) and unit_derivatives.isfinite().all():
        if not examined.separates({name: Rows()}, num_examples):
            raise UnsupportedOperation(
                f"the exact gradient of the last layer needs losses that depend on one row of {layer} each, here "
                f"examples are mixed behind it (BatchNorm in training mode, a contrastive loss); {WITHOUT_HEAD}"
            )
        _separate_heads[slots].add(name)
    return unit_derivatives.T / num_examples


_separate_heads: WeakKeyDictionary[ParameterSlots, set[str]] = WeakKeyDictionary()

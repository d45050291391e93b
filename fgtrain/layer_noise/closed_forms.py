"""Gradients of layers in closed form, from the gradient of a later tensor.

Often only element-wise functions lead from a layer's output z to a tensor y: z is added to y, or passes a dropout mask
or an activation function first. Then dy / dz is diagonal. A direction of ones at z gives the diagonal D, and the
gradient of z is D * delta for the gradient delta of y. The gradient of the layer's weight follows from that of z and
the layer's input.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain.agreement import agree
from fgtrain.errors import UnsupportedOperation
from fgtrain.forward_ad.dual import Dual, primal_of, tangent_of
from fgtrain.forward_ad.output_tangent import LocalGrads
from fgtrain.layer_noise.layers import PERTURBED, find_layers, run_perturbed
from fgtrain.layer_noise.noise import LayerNoise
from fgtrain.network.parameters import slots_of
from fgtrain.network.snapshot import Snapshot

Run = Callable[[Any], Tensor]
"""Maps a model to one vector: y, then everything else that may depend on the layers before y."""


@dataclass
class Dependence:
    """How y depends on the layers before it.

    Args:
        biases: {name of the weight: name of the bias or None}.
        diagonal: the layers with a diagonal dy / dz, if nothing in the vector after y depends on z.
        by_rows: the layers for which each row of y depends only on the row of z in the same place.
    """

    biases: dict[str, str | None]
    diagonal: set[str] = field(default_factory=set)
    by_rows: set[str] = field(default_factory=set)

    def params(self, names: Iterable[str]) -> set[str]:
        """The names of the weights and biases of these layers."""
        return {p for name in names for p in (name, self.biases[name]) if p is not None}


def closed_forms(model: nn.Module, run: Run, delta: Tensor, part: int = 0) -> tuple[dict[str, Tensor], Dependence]:
    """The gradients of the parameters of diagonal layers, and how y depends on all layers, found at the first call.

    Every call tests again that the layers are diagonal, and leaves out those that no longer are.

    Args:
        model: any module.
        run: see `Run`.
        delta: the gradient of y, in its shape.
        part: a number for this y, if the model has several.
    """
    cache: dict[tuple[int, frozenset[str]], Dependence] = slots_of(model).cached(closed_forms, dict)
    key = part, frozenset(slots_of(model).trainable())
    if key not in cache:
        cache[key] = _found(model, run, delta)
    dependence, grads, params = cache[key], dict[str, Tensor](), slots_of(model).params
    for name, grad_output, local_grads in _diagonal(model, run, delta, dependence.diagonal):
        for param, grad in zip((name, dependence.biases[name]), local_grads(grad_output), strict=True):
            if param is not None:
                grads[param] = grad.to(params[param].dtype)  # autocast may have rounded the output
    return grads, dependence


def _found(model: nn.Module, run: Run, delta: Tensor) -> Dependence:
    snapshot = Snapshot(model)
    try:
        dependence = Dependence(find_layers(model, run, (*PERTURBED, nn.Embedding)).biases)
        snapshot.restore()
        dependence.diagonal = {name for name, *_ in _diagonal(model, run, delta, dependence.biases)}
        snapshot.restore()
        dependence.by_rows = _by_rows(model, run, delta, dependence.biases)
    except UnsupportedOperation:
        dependence = Dependence({})
    finally:
        snapshot.restore()
    return dependence


class _Probe:
    """A pass with two directions for each layer.

    Args:
        names: names of the layers' weights.
        draw: maps a layer's output and the dimension of its channels to its directions, (2, ..).
    """

    def __init__(self, names: Iterable[str], draw: Callable[[Tensor, int], Tensor]) -> None:
        self.names = list(names)
        self.num_tangents = 2 * len(self.names)
        self.draw = draw
        self.calls: dict[str, list[tuple[Tensor, LocalGrads]]] = {name: [] for name in self.names}

    def perturb(self, name: str, inputs: Tensor, output: Tensor, local_grads: LocalGrads, channels: int) -> Tensor:
        primal, tangent = primal_of(output), tangent_of(output)
        moved = primal.new_zeros(self.num_tangents, *primal.shape) if tangent is None else tangent.clone()
        first, drawn = 2 * self.names.index(name), self.draw(primal, channels % primal.dim())
        moved[first : first + 2] += drawn
        self.calls[name].append((drawn[1], local_grads))
        return Dual(primal, moved)

    def run(self, model: nn.Module, run: Run) -> Tensor:
        """The derivatives of the vector for each layer, (layers, 2, its length)."""
        values, found = run_perturbed(model, run, {name: LayerNoise(name, self) for name in self.names})
        if found is None:
            found = values.new_zeros(self.num_tangents, len(values))
        return found.unflatten(0, (len(self.names), 2))


def _diagonal(model: nn.Module, run: Run, delta: Tensor, names: Iterable[str]) -> list[tuple[str, Tensor, LocalGrads]]:
    """(name, gradient of the output, its `LocalGrads`) of those layers that are diagonal."""

    def draw(output: Tensor, _: int) -> Tensor:
        numbers = torch.empty_like(output).normal_(generator=torch.Generator(output.device).manual_seed(0))
        return torch.stack([torch.ones_like(output), numbers])

    probe, found = _Probe(names, draw), []
    if not probe.names:
        with torch.no_grad():
            run(model)
        return []
    for name, moved in zip(probe.names, probe.run(model, run), strict=True):
        ones, along = moved[:, : delta.numel()].view(2, *delta.shape)
        if len(probe.calls[name]) != 1 or moved[:, delta.numel() :].any() or not ones.any():
            continue
        drawn, local_grads = probe.calls[name][0]
        if _spreads(drawn.shape, delta.shape) and agree(along, ones * drawn):
            found.append((name, (ones * delta).sum_to_size(drawn.shape), local_grads))
    return found


def _spreads(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of this shape can be repeated to the shape `to`."""
    behind = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape, behind, strict=True))


def _by_rows(model: nn.Module, run: Run, delta: Tensor, names: Iterable[str]) -> set[str]:
    """The layers by rows: marks in a random half of the rows reach only that half, and marks in the rest only the rest.

    A mark in a single row would not do, since no other row may depend on it, as on an isolated node of a graph.
    """
    if delta.dim() < 3:
        return set()
    num_rows = delta[..., 0].numel()
    half = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0)).to(delta.device) < num_rows / 2

    def draw(output: Tensor, channels: int) -> Tensor:
        marks = output.new_zeros(2, *output.shape)
        if channels == output.dim() - 1 and output.shape[:-1] == delta.shape[:-1]:
            rows = marks.flatten(1, -2)
            rows[0, half] = rows[1, ~half] = torch.nan
        return marks

    probe = _Probe(names, draw)
    found = set()
    for name, moved in zip(probe.names, probe.run(model, run), strict=True):
        of_half, of_others = moved[:, : delta.numel()].view(2, -1, delta.shape[-1]).isnan().any(-1)
        if of_half.any() and not of_half[~half].any() and not of_others[half].any():
            found.add(name)
    return found

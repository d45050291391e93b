"""torch.grid_sample as elementary operations, since its kernels have no forward-mode derivative.

Shapes: N examples, C channels, D spatial dimensions (2 or 3); coordinates are (N, *output shape), one tensor per
spatial dimension.
"""

import math
from itertools import product
from typing import Any

import torch

from fgtrain.forward_ad.rules.compositions import composition_of

_BILINEAR, _NEAREST = 0, 1  # and bicubic
_ZEROS, _BORDER = 0, 1  # and reflection


@composition_of("grid_sampler grid_sampler_2d grid_sampler_3d")
def _grid_sampler(x: Any, grid: Any, mode: int, padding: int, align_corners: bool) -> Any:
    """The image x at the positions in `grid`, which are in [-1, 1] inside the image, with the last dimension first."""
    sizes = x.shape[2:]
    at = [
        ((place + 1) * (size - 1) if align_corners else (place + 1) * size - 1) / 2
        for place, size in zip(reversed(grid.unbind(-1)), sizes, strict=True)
    ]
    if mode > _NEAREST:
        return _bicubic(x, at, padding, align_corners)
    at = [_inside(a, size, padding, align_corners) for a, size in zip(at, sizes, strict=True)]
    if mode == _NEAREST:
        return _pixels(x, [a.detach().round() for a in at])
    low = [a.detach().floor() for a in at]
    total = None
    for corner in product((0, 1), repeat=len(at)):
        shares = [a - start if upper else start + 1 - a for a, start, upper in zip(at, low, corner, strict=True)]
        pixels = _pixels(x, [start + upper for start, upper in zip(low, corner, strict=True)])
        term = pixels * math.prod(shares[1:], start=shares[0]).unsqueeze(1)
        total = term if total is None else total + term
    return total


def _bicubic(x: Any, at: list[Any], padding: int, align_corners: bool) -> Any:
    low = [a.detach().floor() for a in at]
    weights = [_cubic_weights(a - start) for a, start in zip(at, low, strict=True)]
    total = None
    for shifts in product(range(4), repeat=len(at)):
        places = [
            _inside(start + shift - 1, size, padding, align_corners)
            for start, shift, size in zip(low, shifts, x.shape[2:], strict=True)
        ]
        weight = weights[0][shifts[0]] * weights[1][shifts[1]]
        term = _pixels(x, places) * weight.unsqueeze(1)
        total = term if total is None else total + term
    return total


def _cubic_weights(t: Any) -> list[Any]:
    """Weights of the four pixels around a position at distance t after the second (Keys 1981, a = -0.75)."""
    a = -0.75

    def near(d: Any) -> Any:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Any) -> Any:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]


def _inside(at: Any, size: int, padding: int, align_corners: bool) -> Any:
    """A coordinate moved into [0, size - 1] according to the padding; unchanged for "zeros"."""
    if padding == _ZEROS:
        return at
    if padding != _BORDER:  # reflection, at the centres of the outer pixels or at their edges
        low, span = (0.0, size - 1.0) if align_corners else (-0.5, float(size))
        if span == 0:
            return at * 0
        distance = (at - low).abs()
        flips = (distance.detach() / span).floor()
        rest = distance - flips * span
        at = torch.where(flips % 2 == 0, rest + low, span - rest + low)
    at = torch.where(at.detach() <= 0, 0.0, at)  # at the border itself the derivative is 0
    return torch.where(at.detach() >= size - 1, size - 1.0, at)


def _pixels(x: Any, at: list[Any]) -> Any:
    """(N, C, *output shape): x at whole coordinates, 0 outside."""
    sizes = x.shape[2:]
    inside = torch.stack([(a >= 0) & (a <= size - 1) for a, size in zip(at, sizes, strict=True)]).all(0)
    index = torch.zeros_like(at[0], dtype=torch.int64)
    for a, size in zip(at, sizes, strict=True):
        index = index * size + a.nan_to_num(-1).clamp(0, size - 1).long()
    flat = index.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
    pixels = x.flatten(2).gather(2, flat).unflatten(2, index.shape[1:])
    return pixels * inside.unsqueeze(1).to(x.dtype)

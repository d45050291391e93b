"""The error of an estimate of the gradient."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Quality(NamedTuple):
    """Comparison of an estimate g_hat with the gradient g.

    Args:
        cosine: cosine of the angle between them.
        relative_squared_error: ||g_hat - g||^2 / ||g||^2.
        norm_ratio: ||g_hat|| / ||g||.
    """

    cosine: float
    relative_squared_error: float
    norm_ratio: float


def quality(estimate: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, Quality]:
    """Quality over all parameters, under the name "", and over those of every module, under the module's name.

    Args:
        estimate: {parameter name: gradient}; a missing one counts as 0.
        exact: the exact gradient.

    >>> g = {"layer.weight": torch.tensor([3.0, 0.0]), "layer.bias": torch.tensor([4.0])}
    >>> quality({"layer.weight": torch.tensor([3.0, 0.0])}, g)[""]
    Quality(cosine=0.6, relative_squared_error=0.64, norm_ratio=0.6)
    """
    products = {name: _products(estimate.get(name), g) for name, g in exact.items()}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in exact)
    found = {"": _quality(list(products.values()))}
    for layer in layers:
        if layer:
            found[layer] = _quality([p for name, p in products.items() if name.rpartition(".")[0] == layer])
    return found


def _products(estimate: Tensor | None, exact: Tensor) -> Tensor:
    """Squared norms of both and their inner product, (3,)."""
    g = exact.double().flatten()
    h = torch.zeros_like(g) if estimate is None else estimate.double().flatten()
    return torch.stack([h @ h, g @ g, h @ g])


def _quality(products: list[Tensor]) -> Quality:
    hh, gg, hg = torch.stack(products).sum(0)
    values = torch.stack([hg / (hh * gg).sqrt(), (hh + gg - 2 * hg) / gg, (hh / gg).sqrt()])
    return Quality(*values.tolist())

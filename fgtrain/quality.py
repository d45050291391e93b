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
        exact: the exact gradient, likewise; modules of which it has none are left out.

    >>> g = {"layer.weight": torch.tensor([3.0, 0.0]), "layer.bias": torch.tensor([4.0])}
    >>> quality({"layer.weight": torch.tensor([3.0, 0.0])}, g)[""]
    Quality(cosine=0.6, relative_squared_error=0.64, norm_ratio=0.6)
    """
    products = {name: _products(estimate.get(name), exact.get(name)) for name in dict.fromkeys((*exact, *estimate))}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in exact)
    found = {"": _quality(list(products.values()))}
    for layer in layers:
        if layer:
            found[layer] = _quality([p for name, p in products.items() if name.rpartition(".")[0] == layer])
    return found


def _products(estimate: Tensor | None, exact: Tensor | None) -> Tensor:
    """Squared norms of both and their inner product, (3,); at most one is None."""
    h, g = _vector(estimate, exact), _vector(exact, estimate)
    return torch.stack([h @ h, g @ g, h @ g])


def _vector(x: Tensor | None, other: Tensor | None) -> Tensor:
    if x is None:
        assert other is not None
        return torch.zeros_like(_vector(other, None))
    return (x.to_dense() if x.is_sparse else x).double().flatten()


def _quality(products: list[Tensor]) -> Quality:
    hh, gg, hg = torch.stack(products).sum(0)
    values = torch.stack([hg / (hh * gg).sqrt(), (hh + gg - 2 * hg) / gg, (hh / gg).sqrt()])
    return Quality(*values.tolist())

"""Compositions of functions of lists of tensors, see `fgtrain.forward_ad.rules.compositions`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fgtrain._torch import FOREACH
from fgtrain.forward_ad.rules.compositions import COMPOSITIONS


def _of_each(name: str) -> Callable[..., Any] | None:
    """The function of lists of tensors that calls the function `name` with the first parts of all lists, and so on."""
    plain = name.removesuffix("_")
    of_one = _OF_ONE.get(plain) or getattr(torch, plain, None)
    if of_one is None:
        return None

    def composition(*args: Any, **kwargs: Any) -> Any:
        leaves = [*args, *kwargs.values()]
        num = next(len(x) for x in leaves if isinstance(x, (tuple, list)))
        results = []
        for i in range(num):
            parts = [x[i] if isinstance(x, (tuple, list)) else x for x in leaves]
            found = of_one(*parts[: len(args)], **dict(zip(kwargs, parts[len(args) :], strict=True)))
            results.append(parts[0].copy_(found) if name.endswith("_") else found)
        return None if name.endswith("_") else results

    return composition


_OF_ONE: dict[str, Callable[..., Any]] = {  # where its arguments are not those of torch.<name>
    "norm": torch.linalg.vector_norm,
    "copy": lambda _, source, *__: source,
    "zero": torch.zeros_like,
    "addcmul": lambda x, a, b, value=1: torch.addcmul(x, a, b, value=value),
    "addcdiv": lambda x, a, b, value=1: torch.addcdiv(x, a, b, value=value),
    "maximum": lambda x, y: torch.maximum(x, y) if isinstance(y, Tensor) else x.clamp_min(y),
    "minimum": lambda x, y: torch.minimum(x, y) if isinstance(y, Tensor) else x.clamp_max(y),
}
COMPOSITIONS.update({of_lists: made for name, of_lists in FOREACH.items() if (made := _of_each(name))})

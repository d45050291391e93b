"""The catalogue: test functions by their names, `task=function task.name=branin`."""

import difflib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fgtrain.tasks.catalogue import any_dimension, few_dimensions, plane
from fgtrain.tasks.catalogue.formula import CATALOGUE, Formula
from fgtrain.tasks.functions import Function

__all__ = ["CATALOGUE", "CataloguedFunction", "Formula", "any_dimension", "few_dimensions", "plane"]


class CataloguedFunction(Function):
    """A function of the catalogue.

    Args:
        name: its name, a key of `CATALOGUE`.
        starts: see `Function`.
        start: see `Function`.
        dim: dimension; None for the function's only one, or else 2.

    Raises:
        ValueError: the name is not in the catalogue, or the function does not exist in that dimension.

    >>> CataloguedFunction("booth").value(torch.tensor([1.0, 3.0]))
    tensor(0.)
    """

    def __init__(
        self,
        name: str,
        starts: int = 1,
        start: Literal["unit", "domain"] | Sequence[float] = "unit",
        dim: int | None = None,
    ) -> None:
        if name not in CATALOGUE:
            close = difflib.get_close_matches(name, CATALOGUE, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(sorted(CATALOGUE))}"
            raise ValueError(f"there is no test function {name}; {hint}")
        formula = CATALOGUE[name]
        if dim is not None and formula.dim not in (None, dim):
            raise ValueError(f"{name} has dimension {formula.dim}, got dim={dim}")
        super().__init__(starts, start, dim or formula.dim or 2)
        self.formula = formula
        self.domain = formula.domain
        self.minimum = formula.minimum(self.dim)
        self.name = name

    def value(self, x: Tensor) -> Tensor:
        return self.formula.value(x)

    def minima(self) -> Tensor:
        return torch.tensor(self.formula.minima(self.dim), dtype=torch.float64)

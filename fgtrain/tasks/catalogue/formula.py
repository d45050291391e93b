"""An entry of the catalogue of test functions, and the decorators that add one."""

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Formula:
    """A test function of the catalogue.

    Args:
        value: maps points (..., n) to the values (...) of f.
        domain: (low, high) of every coordinate, the box from which starting points are drawn.
        minima: maps a dimension n to the known global minima, one row of n coordinates for each.
        minimum: maps a dimension n to the value there.
        dim: the only dimension of the function, None for any dimension.
    """

    value: Callable[[Tensor], Tensor]
    domain: tuple[float, float]
    minima: Callable[[int], list[list[float]]]
    minimum: Callable[[int], float]
    dim: int | None


CATALOGUE: dict[str, Formula] = {}


def in_any_dimension(
    domain: tuple[float, float],
    at: float | Callable[[int], list[float]] = 0.0,
    minimum: float | Callable[[int], float] = 0.0,
) -> Callable[[FunctionType], FunctionType]:
    """Add a function of points (..., n) with one minimum: `at` in every coordinate, or a point computed from n."""

    def minima(n: int) -> list[list[float]]:
        return [[at] * n if isinstance(at, int | float) else at(n)]

    def lowest(n: int) -> float:
        return minimum if isinstance(minimum, int | float) else minimum(n)

    def enter(value: FunctionType) -> FunctionType:
        CATALOGUE[value.__name__] = Formula(value, domain, minima, lowest, None)
        return value

    return enter


def in_dimension(
    dim: int, domain: tuple[float, float], minima: list[list[float]], minimum: float = 0.0
) -> Callable[[FunctionType], FunctionType]:
    """Add a function of points (..., dim)."""

    def enter(value: FunctionType) -> FunctionType:
        CATALOGUE[value.__name__] = Formula(value, domain, lambda _: minima, lambda _: minimum, dim)
        return value

    return enter


def in_plane(
    domain: tuple[float, float], minima: list[list[float]], minimum: float = 0.0
) -> Callable[[FunctionType], FunctionType]:
    """Add a function of two coordinates, x (...) and y (...)."""

    def enter(value: FunctionType) -> FunctionType:
        def of_points(points: Tensor) -> Tensor:
            return value(points[..., 0], points[..., 1])

        of_points.__name__ = value.__name__
        in_dimension(2, domain, minima, minimum)(of_points)
        return value

    return enter


def numbers(x: Tensor, start: int = 1) -> Tensor:
    """The indices start, start + 1, ... of the coordinates of points (..., n), as a tensor (n,)."""
    return torch.arange(start, start + x.shape[-1], dtype=x.dtype, device=x.device)

"""Further test functions, most in any dimension: for `scripts/profiles.py`.

Formulas and minima: Surjanovic and Bingham, Virtual Library of Simulation Experiments (sfu.ca/~ssurjano).
"""

import math

import torch
from torch import Tensor

from fgtrain.tasks.functions import Function, Plane


class Booth(Plane):
    """(x + 2 y - 7)^2 + (2 x + y - 5)^2; minimum at (1, 3)."""

    domain = (-10.0, 10.0)

    def of_plane(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2

    def minima(self) -> Tensor:
        return torch.tensor([[1.0, 3.0]])


class ThreeHumpCamel(Plane):
    """2 x^2 - 1.05 x^4 + x^6 / 6 + x y + y^2; minimum at the origin, two local ones."""

    domain = (-5.0, 5.0)

    def of_plane(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * x**2 - 1.05 * x**4 + x**6 / 6 + x * y + y**2

    def minima(self) -> Tensor:
        return torch.zeros(1, 2)


class _AtOrigin(Function):
    """A function whose minimum is at the origin."""

    def minima(self) -> Tensor:
        return torch.zeros(1, self.dim)

    def numbers(self, x: Tensor) -> Tensor:
        """1, 2, ..., dim."""
        return torch.arange(1, self.dim + 1, dtype=x.dtype, device=x.device)


class SumSquares(_AtOrigin):
    """sum_i i x_i^2: condition number dim."""

    domain = (-10.0, 10.0)

    def value(self, x: Tensor) -> Tensor:
        return (self.numbers(x) * x.square()).sum(-1)


class Quartic(_AtOrigin):
    """sum_i i x_i^4: flat around its minimum."""

    domain = (-1.28, 1.28)

    def value(self, x: Tensor) -> Tensor:
        return (self.numbers(x) * x**4).sum(-1)


class Zakharov(_AtOrigin):
    """sum_i x_i^2 + s^2 + s^4 with s = sum_i i x_i / 2: steep in one direction."""

    domain = (-5.0, 10.0)

    def value(self, x: Tensor) -> Tensor:
        s = (self.numbers(x) * x).sum(-1) / 2
        return x.square().sum(-1) + s**2 + s**4


class Exponential(_AtOrigin):
    """-exp(-sum_i x_i^2 / 2): flat far from its minimum, which is -1."""

    domain = (-1.0, 1.0)
    minimum = -1.0

    def value(self, x: Tensor) -> Tensor:
        return -(-x.square().sum(-1) / 2).exp()


class Rastrigin(_AtOrigin):
    """10 dim + sum_i x_i^2 - 10 cos(2 pi x_i): a local minimum near every integer point."""

    domain = (-5.12, 5.12)

    def value(self, x: Tensor) -> Tensor:
        return 10 * self.dim + (x.square() - 10 * (2 * math.pi * x).cos()).sum(-1)


class Griewank(_AtOrigin):
    """1 + sum_i x_i^2 / 4000 - prod_i cos(x_i / sqrt(i)): shallow waves on a bowl."""

    domain = (-600.0, 600.0)

    def value(self, x: Tensor) -> Tensor:
        return 1 + x.square().sum(-1) / 4000 - (x / self.numbers(x).sqrt()).cos().prod(-1)


class DixonPrice(Function):
    """(x_1 - 1)^2 + sum_{i>1} i (2 x_i^2 - x_{i-1})^2; minimum at x_i = 2^(2^(1-i) - 1), x_dim of either sign."""

    domain = (-10.0, 10.0)

    def value(self, x: Tensor) -> Tensor:
        i = torch.arange(2, self.dim + 1, dtype=x.dtype, device=x.device)
        return (x[..., 0] - 1) ** 2 + (i * (2 * x[..., 1:] ** 2 - x[..., :-1]) ** 2).sum(-1)

    def minima(self) -> Tensor:
        point = torch.tensor([2.0 ** (2.0 ** (1 - i) - 1) for i in range(1, self.dim + 1)], dtype=torch.float64)
        other = point.clone()
        other[-1].neg_()
        return torch.stack([point, other])


class Levy(Function):
    """A wavy bowl; minimum at (1, ..., 1)."""

    domain = (-10.0, 10.0)

    def value(self, x: Tensor) -> Tensor:
        w = 1 + (x - 1) / 4
        head, last = w[..., :-1], w[..., -1]
        middle = ((head - 1) ** 2 * (1 + 10 * (math.pi * head + 1).sin() ** 2)).sum(-1)
        return (math.pi * w[..., 0]).sin() ** 2 + middle + (last - 1) ** 2 * (1 + (2 * math.pi * last).sin() ** 2)

    def minima(self) -> Tensor:
        return torch.ones(1, self.dim)

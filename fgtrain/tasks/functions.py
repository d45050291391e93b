"""Test functions of optimization, with their starting points and known minima.

Formulas and minima: Surjanovic and Bingham, Virtual Library of Simulation Experiments (sfu.ca/~ssurjano); Beale 1958;
Rosenbrock 1960; Himmelblau 1972; Styblinski and Tang 1990. All minima have the value 0 unless said otherwise.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fgtrain.tasks.base import Task

DIVERGED = 1e15
"""A start whose value is above this has diverged: in float32, the square of its gradient would soon overflow."""


class Function(Task):
    """Minimise f(x) over x in R^dim, from one or many starting points in one batch.

    The model is a `Points` (starts, dim). The objective is the *sum* over the starting points, so that each point has
    the same gradient, and hence the same path, as in a separate run. Of several starts, those that have diverged stay
    where they are: they are left out of the loss and of the other metrics, and `diverged_starts` is their share.

    Args:
        starts: number N of starting points.
        start: "unit", uniform in [0, 1)^dim; "domain", uniform in the function's domain; or one point, the same for
            every start.
        dim: dimension.

    Attributes:
        name: its name in tables and figures.
        domain: (low, high) of every coordinate, the box in which the function is usually studied.
        minimum: smallest value.
    """

    domain: tuple[float, float]
    minimum: float = 0.0

    def __init__(
        self, starts: int = 1, start: Literal["unit", "domain"] | Sequence[float] = "unit", dim: int = 2
    ) -> None:
        if starts < 1:
            raise ValueError(f"starts must be at least 1, got {starts}")
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim}")
        if not isinstance(start, str) and len(start) != dim:
            raise ValueError(f"start must have {dim} coordinates, got {list(start)}")
        self.name = type(self).__name__
        self.starts = starts
        self.start = start
        self.dim = dim

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """The values (...) of f at points (..., dim)."""

    @abstractmethod
    def minima(self) -> Tensor:
        """The known global minima, (M, dim)."""

    def starting_points(self) -> Tensor:
        """(starts, dim), drawn from the global random state unless the start is given."""
        if not isinstance(self.start, str):
            return torch.tensor([list(self.start)], dtype=torch.get_default_dtype()).repeat(self.starts, 1)
        points = torch.rand(self.starts, self.dim)
        low, high = self.domain
        return points if self.start == "unit" else low + (high - low) * points

    def distance_to_minimum(self, x: Tensor) -> Tensor:
        """Euclidean distance of points (N, dim) to the nearest global minimum, (N,)."""
        return torch.cdist(x.double(), self.minima().to(x.device, torch.float64)).amin(1)

    def converging(self, points: Tensor) -> Tensor:
        """Which of the points (N, dim) have not diverged, (N,); all of them if none is left, so that the run ends."""
        sound = self.value(points.detach()) <= DIVERGED
        return sound | ~sound.any()

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        points = model()
        if self.starts == 1:
            return self.value(points)
        left = self.converging(points)
        low, high = self.domain
        inside = torch.where(left[:, None], points, low + (high - low) / 4)  # has a finite gradient, to multiply by 0
        return self.starts * torch.where(left, self.value(inside), 0.0)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        points = model()
        left = self.converging(points)
        found = {"loss": self.value(points)[left], "distance_to_minimum": self.distance_to_minimum(points[left])}
        return found if self.starts == 1 else found | {"diverged_starts": (~left).float()}

    def results(self, model: nn.Module) -> dict[str, Any]:
        """Value, distance to the minimum and coordinates of the best point, and the share of starts that diverged."""
        with torch.no_grad():
            points, metrics = model(), self.metrics(model, None)
            best = int(metrics["loss"].nan_to_num(torch.inf).argmin())
            solution = points[self.converging(points)][best].tolist()
        found = {name: metrics[name][best].item() for name in ("loss", "distance_to_minimum")}
        if "diverged_starts" in metrics:
            found["diverged_starts"] = metrics["diverged_starts"].mean().item()
        return {"metrics": found, "solution": solution}


class Points(nn.Module):
    """The current points of a minimisation: one parameter (starts, dim)."""

    def __init__(self, task: Function) -> None:
        super().__init__()
        self.points = nn.Parameter(task.starting_points())

    def forward(self) -> Tensor:
        return self.points


class Plane(Function):
    """A function of two variables."""

    def __init__(self, starts: int = 1, start: Literal["unit", "domain"] | Sequence[float] = "unit") -> None:
        super().__init__(starts, start, dim=2)

    def value(self, x: Tensor) -> Tensor:
        return self.of_plane(x[..., 0], x[..., 1])

    @abstractmethod
    def of_plane(self, x: Tensor, y: Tensor) -> Tensor:
        """f(x, y)."""


class Beale(Plane):
    """(1.5 - x + x y)^2 + (2.25 - x + x y^2)^2 + (2.625 - x + x y^3)^2; minimum at (3, 0.5).

    >>> Beale().value(torch.tensor([3.0, 0.5]))
    tensor(0.)
    """

    domain = (-4.5, 4.5)

    def of_plane(self, x: Tensor, y: Tensor) -> Tensor:
        return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2

    def minima(self) -> Tensor:
        return torch.tensor([[3.0, 0.5]])


class Himmelblau(Plane):
    """(x^2 + y - 11)^2 + (x + y^2 - 7)^2; four minima."""

    domain = (-5.0, 5.0)

    def of_plane(self, x: Tensor, y: Tensor) -> Tensor:
        return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2

    def minima(self) -> Tensor:
        return torch.tensor(
            [
                [3.0, 2.0],
                [-2.805118086952745, 3.131312518250573],
                [-3.779310253377747, -3.283185991286170],
                [3.584428340330492, -1.848126526964404],
            ]
        )


class Matyas(Plane):
    """0.26 (x^2 + y^2) - 0.48 x y; minimum at the origin."""

    domain = (-10.0, 10.0)

    def of_plane(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.26 * (x**2 + y**2) - 0.48 * x * y

    def minima(self) -> Tensor:
        return torch.zeros(1, 2)


class Rosenbrock(Function):
    """sum_i 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2 in any dimension; minimum at (1, ..., 1)."""

    domain = (-2.048, 2.048)

    def value(self, x: Tensor) -> Tensor:
        head, tail = x[..., :-1], x[..., 1:]
        return (100 * (tail - head**2) ** 2 + (1 - head) ** 2).sum(-1)

    def minima(self) -> Tensor:
        return torch.ones(1, self.dim)


class StyblinskiTang(Function):
    """sum_i (x_i^4 - 16 x_i^2 + 5 x_i) / 2 in any dimension; minimum -39.16617 dim at (-2.903534, ...)."""

    domain = (-5.0, 5.0)

    def __init__(
        self, starts: int = 1, start: Literal["unit", "domain"] | Sequence[float] = "unit", dim: int = 2
    ) -> None:
        super().__init__(starts, start, dim)
        self.minimum = -39.16616570377142 * dim

    def value(self, x: Tensor) -> Tensor:
        return (x**4 - 16 * x**2 + 5 * x).sum(-1) / 2

    def minima(self) -> Tensor:
        return torch.full((1, self.dim), -2.903534027771178)


class Sphere(Function):
    """sum_i x_i^2 in any dimension; minimum at the origin."""

    domain = (-5.12, 5.12)

    def value(self, x: Tensor) -> Tensor:
        return x.square().sum(-1)

    def minima(self) -> Tensor:
        return torch.zeros(1, self.dim)

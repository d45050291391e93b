"""Forward mode over long chains of small operations, in forward passes, beside PyTorch's own `vmap(jvp)`."""

from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.func import jvp as torch_jvp

from fgtrain.forward_ad import directional_derivatives
from fgtrain.studies.timing import cpu_seconds
from fgtrain.tasks.simulators import lotka_volterra


class Chain(nn.Module):
    """A state of `width` numbers that a step changes many times; `forward` returns the mean of its squares.

    Args:
        values: the parameters, one vector (n,) or a matrix.
        run: the chain, from the parameter and the width.
        width: the number of numbers in an operation.
    """

    def __init__(self, values: Tensor, run: Callable[[Tensor, int], Tensor], width: int) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.run = run
        self.width = width

    def forward(self) -> Tensor:
        return self.run(self.values, self.width).square().mean()


def _lotka_volterra(values: Tensor, width: int) -> Tensor:
    names = ("birth", "predation", "growth", "death")
    times = torch.tensor([0.0, 0.1])
    return lotka_volterra(width, times, 20, **dict(zip(names, values.unbind(), strict=True)))[-1]


def _elementwise(values: Tensor, width: int) -> Tensor:
    x = torch.linspace(-1, 1, width)
    a, b, c, d = values.unbind()
    for _ in range(50):
        x = (a * x).sin() + b * x.tanh() - c / (1 + x * x) + (x - d) ** 2 * 0.1
    return x


def _products(values: Tensor, width: int) -> Tensor:
    x = torch.linspace(-1, 1, 2 * width).view(2, width)
    for _ in range(100):
        x = x + 0.1 * (values @ x).tanh()
    return x


CASES: dict[str, tuple[Callable[[Tensor, int], Tensor], Tensor]] = {
    "scalar parameters (Lotka-Volterra, RK4)": (_lotka_volterra, torch.tensor([1.1, 0.4, 0.1, 0.4])),
    "elementwise functions": (_elementwise, torch.tensor([1.1, 0.4, 0.1, 0.4])),
    "products with a 2 x 2 matrix": (_products, torch.tensor([[0.1, 1.0], [-1.0, 0.1]])),
}
"""{name: the chain and its four parameters}."""


class ChainCost(NamedTuple):
    """The cost of four directional derivatives.

    Args:
        case: a key of `CASES`.
        width: the number of numbers in an operation.
        forward_ms: the time of one forward pass without gradients.
        ours: fgtrain's time, in forward passes.
        vmap_jvp: the time of torch.func.vmap(jvp), in forward passes.
    """

    case: str
    width: int
    forward_ms: float
    ours: float
    vmap_jvp: float


def measure_chains(widths: list[int], rounds: int = 9) -> Iterator[list[ChainCost]]:
    """The costs of one case after another with operations of these widths.

    A round measures all three ways in turn, in CPU time.
    """
    return ([_cost(name, width, rounds) for width in widths] for name in CASES)


def _cost(name: str, width: int, rounds: int) -> ChainCost:
    run, values = CASES[name]
    chain = Chain(values.clone(), run, width)
    units = torch.eye(4).view(4, *values.shape)

    def plain() -> None:
        with torch.no_grad():
            chain()

    def ours() -> None:
        directional_derivatives(chain, lambda m: m(), {"values": units})

    def theirs() -> None:
        start = chain.values.detach()
        vmap(lambda v: torch_jvp(lambda p: functional_call(chain, {"values": p}, ()), (start,), (v,))[1])(units)

    runs = (plain, ours, theirs)
    for each in runs:
        each()
    taken = [[cpu_seconds(each) for each in runs] for _ in range(rounds)]
    forward, fast, slow = (median(column) for column in zip(*taken, strict=True))
    return ChainCost(name, width, 1e3 * forward, fast / forward, slow / forward)


def chains_table(rows: list[ChainCost]) -> Table:
    """A printable table of the rows."""
    title = f"four derivatives along chains of small operations, in forward passes, threads: {torch.get_num_threads()}"
    grid = Table(title=title, box=SIMPLE_HEAD)
    grid.add_column("chain", no_wrap=True)
    for heading in ("width", "forward ms", "fgtrain", "vmap(jvp)"):
        grid.add_column(heading, justify="right")
    for row in rows:
        costs = (f"{row.forward_ms:.1f}", f"{row.ours:.1f}", f"{row.vmap_jvp:.1f}")
        grid.add_row(row.case, str(row.width), *costs)
    return grid

"""Step time against the number of ranks, for backprop and forward gradients, over a given link.

Compute is measured on this machine. Communication is modelled by ring algorithms. Over a link of B bytes a second and a
latency of L seconds, R ranks

    all-reduce m bytes           in 2 (R - 1) / R m / B + 2 (R - 1) L,
    all-gather m bytes in all    in   (R - 1) / R m / B +   (R - 1) L, and reduce-scatter alike.

The model favours backprop: DDP and FSDP hide their communication behind the whole backward pass, two thirds of the
step. Forward gradients hide nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fgtrain.estimators import ForwardGradient
from fgtrain.random import keyed_generator
from fgtrain.studies.benchmarks.methods import methods_of
from fgtrain.studies.benchmarks.steps import make_problem, measure
from fgtrain.studies.timing import synchronize
from fgtrain.tangents import LowRank

BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Link:
    """The link between the ranks.

    Args:
        bandwidth: bytes per second, one way.
        latency: seconds.
    """

    bandwidth: float
    latency: float

    def all_reduce(self, num_bytes: float, ranks: int) -> float:
        """Seconds of an all-reduce."""
        return 2 * self.all_gather(num_bytes, ranks)

    def all_gather(self, num_bytes: float, ranks: int) -> float:
        """Seconds of an all-gather of `num_bytes` from all ranks together."""
        return (ranks - 1) / ranks * num_bytes / self.bandwidth + (ranks - 1) * self.latency


@dataclass(frozen=True)
class Compute:
    """A model's step on one rank, without communication.

    Args:
        model: the model's name.
        num_params: n.
        num_tangents: K, the number of tangents, which are rank-1 signs.
        backprop: seconds of a step.
        forward_gradient: seconds of a step with K directions.
        replay: seconds to rebuild another rank's K directions.
        relative_squared_error: that of the forward gradient with K directions.
        bytes_per_number: 4 in single precision.
    """

    model: str
    num_params: int
    num_tangents: int
    backprop: float
    forward_gradient: float
    replay: float
    relative_squared_error: float
    bytes_per_number: int = 4

    @property
    def model_bytes(self) -> int:
        """Bytes of the parameters, and of their gradient."""
        return self.num_params * self.bytes_per_number


def step_seconds(compute: Compute, link: Link, ranks: int) -> dict[str, float]:
    """Seconds of a step on `ranks` ranks, each with its own batch: {method: seconds}."""
    ahead, behind = (1 - BACKWARD_SHARE) * compute.backprop, BACKWARD_SHARE * compute.backprop
    gather = link.all_gather(compute.model_bytes, ranks)
    floats = compute.num_tangents * compute.bytes_per_number
    others = (ranks - 1) * compute.replay
    return {
        "backprop ddp": ahead + max(behind, 2 * gather),
        "backprop fsdp": max(ahead, gather) + max(behind, 2 * gather),
        "backprop, one bucket": compute.backprop + 2 * gather,
        "fwdgrad shared": compute.forward_gradient + link.all_reduce(floats, ranks),
        "fwdgrad per_rank": compute.forward_gradient + others + link.all_gather(floats * ranks, ranks),
        "fwdgrad fsdp2": max(compute.forward_gradient, gather) + link.all_reduce(floats, ranks),
    }


def seconds_per_progress(compute: Compute, link: Link, ranks: int) -> dict[str, float]:
    """Step time divided by the progress of a step, in units of a step along the exact gradient.

    With the best learning rate, a step along an unbiased estimate of relative squared error e decreases a smooth loss
    by 1 / (1 + e) times the decrease along the gradient. With per_rank tangents, e is R times smaller.
    """
    error = compute.relative_squared_error
    worth = {"fwdgrad shared": 1 + error, "fwdgrad per_rank": 1 + error / ranks, "fwdgrad fsdp2": 1 + error}
    return {name: seconds * worth.get(name, 1) for name, seconds in step_seconds(compute, link, ranks).items()}


def winning_bandwidth(compute: Compute, ranks: int, latency: float, *, progress: bool = False) -> float:
    """Bytes per second below which `fwdgrad shared` takes less time than `backprop ddp`, per step or per progress.

    0 if it never does, infinity if it always does.
    """
    times = seconds_per_progress if progress else step_seconds

    def wins(bandwidth: float) -> bool:
        found = times(compute, Link(bandwidth, latency), ranks)
        return found["fwdgrad shared"] < found["backprop ddp"]

    low, high = 1.0, 1e15
    if not wins(low):
        return 0.0
    if wins(high):
        return float("inf")
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if wins(middle) else (low, middle)
    return low


def measure_compute(model: str, batch_size: int, num_tangents: int, device: torch.device, rounds: int = 9) -> Compute:
    """Measure a model's steps on this machine."""
    methods = methods_of(["fwdgrad"], ["low_rank"], [num_tangents])
    rows = {row.method: row for row in measure(model, batch_size, methods, device, rounds=rounds)}
    network = make_problem(model, 2, device).model
    params = dict(network.named_parameters())
    estimator = ForwardGradient(LowRank(), num_tangents)
    derivatives = torch.ones(num_tangents, device=device)
    seconds = []
    for i in range(rounds + 1):
        start = perf_counter()
        estimator.replay(network, derivatives, keyed_generator(i))
        synchronize(device)
        seconds.append(perf_counter() - start)
    return Compute(
        model,
        sum(p.numel() for p in params.values()),
        num_tangents,
        rows["backprop"].step_ms / 1e3,
        rows["fwdgrad"].step_ms / 1e3,
        median(seconds[1:]),
        LowRank().relative_variance({name: torch.ones_like(p) for name, p in params.items()}) / num_tangents,
    )


def rows_of(computes: Sequence[Compute], ranks: Sequence[int], links: Sequence[Link]) -> list[dict[str, Any]]:
    """One row for every model, link and number of ranks."""
    return [
        {
            "model": compute.model,
            "num_params": compute.num_params,
            "num_tangents": compute.num_tangents,
            "bandwidth": link.bandwidth,
            "latency": link.latency,
            "ranks": size,
            "step_seconds": step_seconds(compute, link, size),
            "seconds_per_progress": seconds_per_progress(compute, link, size),
            "wins_below": winning_bandwidth(compute, size, link.latency),
            "wins_below_per_progress": winning_bandwidth(compute, size, link.latency, progress=True),
        }
        for compute in computes
        for link in links
        for size in ranks
    ]


def scaling_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """A printable table of the rows."""
    grid = Table(title=title, box=SIMPLE_HEAD)
    for heading in ("model", "params", "K", "Gbit/s", "ranks"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for heading in rows[0]["step_seconds"]:
        grid.add_column(heading, justify="right")
    grid.add_column("shared wins below", justify="right")
    grid.add_column("and per progress", justify="right")
    for row in rows:
        place = (row["model"], f"{row['num_params']:,}", str(row["num_tangents"]))
        times = [f"{1e3 * seconds:.3g}" for seconds in row["step_seconds"].values()]
        wins = [_gbit(row[key]) for key in ("wins_below", "wins_below_per_progress")]
        grid.add_row(*place, f"{8 * row['bandwidth'] / 1e9:g}", str(row["ranks"]), *times, *wins)
    return grid


def _gbit(bandwidth: float) -> str:
    if bandwidth == float("inf"):
        return "always"
    return f"{8 * bandwidth / 1e9:.3g} Gbit/s" if bandwidth else "never"

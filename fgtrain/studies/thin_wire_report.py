"""The report of training over a thin wire: tables, crossover rates and the figure."""

import json
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from fgtrain.figures import house_style, looks, save
from fgtrain.lightning.atomic_files import write_atomically
from fgtrain.studies.compare.table import markdown_table
from fgtrain.studies.thin_wire import Measured, Problem

FORWARD = ("fwdgrad_lowrank", "gauss_newton")
"""The methods that send K numbers, and not a gradient."""


def write_report(measured: Sequence[Measured], problems: dict[str, Problem], folder: Path) -> str:
    """Write thin_wire.md, .json, .png and .svg, and return the tables and sentences in Markdown."""
    lines = [f"Two ranks on {os.cpu_count()} cores; load average {os.getloadavg()[0]:.1f} at the end."]
    for data in dict.fromkeys(m.data for m in measured):
        own = [m for m in measured if m.data == data]
        lines += ["", f"{data}, at most {problems[data].seconds:g} seconds of training for each run:", ""]
        lines += markdown_table(_headings(own, problems[data]), rows_of(own, problems[data]))
        lines += ["", *(f"- {sentence}" for sentence in crossings(own, problems[data]))]
    page = "\n".join(lines) + "\n"
    write_atomically(page, folder / "thin_wire.md")
    write_atomically(json.dumps([m._asdict() for m in measured], indent=1) + "\n", folder / "thin_wire.json")
    save(draw(measured, problems), folder / "thin_wire")
    return page


def _headings(measured: Sequence[Measured], problem: Problem) -> tuple[str, ...]:
    """The headings of `rows_of`."""
    times = [f"s to {target:.0%}, {mbit:g} Mbit/s" for target in problem.targets for mbit in _rates_of(measured)]
    return ("method", *times, "best accuracy", "CPU ms/step", "B/step counted", "B/step on the wire")


def rows_of(measured: Sequence[Measured], problem: Problem) -> list[tuple[str, ...]]:
    """One row for each method, from the runs on one data set."""
    rows = []
    for method in dict.fromkeys(m.method for m in measured):
        own = {m.mbit: m for m in measured if m.method == method}
        found = [
            own[r].seconds_to(target) if r in own else None for target in problem.targets for r in _rates_of(measured)
        ]
        times = ["-" if seconds is None else f"{seconds:.1f}" for seconds in found]
        cpu = fmean(m.cpu_ms for m in own.values())
        sizes = (fmean(m.bytes_counted for m in own.values()), fmean(m.bytes_on_wire for m in own.values()))
        best = max(m.best for m in own.values())
        rows.append((method, *times, f"{best:.1%}", f"{cpu:.1f}", *(f"{size:,.0f}" for size in sizes)))
    return rows


def _rates_of(measured: Sequence[Measured]) -> list[float]:
    """The rates of the links in Mbit/s, rising."""
    return sorted({m.mbit for m in measured})


def crossings(measured: Sequence[Measured], problem: Problem) -> list[str]:
    """A sentence for each target and each forward method: where it is sooner than which form of backpropagation."""
    sentences = []
    for target in problem.targets:
        for method in dict.fromkeys(m.method for m in measured if m.method in FORWARD):
            own = [m for m in measured if m.method == method]
            if all(m.seconds_to(target) is None for m in own):
                best = max(m.best for m in own)
                sentences.append(f"`{method}` does not reach {target:.0%} in the budget; its best is {best:.1%}.")
                continue
            for rival in dict.fromkeys(m.method for m in measured if m.method not in FORWARD):
                others = [m for m in measured if m.method == rival]
                sentences.append(f"`{method}` to {target:.0%} against {rival}: {_against(own, others, target)}.")
    return sentences


def _against(own: Sequence[Measured], others: Sequence[Measured], target: float) -> str:
    """Its seconds over the rival's at every rate, and the rate at which they are equal."""
    ratios = {}
    for mine, other in ((m, o) for m in own for o in others if m.mbit == o.mbit):
        seconds, rivals = (math.inf if t is None else t for t in (mine.seconds_to(target), other.seconds_to(target)))
        ratios[mine.mbit] = math.nan if math.isinf(seconds) and math.isinf(rivals) else seconds / rivals
    shown = ", ".join(f"{ratio:.2g}" for _, ratio in sorted(ratios.items()))
    links = ", ".join(f"{rate:g}" for rate in sorted(ratios))
    text = f"{shown} times its seconds at {links} Mbit/s"
    rate = crossover(ratios)
    if rate is not None:
        return f"{text}, equal at about {rate:.2g} Mbit/s"
    return f"{text}, later at every one" if all(ratio > 1 for ratio in ratios.values()) else text


def crossover(ratios: dict[float, float]) -> float | None:
    """The rate at which a ratio of seconds rises through 1, on straight lines between logarithms; None if it does not.

    Args:
        ratios: {rate: seconds of one method over those of another}.

    >>> crossover({1.0: 0.1, 100.0: 10.0})
    10.0
    """
    points = sorted((rate, ratio) for rate, ratio in ratios.items() if 0 < ratio < math.inf)
    for (low, a), (high, b) in pairwise(points):
        if a <= 1 < b:
            share = -math.log(a) / (math.log(b) - math.log(a))
            return round(math.exp(math.log(low) + share * (math.log(high) - math.log(low))), 9)
    return None


@house_style
def draw(measured: Sequence[Measured], problems: dict[str, Problem]) -> Figure:
    """Seconds to each target against the rate of the link; a cross at the budget if a run did not reach it."""
    panels = [(data, t) for data in dict.fromkeys(m.data for m in measured) for t in problems[data].targets]
    figure = Figure(figsize=(2.5 * max(2, len(panels)), 3.4), layout="constrained")
    of_methods = looks(dict.fromkeys(m.method for m in measured))
    for axes, (data, target) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for method, (colour, dashes) in of_methods.items():
            own = sorted((m for m in measured if (m.data, m.method) == (data, method)), key=lambda m: m.mbit)
            reached = [(m.mbit, m.seconds_to(target)) for m in own]
            times = [(mbit, seconds) for mbit, seconds in reached if seconds is not None]
            if times:
                axes.plot(
                    *zip(*times, strict=True), color=colour, linestyle=dashes, marker="o", markersize=3, label=method
                )
            missed = [mbit for mbit, seconds in reached if seconds is None]
            axes.plot(missed, [problems[data].seconds] * len(missed), "x", color=colour, markersize=5)
        axes.set(xscale="log", yscale="log", title=f"{data}, {target:.0%}", xlabel="link in Mbit/s")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds of training")
    handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return figure

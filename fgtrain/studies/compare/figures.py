"""The figures of a comparison."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fgtrain.figures import house_style, looks
from fgtrain.studies.compare.finished import CURVES, TRAINED, Finished
from fgtrain.studies.compare.plan import Comparison

Curve = Callable[[Finished], list[tuple[float, float]]]


@house_style
def curves(plan: Comparison, runs: Sequence[Finished]) -> Figure:
    """Loss, and error rate if there is an accuracy, against steps and against training time."""
    tags = [tag for tag in CURVES if any(tag in run.curves for run in runs)] or [TRAINED]
    figure = Figure(figsize=(10, 3.2 * len(tags)), layout="constrained")
    axes = figure.subplots(len(tags), 2, squeeze=False)
    for row, tag in zip(axes, tags, strict=True):

        def by_step(run: Finished, tag: str = tag) -> list[tuple[float, float]]:
            return [(step, 1 - v if tag == "val/acc" else v) for step, v in run.curves.get(tag, [])]

        def by_time(run: Finished, by_step: Curve = by_step) -> list[tuple[float, float]]:
            return [(run.seconds_at(int(step)), v) for step, v in by_step(run)]

        for axis, label, points in ((row[0], "steps", by_step), (row[1], "training time, s", by_time)):
            _bands(axis, plan, runs, points)
            axis.set(xlabel=label, ylabel="1 - val/acc" if tag == "val/acc" else tag, yscale="log")
    _legend(figure, axes[0][0])
    return figure


@house_style
def cosine(plan: Comparison, runs: Sequence[Finished]) -> Figure:
    """A figure of the mean cosine between estimates and exact gradient, over the layers that a method estimates."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    _bands(axis, plan, runs, lambda run: list(run.cosine()))
    axis.set(xlabel="steps", ylabel="mean cosine to the exact gradient\n(layers that are estimated)")
    axis.axhline(0, color="grey", linewidth=0.8)
    _legend(figure, axis)
    return figure


def _bands(axis: Any, plan: Comparison, runs: Sequence[Finished], points: Curve) -> None:
    """Draw each method's mean over seeds and their range."""
    for method, (colour, dashes) in looks(plan.methods).items():
        found = [np.array(points(run)) for run in runs if run.method == method and points(run) and not run.diverged]
        if not found:
            continue
        shortest = min(len(curve) for curve in found)
        together = np.stack([curve[:shortest] for curve in found])
        x, values = together[..., 0].mean(0), together[..., 1]
        axis.plot(x, values.mean(0), label=method, color=colour, linestyle=dashes)
        axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def _legend(figure: Figure, axis: Any) -> None:
    """Draw a legend beside the axes, unless every run diverged and there is no line."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper")

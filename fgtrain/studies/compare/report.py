"""The report of a comparison: one table in three formats, and figures."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from fgtrain.figures import house_style, look, save
from fgtrain.studies.compare.plan import Comparison
from fgtrain.studies.compare.runs import CURVES, POINTS, TRAINED, Finished, Outcome, device_name
from fgtrain.studies.compare.trajectories import trajectories

Curve = Callable[[Finished], list[tuple[float, float]]]


def rows_of(plan: Comparison, outcome: Outcome) -> list[dict[str, Any]]:
    """One row per method, with unformatted numbers; None for all of them if the method was refused."""
    rows = [_row_of(plan, outcome, method) for method in plan.methods if method not in outcome.refused]
    numbers = {name: None for name in rows[0] if not name.startswith("with_")}
    for place, method in enumerate(plan.methods):
        if method in outcome.refused:
            rows.insert(place, rows[0] | numbers | {"method": method, "refused": outcome.refused[method]})
    return rows


def _row_of(plan: Comparison, outcome: Outcome, method: str) -> dict[str, Any]:
    reference = outcome.costs["backprop"]
    started = [run for run in outcome.runs if run.method == method]
    runs = [run for run in started if not run.diverged]
    cost = outcome.costs[method]
    reached = [seconds for run in runs if (seconds := seconds_to_target(plan, run)) is not None]
    row: dict[str, Any] = {"method": method, "lr": outcome.lrs[method], "runs": len(started)}
    row["with_accuracy"] = any({"val/acc", "test/acc"} & run.results["metrics"].keys() for run in outcome.runs)
    row["with_validation"] = is_validated(outcome.runs)
    row["diverged"] = len(started) - len(runs)
    for name, keys in (("accuracy", ["test/acc"]), ("loss", ["test/loss", "loss"])):
        row |= _mean_and_deviation(name, [run.results["metrics"].get(k) for run in runs for k in keys])
    row["steps"] = runs[0].results["steps"] if runs else 0
    row["seconds"] = fmean(run.results["train_seconds"] for run in runs) if runs else 0.0
    row |= {"reached_target": len(reached), "seconds_to_target": median(reached) if reached else None}
    row["step_ms"] = cost.milliseconds
    row["step_time_to_backprop"] = cost.milliseconds / reference.milliseconds
    row["peak_mib"] = cost.peak_mib
    row["peak_memory_to_backprop"] = cost.peak_mib / reference.peak_mib
    return row | {"bytes_per_step": cost.bytes_sent, "refused": None}


def is_validated(runs: Sequence[Finished]) -> bool:
    """Whether there was validation data; runs that diverged at once never reached it."""
    return all(run.diverged for run in runs) or any(tag in run.curves for run in runs for tag in CURVES)


def _mean_and_deviation(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    found = [value for value in values if value is not None]
    return {
        f"{name}_mean": fmean(found) if found else None,
        f"{name}_std": stdev(found) if len(found) > 1 else 0.0 if found else None,
    }


def seconds_to_target(plan: Comparison, run: Finished) -> float | None:
    """Training time at which the target was first reached; None if never."""
    target = target_of(plan, run)
    accuracy = run.curves.get("val/acc", [])
    hits = [step for step, value in accuracy if value >= target]
    if not accuracy:
        hits = [step for step, value in run.curves.get("val/loss", []) if value <= target]
    return run.seconds_at(min(hits)) if hits else None


def target_of(plan: Comparison, run: Finished) -> float:
    """The plan's target, or by default 90 % accuracy or a value of 0.1."""
    if plan.target is not None:
        return plan.target
    return 0.9 if "val/acc" in run.curves else 0.1


def statement(plan: Comparison, outcome: Outcome, command: str) -> list[str]:
    """The conditions of the comparison, in sentences."""
    run = outcome.runs[0]
    named = {key: run.results[key] for key in ("task", "data", "model")}
    lines = [f"`{command}`", "", ", ".join(f"{key} {value}" for key, value in named.items()) + f"; {device_name()}."]
    lines += [f"Seeds 0 to {plan.seeds - 1}; for each seed all methods start from the same parameters and see the same"]
    lines[-1] += " batches in the same order."
    if plan.in_seconds:
        lines += [f"Budget: {plan.amount:g} s of training, converted to steps by a trial run of each method."]
    else:
        lines += [f"Budget: {int(plan.amount)} steps for every method."]
    if plan.lr == "yaml":
        lines += ["Learning rates: those of conf/method; none was chosen for this comparison."]
    else:
        lines += [
            f"Learning rates: for every method the best of {plan.lr_points} around that of conf/method, a factor of"
        ]
        lines[-1] += (
            " sqrt(10) apart, by the final validation loss of one run each with another seed and the same budget."
        )
    metric = "validation accuracy" if "val/acc" in run.curves else "value"
    if is_validated(outcome.runs):
        lines += [f"Target: {metric} {target_of(plan, run):g}."]
    else:
        lines += [
            "There is no validation split, so the table has no time to a target and the curves show the training loss."
        ]
    done = [r for r in outcome.runs if not r.diverged]
    if done and not any({"test/loss", "loss"} & r.results["metrics"].keys() for r in done):
        lines += ["There is no test split, so the table has no final accuracy or loss."]
    lines[-1] += " Step time, memory and traffic are of one gradient and update."
    lines += [
        f"Times are of training and include {POINTS} validations, if any, and comparisons with the exact gradient.",
    ]
    lines += [f"{method} is refused: {reason}." for method, reason in outcome.refused.items()]
    diverged = Counter(run.method for run in outcome.runs if run.diverged)
    lines += [
        f"{method}: {n} of {plan.seeds} runs diverged and are not in the means." for method, n in diverged.items()
    ]
    return lines


def cells(row: dict[str, Any]) -> dict[str, str]:
    """{column: text} of a row; columns without text may be left out."""

    def spread(name: str, scale: float, digits: str) -> str:
        mean, deviation = row[f"{name}_mean"], row[f"{name}_std"]
        return "" if mean is None else f"{scale * mean:{digits}} ± {scale * deviation:{digits}}"

    if row["refused"] is not None:
        return {"method": row["method"], "loss": "refused"}
    reached = row["seconds_to_target"]
    shown = {"method": row["method"], "lr": f"{row['lr']:g}"}
    if row["with_accuracy"]:
        shown["accuracy, %"] = spread("accuracy", 100, ".1f")
    return shown | {
        "loss": spread("loss", 1, ".3g"),
        "steps": str(row["steps"]),
        "time, s": f"{row['seconds']:.1f}",
        "to target, s": ""
        if not row["with_validation"]
        else "never"
        if reached is None
        else f"{reached:.1f} ({row['reached_target']}/{row['runs']})",
        "step time": f"{row['step_time_to_backprop']:.2f}x",
        "peak memory": f"{row['peak_memory_to_backprop']:.2f}x",
        "traffic": f"{row['bytes_per_step']} B/step",
    }


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """The table for the terminal."""
    table, shown = Table(), [cells(row) for row in rows]
    names = max(shown, key=len)
    for name in names:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in shown:
        table.add_row(*(row.get(name, "") for name in names))
    return table


def write_report(plan: Comparison, outcome: Outcome, command: str) -> list[dict[str, Any]]:
    """Write table.md, table.json, table.csv and the figures into the comparison's folder; returns the rows."""
    rows, folder = rows_of(plan, outcome), plan.folder
    shown = [cells(row) for row in rows]
    names = max(shown, key=len)
    markdown = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    markdown += ["| " + " | ".join(row.get(name, "") for name in names) + " |" for row in shown]
    said = statement(plan, outcome, command)
    (folder / "table.md").write_text("\n".join([*said, "", *markdown, ""]))
    tried = {m: [{"lr": lr, "val/loss": loss} for lr, loss in found.items()] for m, found in outcome.tried.items()}
    report = {"statement": said, "rows": rows, "learning_rates_tried": tried}
    (folder / "table.json").write_text(json.dumps(report, indent=2) + "\n")
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(plan, outcome, folder)
    return rows


def draw(plan: Comparison, outcome: Outcome, folder: Path) -> None:
    """Write curves, cosine and, of a test function, trajectories as .png and .svg, and all of them to TensorBoard."""
    drawn = {"curves": curves(plan, outcome.runs), "cosine": cosine(plan, outcome.runs)}
    if (paths := trajectories(plan, outcome.lrs)) is not None:
        drawn["trajectories"] = paths
    with SummaryWriter(str(folder / "summary")) as writer:
        for name, figure in drawn.items():
            save(figure, folder / name)
            writer.add_figure(name, figure)


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
    """A figure of the cosine between the estimates and the exact gradient."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    _bands(axis, plan, runs, lambda run: list(run.curves.get("quality/cosine", [])))
    axis.set(xlabel="steps", ylabel="cosine to the exact gradient")
    axis.axhline(0, color="grey", linewidth=0.8)
    _legend(figure, axis)
    return figure


def _bands(axis: Any, plan: Comparison, runs: Sequence[Finished], points: Curve) -> None:
    """Draw each method's mean over seeds and their range."""
    for method in plan.methods:
        found = [np.array(points(run)) for run in runs if run.method == method and points(run) and not run.diverged]
        if not found:
            continue
        shortest = min(len(curve) for curve in found)
        together = np.stack([curve[:shortest] for curve in found])
        x, values = together[..., 0].mean(0), together[..., 1]
        colour, dashes = look(method)
        axis.plot(x, values.mean(0), label=method, color=colour, linestyle=dashes)
        axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def _legend(figure: Figure, axis: Any) -> None:
    """Draw a legend beside the axes, unless every run diverged and there is no line."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper")

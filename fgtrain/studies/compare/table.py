"""The table of a comparison."""

import re
from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import Any

from rich.table import Table

from fgtrain.studies.compare.finished import CURVES, Finished
from fgtrain.studies.compare.plan import Comparison
from fgtrain.studies.compare.runs import Outcome
from fgtrain.studies.compare.search import is_at_edge
from fgtrain.studies.compare.target import metric_of, steps_to, target_value

NOT_PRINTED = ("accuracy to backprop", "training loss", "steps", "time, s", "clipping", "weight decay")
"""Columns of the Markdown table that are too many for a terminal."""


def rows_of(plan: Comparison, outcome: Outcome) -> list[dict[str, Any]]:
    """One row per method, with unformatted numbers; None for all of them if the method was refused."""
    rows = [_row_of(plan, outcome, method) for method in plan.methods if method not in outcome.refused]
    backprop = next((row for row in rows if row["method"] == "backprop"), None)
    for row in rows:
        row |= {"accuracy_to_backprop": None, "seconds_to_target_to_backprop": None}
        if backprop is not None and None not in (row["accuracy_mean"], backprop["accuracy_mean"]):
            row["accuracy_to_backprop"] = row["accuracy_mean"] - backprop["accuracy_mean"]
        if backprop is not None and row["seconds_to_target"] and backprop["seconds_to_target"]:
            row["seconds_to_target_to_backprop"] = row["seconds_to_target"] / backprop["seconds_to_target"]
    numbers = {name: None for name in rows[0] if not name.startswith("with_")}
    for place, method in enumerate(plan.methods):
        if method in outcome.refused:
            rows.insert(place, rows[0] | numbers | {"method": method, "refused": outcome.refused[method]})
    return rows


def _row_of(plan: Comparison, outcome: Outcome, method: str) -> dict[str, Any]:
    reference = outcome.costs["backprop"]
    started = [run for run in outcome.runs if run.method == method]
    runs = [run for run in started if not run.diverged]
    cost, cfg = outcome.costs[method], outcome.configs[method]
    row: dict[str, Any] = {"method": method, "lr": outcome.lrs[method]}
    tried = outcome.tried.get(method)
    row |= {"lr_at_edge": is_at_edge(row["lr"], tried) if tried else None, "runs": len(started)}
    accuracies = {"val/acc", "test/acc", "test/acc/dataloader_idx_0"}
    row["with_accuracy"] = any(accuracies & run.results["metrics"].keys() for run in outcome.runs)
    row["with_validation"] = is_validated(outcome.runs)
    row["with_tests"] = num_tests(outcome.runs)
    row["diverged"] = len(started) - len(runs)
    for name, keys in (("accuracy", ["test/acc"]), ("loss", ["test/loss", "loss"])):
        row |= _mean_and_deviation(name, [run.results["metrics"].get(k) for run in runs for k in keys])
        for i in range(row["with_tests"]):
            key = f"{keys[0]}/dataloader_idx_{i}"
            row |= _mean_and_deviation(f"{name}_{i}", [run.results["metrics"].get(key) for run in runs])
    row |= _mean_and_deviation("train_loss", [run.results["metrics"].get("train/loss") for run in runs])
    row["steps"] = runs[0].results["steps"] if runs else 0
    row["seconds"] = fmean(run.seconds for run in runs) if runs else 0.0
    target, tag = target_value(plan.target, plan.methods, outcome.runs), metric_of(outcome.runs)
    reached = [(run, steps) for run in runs if (steps := steps_to(target, tag, run)) is not None]
    row |= {"target": target, "reached_target": len(reached)}
    row["seconds_to_target"] = median(run.seconds_at(steps) for run, steps in reached) if reached else None
    row["steps_to_target"] = median(steps for _, steps in reached) if reached else None
    row["step_ms"] = cost.milliseconds
    row["step_time_to_backprop"] = cost.milliseconds / reference.milliseconds
    row["peak_mib"] = cost.peak_mib
    row["peak_memory_to_backprop"] = cost.peak_mib / reference.peak_mib
    row |= {"bytes_per_step": cost.bytes_sent, "floats_per_step": cost.floats_sent}
    row |= {"backward_pass": cost.backward_pass, "clip_grad_norm": cfg.clip_grad_norm}
    return row | {"weight_decay": cfg.optimizer.get("weight_decay"), "refused": None}


def is_validated(runs: Sequence[Finished]) -> bool:
    """Whether there was validation data; runs that diverged at once never reached it."""
    return all(run.diverged for run in runs) or any(tag in run.curves for run in runs for tag in CURVES)


def num_tests(runs: Sequence[Finished]) -> int:
    """The number of test splits, if there are several; 0 for one or none."""
    found = [re.search(r"/dataloader_idx_(\d+)$", name) for run in runs for name in run.results["metrics"]]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _mean_and_deviation(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    found = [value for value in values if value is not None]
    return {
        f"{name}_mean": fmean(found) if found else None,
        f"{name}_std": stdev(found) if len(found) > 1 else 0.0 if found else None,
    }


def cells(row: dict[str, Any]) -> dict[str, str]:
    """{column: text} of a row; columns without text may be left out."""

    def spread(name: str, scale: float, digits: str) -> str:
        mean, deviation = row[f"{name}_mean"], row[f"{name}_std"]
        return "" if mean is None else f"{scale * mean:{digits}} ± {scale * deviation:{digits}}"

    def optional(name: str, text: str, otherwise: str = "") -> str:
        return otherwise if row[name] is None else text.format(row[name])

    several = range(row["with_tests"])
    if row["refused"] is not None:
        return {"method": row["method"], "loss 0" if several else "loss": "refused"}
    shown = {"method": row["method"], "lr": f"{row['lr']:g}" + " (edge)" * bool(row["lr_at_edge"])}
    if row["with_accuracy"] and several:
        shown |= {f"accuracy {i}, %": spread(f"accuracy_{i}", 100, ".1f") for i in several}
    elif row["with_accuracy"]:
        to_backprop = row["accuracy_to_backprop"]
        shown["accuracy, %"] = spread("accuracy", 100, ".1f")
        shown["accuracy to backprop"] = "" if to_backprop is None else f"{100 * to_backprop:+.1f}"
    shown |= {f"loss {i}": spread(f"loss_{i}", 1, ".3g") for i in several}
    shown |= {} if several else {"loss": spread("loss", 1, ".3g")}
    shown["training loss"] = spread("train_loss", 1, ".3g")
    shown |= {"steps": str(row["steps"]), "time, s": f"{row['seconds']:.1f}"}
    if row["with_validation"]:
        seconds = optional("seconds_to_target", "{:.2f}", "never")
        shown["to target, s"] = seconds if seconds == "never" else f"{seconds} ({row['reached_target']}/{row['runs']})"
        shown["to target, steps"] = optional("steps_to_target", "{:g}")
        shown["to target, backprops"] = optional("seconds_to_target_to_backprop", "{:.2f}x")
    return shown | {
        "step time": f"{row['step_time_to_backprop']:.2f}x",
        "peak memory": f"{row['peak_memory_to_backprop']:.2f}x",
        "floats sent": str(row["floats_per_step"]),
        "backward pass": row["backward_pass"],
        "clipping": optional("clip_grad_norm", "{:g}", "none"),
        "weight decay": optional("weight_decay", "{:g}"),
    }


def markdown_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a table in Markdown, with all columns."""
    shown = [cells(row) for row in rows]
    names = max(shown, key=len)
    return markdown_table(list(names), [[row.get(name, "") for name in names] for row in shown])


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown, from its headings and rows."""
    line, *lines = (f"| {' | '.join(row)} |" for row in (names, *rows))
    return [line, "|" + "---|" * len(names), *lines]


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """The table for the terminal, with the columns that fit."""
    table, shown = Table(), [cells(row) for row in rows]
    names = [name for name in max(shown, key=len) if name not in NOT_PRINTED]
    table.add_column("method", overflow="fold", min_width=12)
    for name in names[1:]:
        table.add_column(name.replace(",", "").replace(" ", "\n"), justify="right", no_wrap=True)
    for row in shown:
        table.add_row(*(row.get(name, "") for name in names))
    return table

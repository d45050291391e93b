"""The report of a comparison: its conditions in sentences, one table in three formats, and figures."""

import csv
import io
import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from fgtrain.figures import save
from fgtrain.lightning.atomic_files import write_atomically
from fgtrain.studies.compare.figures import cosine, curves
from fgtrain.studies.compare.plan import Comparison
from fgtrain.studies.compare.runs import Outcome, device_name
from fgtrain.studies.compare.search import is_at_edge
from fgtrain.studies.compare.table import is_validated, markdown_of, num_tests, rows_of
from fgtrain.studies.compare.target import metric_of, resolution, target_value
from fgtrain.studies.compare.trajectories import trajectories

MANY_LAYERS = 24  # more rows of cosines are only in table.json


def statement(plan: Comparison, outcome: Outcome, command: str) -> list[str]:
    """The conditions of the comparison, in sentences."""
    run = outcome.runs[0]
    named = {key: run.results[key] for key in ("task", "data", "model")}
    lines = [f"`{command}`", "", ", ".join(f"{key} {value}" for key, value in named.items()) + f"; {device_name()}."]
    lines += [
        f"Seeds 0 to {plan.seeds - 1}: for each seed all methods start from the same parameters and see the same "
        "batches in the same order."
    ]
    if plan.in_seconds:
        lines += [f"Budget: {plan.amount:g} s of training, converted to steps by a trial run of each method."]
    else:
        lines += [f"Budget: {int(plan.amount)} steps for every method."]
    lines += _of_learning_rates(plan, outcome)
    lines += [_of_target(plan, outcome)]
    done = [r for r in outcome.runs if not r.diverged]
    if num_tests(done):
        lines += [f"There are {num_tests(done)} test splits, which are numbered from 0."]
    elif done and not any({"test/loss", "loss"} & r.results["metrics"].keys() for r in done):
        lines += ["There is no test split, so the table has no final accuracy or loss."]
    lines += [
        "Step time, memory and floats sent between processes are of one gradient and update.",
        "Times are of training steps, without validation and comparisons with the exact gradient.",
        "A backward pass is whole if it goes through the network, and within a block if it stays there.",
    ]
    lines += [f"{method} is refused: {reason}." for method, reason in outcome.refused.items()]
    diverged = Counter(run.method for run in outcome.runs if run.diverged)
    lines += [
        f"{method}: {n} of {plan.seeds} runs diverged and are not in the means." for method, n in diverged.items()
    ]
    lost = {m: [r.results["metrics"].get("diverged_starts", 0.0) for r in done if r.method == m] for m in plan.methods}
    lines += [
        f"{method}: {100 * fmean(shares):.3g} % of the starts diverged and are not in the values."
        for method, shares in lost.items()
        if any(shares)
    ]
    return lines


def _of_learning_rates(plan: Comparison, outcome: Outcome) -> list[str]:
    if plan.lr == "yaml":
        return ["Learning rates: those of conf/method; none was chosen for this comparison."]
    lines = [
        f"Learning rates: for every method the best of {plan.lr_points} around that of conf/method, a factor of "
        f"sqrt(10) apart, by the mean final validation loss over other seeds ({plan.search_seeds}), same budget. "
        f"While the best was at the edge, more were tried on that side ({plan.lr_points // 2}, at most twice)."
    ]
    at_edge = [f"{m} ({outcome.lrs[m]:g})" for m, losses in outcome.tried.items() if is_at_edge(outcome.lrs[m], losses)]
    if at_edge:
        lines += [f"Still at the edge, so that a better rate may lie outside: {', '.join(at_edge)}."]
    return lines


def _of_target(plan: Comparison, outcome: Outcome) -> str:
    if not is_validated(outcome.runs):
        return (
            "There is no validation split, so the table has no time to a target and the curves show the training loss."
        )
    tag = metric_of(outcome.runs)
    value = target_value(plan.target, plan.methods, outcome.runs)
    if value is None:
        return f"Target: {plan.target}, which is unknown since no run of that method finished."
    is_function = any("val/distance_to_minimum" in run.curves for run in outcome.runs)
    metric = "validation accuracy" if tag == "val/acc" else "value" if is_function else "validation loss"
    source = f" ({plan.target})" if plan.target and plan.target[0].isalpha() else ""
    share = resolution(tag, outcome.runs)
    known = "" if share is None else f", looked for every {100 * share:.3g} % of a run"
    return f"Target: {metric} {value:.4g}{source}{known}."


def layers_of(plan: Comparison, outcome: Outcome) -> dict[str, dict[str, float | str]]:
    """{method: {module: mean cosine to its exact gradient, or "exact"}}, over seeds and steps."""
    found: dict[str, dict[str, float | str]] = {}
    for method in plan.methods:
        runs = [run for run in outcome.runs if run.method == method and not run.diverged]
        for module in runs[0].cosines() if runs else ():
            values = [value for run in runs for _, value in run.cosines()[module] if np.isfinite(value)]
            is_exact = all(run.is_exact(module) for run in runs)
            mean = "exact" if is_exact else fmean(values) if values else "no gradient"
            found.setdefault(method, {})[module] = mean
    return found


def _table_of_layers(layers: dict[str, dict[str, float | str]]) -> list[str]:
    modules = list(dict.fromkeys(module for of_method in layers.values() for module in of_method))
    if not 0 < len(modules) <= MANY_LAYERS:
        return []
    lines = ["Mean cosine of an estimate to the exact gradient of its batch, by layer:", ""]
    lines += ["| layer | " + " | ".join(layers) + " |", "|" + "---|" * (1 + len(layers))]
    for module in modules:
        shown = [value.get(module, "") for value in layers.values()]
        texts = [value if isinstance(value, str) else f"{value:.3f}" for value in shown]
        lines += [f"| {module} | " + " | ".join(texts) + " |"]
    return ["", *lines]


def write_report(plan: Comparison, outcome: Outcome, command: str) -> list[dict[str, Any]]:
    """Write table.md, table.json, table.csv and the figures into the comparison's folder; returns the rows."""
    rows, folder, layers = rows_of(plan, outcome), plan.folder, layers_of(plan, outcome)
    sentences = statement(plan, outcome, command)
    lines = [*sentences, "", *markdown_of(rows), *_table_of_layers(layers), ""]
    write_atomically("\n".join(lines), folder / "table.md")
    tried = {m: [{"lr": lr, "val/loss": loss} for lr, loss in found.items()] for m, found in outcome.tried.items()}
    report = {"statement": sentences, "rows": rows, "learning_rates_tried": tried, "cosine_by_layer": layers}
    write_atomically(json.dumps(report, indent=2) + "\n", folder / "table.json")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(table.getvalue(), folder / "table.csv")
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

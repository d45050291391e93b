"""The runs of a comparison: the learning rates, then every seed of every method. Each run is saved when it is done."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from fgtrain.errors import ConfigError, DivergenceError, UnsupportedOperation
from fgtrain.lightning.atomic_files import write_atomically
from fgtrain.runs.build import build
from fgtrain.runs.run import run
from fgtrain.studies.compare.clock import SECONDS
from fgtrain.studies.compare.cost import StepCost, refusal, step_costs
from fgtrain.studies.compare.finished import Finished, read
from fgtrain.studies.compare.plan import SEARCH_SEED, Comparison, compose_run, quoted
from fgtrain.studies.compare.search import best_of, search
from fgtrain.studies.compare.variants import Variant

TRIAL_STEPS = 200
VALIDATIONS = 100  # of a run
COSINES = 20  # comparisons of a run with the exact gradient
Tell = Callable[[str, int, int], None]
"""Called before every run with (description, runs done, runs in total)."""


class Outcome(NamedTuple):
    """The results of a comparison, by the label of the method.

    Args:
        runs: the runs of all methods.
        lrs: the learning rates of the runs.
        tried: {learning rate: mean validation loss} of a search.
        costs: the cost of a step.
        configs: the configurations of the runs, without seed, learning rate and length.
        refused: for methods that cannot train the model, the reason.
    """

    runs: list[Finished]
    lrs: dict[str, float]
    tried: dict[str, dict[float, float]]
    costs: dict[str, StepCost]
    configs: dict[str, DictConfig]
    refused: dict[str, str]


class _Progress:
    """Counts the runs.

    Args:
        tell: called before every run.
        total: the number of runs in the plan; a search may need more.
    """

    def __init__(self, tell: Tell, total: int) -> None:
        self.tell = tell
        self.total = total
        self.done = 0

    def __call__(self, text: str) -> None:
        self.tell(text, self.done, self.total)
        self.done += 1


def compare(plan: Comparison, tell: Tell) -> Outcome:
    """Carry out the comparison; finished runs are not repeated.

    Args:
        plan: the comparison.
        tell: see `Tell`.
    """
    plan.remember()
    configs = {v.label: _compose(plan, v)[0] for v in plan.variants}
    for cfg in configs.values():
        build(cfg)  # finds mistakes before the first run
    refused = {m: reason for m, cfg in configs.items() if (reason := refusal(cfg)) is not None}
    steps: dict[str, int] = {}
    for variant in plan.variants:
        if variant.label in refused:
            continue
        try:
            steps[variant.label] = _steps(plan, variant)
        except DivergenceError as error:
            refused[variant.label] = f"its trial run of {TRIAL_STEPS} steps diverged ({error})"
    variants = [v for v in plan.variants if v.label not in refused]
    if not variants:
        raise UnsupportedOperation("; ".join(f"{m}: {reason}" for m, reason in refused.items()))
    tried_first = plan.lr_points * plan.search_seeds if plan.lr == "search" else 0
    progress = _Progress(tell, len(variants) * (plan.seeds + tried_first))
    lrs = {m: float(cfg.lr) for m, cfg in configs.items()}
    tried: dict[str, dict[float, float]] = {}
    if plan.lr == "search":
        tried = {v.label: _search(plan, v, steps[v.label], lrs[v.label], progress) for v in variants}
        lrs |= {m: best_of(losses) for m, losses in tried.items()}
    runs = []
    for seed in range(plan.seeds):  # methods take turns, so that other load affects all
        for v in variants:
            progress(f"{v.label} seed {seed}")
            folder = plan.folder / v.folder / f"seed={seed}"
            runs.append(_finish(plan, v, seed, lrs[v.label], steps[v.label], folder))
    tell("cost of a step", progress.total, progress.total)
    reference = {"backprop": compose_run(plan.overrides, "method=backprop", "run_dir=.", config_dir=plan.config_dir)[0]}
    costs = step_costs(reference | {v.label: configs[v.label] for v in variants})
    return Outcome(runs, lrs, tried, costs, configs, refused)


def _compose(plan: Comparison, variant: Variant, *own: str) -> tuple[DictConfig, dict[str, str]]:
    own = own or ("run_dir=.",)
    return compose_run(plan.overrides, *variant.overrides, *own, config_dir=plan.config_dir)


def _steps(plan: Comparison, variant: Variant) -> int:
    """Steps of a run: the budget, or for a budget of time the number that a trial run predicts."""
    if not plan.in_seconds:
        return int(plan.amount)
    trial = _finish(plan, variant, SEARCH_SEED, None, TRIAL_STEPS, plan.folder / "trial" / variant.folder)
    if trial.diverged:
        raise DivergenceError(trial.results["diverged"])
    return max(1, int(1e3 * plan.amount / trial.results["step_ms_median"]))


def _search(plan: Comparison, variant: Variant, steps: int, centre: float, progress: _Progress) -> dict[float, float]:
    """{learning rate: mean final validation loss} of every rate tried; the loss is infinite if a run diverged."""
    number = 0

    def loss_of(lr: float) -> float:
        nonlocal number
        number += 1
        progress.total += plan.search_seeds if number > plan.lr_points else 0
        losses = []
        for seed in range(SEARCH_SEED, SEARCH_SEED + plan.search_seeds):
            progress(f"{variant.label} learning rate {lr:g} seed {seed}")
            folder = plan.folder / "search" / variant.folder / f"lr={lr:g}" / f"seed={seed}"
            found = _finish(plan, variant, seed, lr, steps, folder)
            metrics = found.results["metrics"]
            if not found.diverged and not {"val/loss", "loss"} & metrics.keys():
                raise ConfigError(
                    "lr=search chooses by the validation loss, but the data has no validation split; use lr=yaml"
                )
            losses.append(metrics.get("val/loss", metrics.get("loss", math.inf)))
        return fmean(losses) if all(map(math.isfinite, losses)) else math.inf

    return search(centre, plan.lr_points, loss_of)


def _finish(plan: Comparison, variant: Variant, seed: int, lr: float | None, steps: int, folder: Path) -> Finished:
    """Do one run, or read its results if an earlier call has finished it."""
    if not (folder / "results.json").exists():
        every = max(1, steps // VALIDATIONS)
        own = [f"seed={seed}", f"run_dir={quoted(str(folder))}", f"trainer.max_steps={steps}", "callbacks=none"]
        own += [f"trainer.log_every_n_steps={every}", *([] if lr is None else [f"lr={lr}"])]
        if not any(override.startswith("trainer.val_check_interval=") for override in plan.overrides):
            own += [f"trainer.val_check_interval={every}"]
        own += ["+callbacks.quality._target_=fgtrain.lightning.callbacks.GradientQuality"]
        own += [f"+callbacks.quality.every_n_steps={max(1, steps // COSINES)}"]
        # The clock stands after the comparisons with the gradient, so that their time does not count.
        own += ["+callbacks.clock._target_=fgtrain.studies.compare.clock.TrainingClock"]
        own += [f"+callbacks.clock.every_n_steps={every}"]
        own += ["++callbacks.trajectory._target_=fgtrain.lightning.callbacks.Trajectory"]  # for test functions
        own += ["++callbacks.trajectory.run_dir=${run_dir}"]
        for events in folder.glob("events.*"):  # left by an interrupted run
            events.unlink()
        cfg, choices = _compose(plan, variant, *own)
        try:
            run(cfg, choices)
        except DivergenceError as error:  # divergence is a result too
            failed: dict[str, Any] = {name: choices.get(name) for name in ("method", "task", "data", "model")}
            failed |= {"seed": seed, "steps": 0, "train_seconds": 0.0, "metrics": {}, "diverged": str(error)}
            write_atomically(json.dumps(failed, indent=2) + "\n", folder / "results.json")
    found = read(folder, variant.label, seed)
    if not found.diverged and found.curves.get(SECONDS, [(0, 0.0)])[-1][0] != found.results["steps"]:
        raise ConfigError(
            f"{folder} has lost TensorBoard events, the times and curves of its run; delete this folder, and "
            "the same command repeats the run"
        )
    return found


def device_name() -> str:
    """The name of the device that the runs use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"

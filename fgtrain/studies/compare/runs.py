"""The runs of a comparison: the learning rates, then every seed of every method. Each run is saved when it is done."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fgtrain.errors import ConfigError, DivergenceError, UnsupportedOperation
from fgtrain.lightning.atomic_files import write_atomically
from fgtrain.runs.run import build, run
from fgtrain.studies.compare.cost import StepCost, refusal, step_costs
from fgtrain.studies.compare.plan import SEARCH_SEED, Comparison, compose_run

TRIAL_STEPS = 200
POINTS = 40  # points of a curve
CURVES = ("val/loss", "val/acc", "val/distance_to_minimum")
TRAINED = "train/loss"  # the curve if there is no validation split


class Finished(NamedTuple):
    """One run that is compared.

    Args:
        method: its file in conf/method.
        seed: seed of initialisation, data order and directions.
        results: the content of its results.json.
        curves: {tag: [(step, value)]}.
    """

    method: str
    seed: int
    results: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]]

    @property
    def diverged(self) -> bool:
        """Whether it was ended because it had diverged."""
        return "diverged" in self.results

    def seconds_at(self, step: int) -> float:
        """Training time after `step` steps, as an equal share of the run's time per step."""
        return self.results["train_seconds"] * step / max(1, self.results["steps"])


class Outcome(NamedTuple):
    """The results of a comparison, by method.

    Args:
        runs: the runs of all methods.
        lrs: the learning rates of the runs.
        tried: {learning rate: validation loss} of a search.
        costs: the cost of a step.
        refused: for methods that cannot train the model, the reason.
    """

    runs: list[Finished]
    lrs: dict[str, float]
    tried: dict[str, dict[float, float]]
    costs: dict[str, StepCost]
    refused: dict[str, str]


def compare(plan: Comparison, tell: Callable[[str, int, int], None]) -> Outcome:
    """Carry out the comparison; finished runs are not repeated.

    Args:
        plan: the comparison.
        tell: called before every run with (description, runs done, runs in total).
    """
    plan.remember()
    first = {m: compose_run(plan.overrides, f"method={m}", "run_dir=.")[0] for m in plan.methods}
    for cfg in first.values():
        build(cfg)  # finds mistakes before the first run
    refused = {m: reason for m, cfg in first.items() if (reason := refusal(cfg)) is not None}
    methods = [m for m in plan.methods if m not in refused]
    if not methods:
        raise UnsupportedOperation("; ".join(f"{m}: {reason}" for m, reason in refused.items()))
    searches = plan.lr_points if plan.lr == "search" else 0
    total = len(methods) * (plan.seeds + searches)
    numbers = iter(range(total))

    def report(text: str) -> None:
        tell(text, next(numbers), total)

    steps = {m: _steps(plan, m) for m in methods}
    lrs = {m: float(cfg.lr) for m, cfg in first.items()}
    tried: dict[str, dict[float, float]] = {}
    if searches:
        tried = {m: dict(_search(plan, m, steps[m], lrs[m], report)) for m in methods}
        lrs = {m: min(losses, key=lambda lr, losses=losses: losses[lr]) for m, losses in tried.items()}
    runs = []
    for seed in range(plan.seeds):  # methods take turns, so that other load affects all
        for m in methods:
            report(f"{m} seed {seed}")
            runs.append(_finish(plan, m, seed, lrs[m], steps[m], plan.folder / m / f"seed={seed}"))
    tell("cost of a step", total, total)
    compared = dict.fromkeys(["backprop", *methods])
    costs = step_costs({m: compose_run(plan.overrides, f"method={m}", "run_dir=.")[0] for m in compared})
    return Outcome(runs, lrs, tried, costs, refused)


def _steps(plan: Comparison, method: str) -> int:
    """Steps of a run: the budget, or for a budget of time the number that a trial run predicts."""
    if not plan.in_seconds:
        return int(plan.amount)
    trial = _finish(plan, method, SEARCH_SEED, None, TRIAL_STEPS, plan.folder / "trial" / method)
    if trial.diverged:
        raise DivergenceError(f"{method} diverged in its trial run: {trial.results['diverged']}")
    return max(1, int(1e3 * plan.amount / trial.results["step_ms_median"]))


def _search(
    plan: Comparison, method: str, steps: int, centre: float, report: Callable[[str], None]
) -> Iterator[tuple[float, float]]:
    """(learning rate, final validation loss) of every rate tried; the loss is infinite if the run diverged."""
    half = plan.lr_points // 2
    for k in range(-half, half + 1):
        lr = float(f"{centre * 10 ** (k / 2):.3g}")
        report(f"{method} learning rate {lr:g}")
        found = _finish(plan, method, SEARCH_SEED, lr, steps, plan.folder / "search" / method / f"lr={lr:g}")
        metrics = found.results["metrics"]
        if not found.diverged and not {"val/loss", "loss"} & metrics.keys():
            raise ConfigError(
                "lr=search chooses by the validation loss, but the data has no validation split; use lr=yaml"
            )
        loss = metrics.get("val/loss", metrics.get("loss", math.inf))
        yield lr, loss if math.isfinite(loss) else math.inf


def _finish(plan: Comparison, method: str, seed: int, lr: float | None, steps: int, folder: Path) -> Finished:
    """Do one run, or read its results if an earlier call has finished it."""
    every = max(1, steps // POINTS)
    if not (folder / "results.json").exists():
        own = [f"method={method}", f"seed={seed}", f"run_dir='{folder}'", f"trainer.max_steps={steps}"]
        own += [f"trainer.val_check_interval={every}", f"trainer.log_every_n_steps={every}", "callbacks=none"]
        own += ["+callbacks.quality._target_=fgtrain.lightning.callbacks.GradientQuality"]
        own += ["+callbacks.trajectory._target_=fgtrain.lightning.callbacks.Trajectory"]  # for test functions
        own += [f"+callbacks.trajectory.run_dir='{folder}'"]
        own += [f"+callbacks.quality.every_n_steps={every}", *([] if lr is None else [f"lr={lr}"])]
        for events in folder.glob("events.*"):  # left by an interrupted run
            events.unlink()
        cfg, choices = compose_run(plan.overrides, *own)
        try:
            run(cfg, choices)
        except DivergenceError as error:  # divergence is a result too
            failed: dict[str, Any] = {name: choices.get(name) for name in ("method", "task", "data", "model")}
            failed |= {"seed": seed, "steps": 0, "train_seconds": 0.0, "metrics": {}, "diverged": str(error)}
            write_atomically(json.dumps(failed, indent=2) + "\n", folder / "results.json")
    results = json.loads((folder / "results.json").read_text())
    return Finished(method, seed, results, _curves(folder))


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    wanted = set(events.Tags()["scalars"]) & {*CURVES, TRAINED, "quality/cosine"}
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in wanted}


def device_name() -> str:
    """The name of the device that the runs use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"

"""The table of runs that ends a sweep, best first by the final validation loss, or by the loss where none is measured.

`python scripts/train.py -m method=backprop,fwdgrad seed=0,1,2 trainer.max_steps=500` runs six jobs into one folder
under `multirun/`. `hydra/launcher=joblib` runs them in parallel and `experiment=optuna` searches; both need `pip
install -e ".[sweeps]"`. The runs `seeds/...` in TensorBoard are the mean and the spread over seeds.
"""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from fgtrain.errors import ConfigError
from fgtrain.runs.messages import plain_console, tensorboard_command
from fgtrain.runs.results import read_results
from fgtrain.runs.seed_curves import write_seed_curves

ERROR_FILE = "error.txt"
OBJECTIVES = ("val/loss", "loss", "train/loss")  # a run uses the first that it has
SHOWN = ("test/acc", "val/acc", "val/loss", "loss", "distance_to_minimum")


def objective(results: Mapping[str, Any]) -> float:
    """The value that a search minimises: the final validation loss or a function's value; infinity if not finite."""
    value = results["metrics"].get(_objective_of(results["metrics"]), math.inf)
    return value if math.isfinite(value) else math.inf


def _objective_of(metrics: Mapping[str, Any]) -> str:
    """The name of that value; the first one if there is none."""
    return next((name for name in OBJECTIVES if metrics.get(name) is not None), OBJECTIVES[0])


class FailedJob(JobReturn):
    """Raises the job's error without Hydra's extra line about it; the end of the sweep names the job."""

    @property
    def return_value(self) -> Any:
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


class SweepTable(Callback):
    """Hydra's callback that prints the table and writes sweep.csv into the sweep's folder.

    If a run fails, Hydra calls no callback at the end of the sweep; `close` is then called instead.
    """

    _folder: Path | None = None  # of the current sweep; a class attribute, as Hydra does not expose its instance

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        SweepTable._folder = Path(config.hydra.sweep.dir)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:  # this is the process of the job, maybe another one
            folder = Path(config.hydra.runtime.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(config.hydra.overrides.task, folder / "overrides.yaml")
            (folder / ERROR_FILE).unlink(missing_ok=True)  # of an earlier start in the same folder

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if job_return.status == JobStatus.FAILED:
            job_return.__class__ = FailedJob

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        self.close()

    @classmethod
    def close(cls) -> None:
        """Print the table of the current sweep, if there is one."""
        folder, cls._folder = cls._folder, None
        rows = rows_of(folder) if folder is not None else []
        if folder is None or not rows:
            return
        with (folder / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        finished = [path for path in sorted(folder.glob("*/overrides.yaml")) if (path.parent / "results.json").exists()]
        write_seed_curves(folder, [(path.parent, _list_of(path)) for path in finished])
        console = plain_console(120)
        console.print(_table(rows))
        console.print(f"sweep.csv in {folder}", soft_wrap=True, highlight=False)
        console.print(tensorboard_command(folder), soft_wrap=True, highlight=False)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """One row per run, best first; failed runs, which have no results, come last.

    Args:
        folder: the folder of the sweep, with one folder for each run in it.
    """
    runs = []
    for path in sorted(folder.glob("*/overrides.yaml"), key=lambda path: _number(path.parent.name)):
        try:
            results = read_results(path.parent)
        except ConfigError:  # damaged; its job has failed and is named
            results = None
        runs.append((_list_of(path), results))
    common = set.intersection(*(set(overrides) for overrides, _ in runs)) if len(runs) > 1 else set()
    names = dict.fromkeys([*SHOWN, *(_objective_of(results["metrics"]) for _, results in runs if results)])
    rows = []
    for overrides, results in sorted(runs, key=lambda run: objective(run[1]) if run[1] else math.inf):
        row: dict[str, Any] = {"run": " ".join(o for o in overrides if o not in common) or "default"}
        row |= {name: (results or {"metrics": {}})["metrics"].get(name) for name in names}
        row |= {name: results.get(name) if results else None for name in ("steps", "train_seconds")}
        rows.append(row | {"status": "done" if results else "failed"})
    return rows


def _list_of(path: Path) -> list[str]:
    found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)  # hides values from the environment
    assert isinstance(found, list)
    return [str(override) for override in found]


def _number(name: str) -> int:
    head = name.partition("_")[0]
    return int(head) if head.isdigit() else 0


def _table(rows: list[dict[str, Any]]) -> Table:
    ranks = " or ".join(dict.fromkeys(_objective_of(row) for row in rows if row["status"] == "done")) or OBJECTIVES[0]
    table = Table(title=f"runs of the sweep, best first by final {ranks}", title_justify="left")
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    for name in names:
        table.add_column(name, justify="left" if name in ("run", "status") else "right", overflow="fold")
    for row in rows:
        cells = (row[name] for name in names)
        table.add_row(*(f"{c:.4g}" if isinstance(c, float) else "" if c is None else str(c) for c in cells))
    return table

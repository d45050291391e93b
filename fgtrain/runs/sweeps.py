"""The end of a sweep: a table of its runs, best first.

`python scripts/train.py -m method=backprop,fwdgrad seed=0,1,2 trainer.max_steps=500` runs six jobs into one folder
under `multirun/`. `hydra/launcher=joblib` runs them in parallel and `experiment=optuna` searches; both need `pip
install -e ".[sweeps]"`.
"""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

OBJECTIVES = ("val/loss", "loss", "train/loss")  # a run's is the first that it has
SHOWN = ("test/acc", "val/acc", "val/loss", "loss", "distance_to_minimum")


def objective(results: Mapping[str, Any]) -> float:
    """What a search minimises: the final validation loss, or a test function's value; infinity if it is no number."""
    values = [results["metrics"][name] for name in OBJECTIVES if name in results["metrics"]]
    return values[0] if values and math.isfinite(values[0]) else math.inf


class FailedJob(JobReturn):
    """Raises its error as Hydra's own does, which writes a line about it first; the job is named in the end."""

    @property
    def return_value(self) -> Any:
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


class SweepTable(Callback):
    """Hydra's callback that prints the table and writes sweep.csv into the sweep's folder.

    Hydra calls no callback at the end of a sweep one of whose runs has failed; `close` is for that.
    """

    _folder: Path | None = None  # of the sweep that is going on; Hydra makes the instance and keeps it to itself

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        SweepTable._folder = Path(config.hydra.sweep.dir)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:  # in the process of the job, which may be another one
            folder = Path(config.hydra.runtime.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(config.hydra.overrides.task, folder / "overrides.yaml")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if job_return.status == JobStatus.FAILED:
            job_return.__class__ = FailedJob

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        self.close()

    @classmethod
    def close(cls) -> None:
        """Show the sweep that is going on, if there is one."""
        folder, cls._folder = cls._folder, None
        rows = rows_of(folder) if folder is not None else []
        if folder is None or not rows:
            return
        with (folder / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        console = Console()
        console.width = max(console.width, 120)  # the table is not folded into a file or a narrow window
        console.print(_table(rows))
        console.print(f"sweep.csv in {folder}", soft_wrap=True, highlight=False)
        console.print(f"look at it: tensorboard --host 127.0.0.1 --logdir {folder}", soft_wrap=True, highlight=False)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """One row a run, best first; those without results, which have failed, come last.

    Args:
        folder: of the sweep, one folder below for each run.
    """
    runs = []
    for path in sorted(folder.glob("*/overrides.yaml"), key=lambda path: _number(path.parent.name)):
        results_path = path.parent / "results.json"
        results = json.loads(results_path.read_text()) if results_path.exists() else None
        runs.append((_list_of(path), results))
    common = set.intersection(*(set(overrides) for overrides, _ in runs)) if len(runs) > 1 else set()
    rows = []
    for overrides, results in sorted(runs, key=lambda run: objective(run[1]) if run[1] else math.inf):
        row: dict[str, Any] = {"run": " ".join(o for o in overrides if o not in common) or "default"}
        row |= {name: (results or {"metrics": {}})["metrics"].get(name) for name in SHOWN}
        row |= {name: results[name] if results else None for name in ("steps", "train_seconds")}
        rows.append(row | {"status": "done" if results else "failed"})
    return rows


def _list_of(path: Path) -> list[str]:
    found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)  # what the environment gives is not shown
    assert isinstance(found, list)
    return [str(override) for override in found]


def _number(name: str) -> int:
    head = name.partition("_")[0]
    return int(head) if head.isdigit() else 0


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="runs of the sweep, best first", title_justify="left")
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    for name in names:
        table.add_column(name, justify="left" if name in ("run", "status") else "right", overflow="fold")
    for row in rows:
        cells = (row[name] for name in names)
        table.add_row(*(f"{c:.4g}" if isinstance(c, float) else "" if c is None else str(c) for c in cells))
    return table

"""The results of a run: their file and their table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from fgtrain.errors import ConfigError
from fgtrain.runs.messages import plain_console, tensorboard_command

RESULTS = "results.json"
_REMEDY = "delete it and repeat the command that wrote it; fgtrain train takes resume=auto for this"


def read_results(run_dir: Path) -> dict[str, Any] | None:
    """The results of a finished run; None if it has not finished.

    Raises:
        ConfigError: they cannot be read.
    """
    path = run_dir / RESULTS
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; {_REMEDY}") from error
    if not (isinstance(found, dict) and isinstance(found.get("metrics"), dict)):
        raise ConfigError(f"{path} does not hold the results of a run; {_REMEDY}")
    return found


def print_results(results: Mapping[str, Any], run_dir: Path) -> None:
    """Print the table of results and where to find more."""
    table = Table(title=f"{results['method']} on {results['task']}", title_justify="left")
    table.add_column("result")
    table.add_column("value", justify="right")
    flat = {k: v for k, v in results.items() if k not in ("method", "task", "metrics", "solution")}
    for name, value in (flat | results["metrics"]).items():
        label = f"{name} (of the whole process, or of the GPU)" if name == "peak_memory_mib" else name
        table.add_row(label, f"{value:.6g}" if isinstance(value, float) else str(value))
    if "solution" in results:
        solution = results["solution"]
        values = (
            [f"{k} {v:.5f}" for k, v in solution.items()]
            if isinstance(solution, dict)
            else [f"{x:.5f}" for x in solution]
        )
        table.add_row("solution", ", ".join(values[:6]))
    console = plain_console()
    console.print(table)
    console.print(f"results in {run_dir}", soft_wrap=True, highlight=False)
    if any(run_dir.glob("events.out.tfevents.*")):
        console.print(tensorboard_command(run_dir), soft_wrap=True, highlight=False)

"""Compare methods under equal conditions: fgtrain compare methods=[backprop,fwdgrad] seeds=5 budget=60s

Every method gets the same initial parameters, the same batches in the same order and the same budget. The results are
one table (Markdown, JSON, CSV) and figures: loss and accuracy against steps and time, the cosine to the exact gradient,
and on a test function the paths of all methods on one contour. After an interruption, the same command continues.

    suite=quick     instead of methods: small comparisons, in minutes, and one page with their tables and figures
    suite=ladder    the same from one hidden layer to deep, convolutional and sequence models, in hours
    suite=mine.yaml a list of comparisons of your own, such as fgtrain/studies/compare/suites/quick.yaml
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: silences its process groups

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fgtrain.errors import ConfigError, Interrupted
from fgtrain.memory import keep_freed_memory
from fgtrain.runs.messages import errors_as_lines, plain_console, silence_libraries, tensorboard_command
from fgtrain.runs.owner import owned
from fgtrain.studies.compare import compare, parse, write_report
from fgtrain.studies.compare.plan import describe_arguments
from fgtrain.studies.compare.report import statement
from fgtrain.studies.compare.runs import Tell
from fgtrain.studies.compare.suite import read_suite, run_suite
from fgtrain.studies.compare.table import table_of


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the arguments")


def main() -> None:
    """Do the missing runs, then write and print the report."""
    with errors_as_lines():
        try:
            run(sys.argv[1:])
        except (KeyboardInterrupt, Interrupted) as stopped:
            number = stopped.exit_status - 128 if isinstance(stopped, Interrupted) else signal.SIGINT
            raise Interrupted("stopped; the same command continues the interrupted run", number) from stopped


def run(arguments: Sequence[str]) -> None:
    """Compare as the arguments say."""
    keep_freed_memory()
    silence_libraries()
    program = ["python", "scripts/compare.py"] if sys.argv[0].endswith(".py") else ["fgtrain", "compare"]
    options = _options(arguments, " ".join(program))
    command = shlex.join([*program, *arguments])
    out = plain_console(140)
    if any(argument.startswith("suite=") for argument in options.arguments):
        folder, rungs = read_suite(options.arguments, options.config_dir)
        with owned(folder, "out"), _progress() as tell:
            page = run_suite(folder, rungs, command, tell, partial(_show, out))
        out.print(f"the page with all tables and figures: {page}", soft_wrap=True, highlight=False)
        return
    plan = parse(options.arguments, options.config_dir)
    with owned(plan.folder, "out"):
        with _progress() as tell:
            outcome = compare(plan, tell)
        rows = write_report(plan, outcome, command)
    for line in statement(plan, outcome, command)[2:]:
        out.print(line, highlight=False, soft_wrap=True)
    out.print(table_of(rows))
    figures = sorted(path.name for path in plan.folder.glob("*.png"))
    written = ", ".join(["table.md", "table.json", "table.csv", *figures])
    out.print(f"{written} in {plan.folder}; each figure is also an .svg", soft_wrap=True, highlight=False)
    out.print(tensorboard_command(plan.folder), soft_wrap=True, highlight=False)


@contextmanager
def _progress() -> Generator[Tell]:
    """A function that shows how far the runs are, as a bar on a terminal and as lines in a file."""
    console = plain_console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("comparing")

        def tell(text: str, done: int, total: int) -> None:
            progress.update(bar, description=text, completed=done, total=total)
            if not console.is_terminal:
                console.print(f"[{done}/{total}] {text}", highlight=False, soft_wrap=True)

        yield tell


def _show(out: Console, name: str, rows: list[dict[str, Any]] | None) -> None:
    out.print(name, highlight=False, soft_wrap=True)
    if rows is not None:
        out.print(table_of(rows))


def _options(arguments: Sequence[str], program: str) -> argparse.Namespace:
    parser = _Parser(
        prog=program,
        usage="%(prog)s [-h] [--config-dir DIR] key=value ...",
        description=f"{__doc__}\nArguments and their defaults:\n{describe_arguments()}",
        epilog="Every other key=value goes to all runs, as an argument of fgtrain train: data=mnist model=cnn.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="folder of your own configurations, beside conf")
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)

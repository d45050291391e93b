"""Compare methods under equal conditions: fgtrain compare methods=[backprop,fwdgrad] seeds=5 budget=60s

Every method gets the same initial parameters, the same batches in the same order and the same budget.

    budget=60s           time, converted to steps by a trial run; budget=2000steps counts steps
    lr=search            try the same number of learning rates for every method, instead of those in conf/method
    target=0.95          measure the time to this accuracy
    anything else        goes to every run as an argument of fgtrain train: data=mnist model=cnn, task=beale

It writes one table (Markdown, JSON, CSV) and figures: loss and accuracy against steps and time, and the cosine to the
exact gradient. After an interruption, the same command continues.
"""

import os
import shlex
import signal
import sys
from collections.abc import Sequence

os.environ |= {"KINETO_LOG_LEVEL": "9", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # before torch: silences its profiler

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fgtrain.errors import Interrupted
from fgtrain.memory import keep_freed_memory
from fgtrain.runs.messages import USER_ERRORS, fail, silence_libraries
from fgtrain.studies.compare import compare, parse, write_report
from fgtrain.studies.compare.report import statement, table_of


def main() -> None:
    """Do the missing runs, then write and print the report."""
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    try:
        run(sys.argv[1:])
    except (KeyboardInterrupt, Interrupted):
        fail(Interrupted("stopped; the same command continues the interrupted run", signal.SIGINT))
    except USER_ERRORS as error:
        fail(error)


def run(arguments: Sequence[str]) -> None:
    """Compare as the arguments say."""
    keep_freed_memory()
    silence_libraries()
    plan = parse(arguments)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("comparing")

        def tell(text: str, done: int, total: int) -> None:
            progress.update(bar, description=text, completed=done, total=total)
            if not console.is_terminal:
                console.print(f"[{done}/{total}] {text}", markup=False, highlight=False)

        outcome = compare(plan, tell)
    program = ["python", "scripts/compare.py"] if sys.argv[0].endswith(".py") else ["fgtrain", "compare"]
    command = shlex.join([*program, *arguments])
    rows = write_report(plan, outcome, command)
    out = Console()
    out.width = max(out.width, 140)  # do not fold the table in a file or a narrow window
    for line in statement(plan, outcome, command)[2:]:
        out.print(line, highlight=False, soft_wrap=True)
    out.print(table_of(rows))
    out.print(
        f"table.md, table.json, table.csv, curves.png, cosine.png in {plan.folder}", soft_wrap=True, highlight=False
    )
    out.print(f"look at it: tensorboard --host 127.0.0.1 --logdir {plan.folder}", soft_wrap=True, highlight=False)

"""Compare forward mode with backpropagation in finding a simulator's parameters: fgtrain calibrate --system pendulum

Writes a table (calibration.md), a figure (.png and .svg) of the parameters' error against time and of memory and time
of a gradient against the number of steps, and the numbers (.json). The step of the solver is compiled, which takes a
minute of the three. --memory-steps 100 1000 10000 measures longer simulations. After an interruption, the same command
goes on.
"""

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.progress import track

from fgtrain.figures import save
from fgtrain.lightning.atomic_files import write_atomically
from fgtrain.memory import keep_freed_memory
from fgtrain.runs.messages import OneLineParser, errors_as_lines, plain_console, silence_libraries
from fgtrain.studies.calibration import HEADINGS, METHODS, Cost, Course, costs, draw, follow, rows_of, search, table_of
from fgtrain.studies.compare.table import markdown_table
from fgtrain.studies.parts import Parts
from fgtrain.tasks import Calibration

SEARCH = 1000
"""The seed of the guess from which learning rates are searched."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--system", default="lotka_volterra", help="lotka_volterra, pendulum, reaction_diffusion")
    parser.add_argument("--trajectories", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5, help="solver steps between two of 20 observations")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--spread", type=float, default=0.5, help="of the guesses, about the true values")
    parser.add_argument("--seconds", type=float, default=1, help="CPU seconds for a start of a method")
    parser.add_argument("--memory-steps", nargs="*", type=int, default=[100, 1000])
    parser.add_argument("--memory-limit", type=float, default=256, help="MiB above which a gradient is not tried")
    parser.add_argument("--eager", action="store_true", help="do not compile the step")
    parser.add_argument("--out", type=Path, default=Path("calibration"), help="folder for the results")
    return parser.parse_args()


def main() -> None:
    """Calibrate, write the results and print the table."""
    args = parse()
    with errors_as_lines(ValueError):
        check_arguments(args)
        task = _task(args)
        with Parts(args) as parts:
            calibrate(args, task, parts)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse numbers out of range."""
    if args.starts < 1 or not 0 < args.seconds < math.inf:
        raise ValueError(f"--starts must be at least 1 and --seconds positive, got {args.starts} and {args.seconds}")
    if not 0 <= args.spread < math.inf:
        raise ValueError(f"--spread must be at least 0, got {args.spread}")
    if min(args.memory_steps, default=1) < 1 or math.isnan(args.memory_limit):
        raise ValueError(
            f"--memory-steps must be at least 1 and --memory-limit a number, got {args.memory_steps} and "
            f"{args.memory_limit}"
        )


def calibrate(args: argparse.Namespace, task: Calibration, parts: Parts) -> None:
    """Measure what the command line asks for."""
    silence_libraries()
    torch.set_num_threads(1)
    keep_freed_memory()
    console = plain_console(stderr=True)

    def course(method: str, lr: float, start: int) -> Course:
        run = partial(follow, task, method, lr, start, args.seconds, args.spread)
        return parts(Course, f"{method}, lr={lr}, start={start}", run)

    with console.status("compiling"):
        for method in METHODS:
            follow(task, method, 0.0, SEARCH, 0.0, args.spread)
    searched = track(METHODS, "searching learning rates", console=console, transient=True)
    rates = {method: search(partial(course, start=SEARCH), method) for method in searched}
    jobs = [(method, start) for start in range(args.starts) for method in METHODS]
    shown = track(jobs, "calibrating", console=console, transient=True)
    courses = [course(method, rates[method], start) for method, start in shown]
    with console.status("measuring memory"):
        memory = costs(_task(args), args.memory_steps, args.memory_limit, parts)
    save(draw(courses, memory), args.out / "calibration")
    write_atomically(_page(args, rows_of(courses), memory), args.out / "calibration.md")
    found = {"paths": [course._asdict() for course in courses], "costs": [cost._asdict() for cost in memory]}
    write_atomically(json.dumps(found) + "\n", args.out / "calibration.json")
    plain_console(110).print(table_of(courses))
    print(f"calibration.md, calibration.json, calibration.png and calibration.svg in {args.out}")


def _task(args: argparse.Namespace) -> Calibration:
    return Calibration(args.system, args.trajectories, steps=args.steps, compile=not args.eager)


def _page(args: argparse.Namespace, rows: Sequence[tuple[str, ...]], memory: Sequence[Cost]) -> str:
    """The tables in Markdown."""
    lines = [
        f"`python scripts/calibrate.py --system {args.system}`: {args.trajectories} trajectories, "
        f"{20 * args.steps} steps, {args.starts} starts, at most {args.seconds:g} CPU seconds each, one thread.",
        "",
        *markdown_table(HEADINGS, rows),
        "",
        f"MiB of a gradient, and its time in simulations; - if it needs more than {args.memory_limit:g} MiB:",
        "",
    ]
    steps = sorted({cost.steps for cost in memory})
    known = {(cost.method, cost.steps): cost for cost in memory}
    cells = [
        [method, *(_cell(known[method, n]) for n in steps)] for method in dict.fromkeys(cost.method for cost in memory)
    ]
    return "\n".join([*lines, *markdown_table(["steps", *map(str, steps)], cells), ""])


def _cell(cost: Cost) -> str:
    return "-" if cost.mib is None else f"{cost.mib:.3g}, {cost.passes:.1f}"

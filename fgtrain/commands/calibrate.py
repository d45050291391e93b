"""Compare forward mode with backpropagation in finding a simulator's parameters: fgtrain calibrate --system pendulum

Writes a table (calibration.md), a figure (.png and .svg) of the parameters' error against time and of memory against
the number of steps, and the numbers (.json). The quick form takes two minutes; --memory-steps 100 1000 10000
measures memory for longer simulations.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # before torch: silences its profiler

import torch
from rich.console import Console
from rich.progress import track

from fgtrain.figures import save
from fgtrain.memory import keep_freed_memory
from fgtrain.runs.messages import USER_ERRORS, OneLineParser, fail, silence_libraries
from fgtrain.studies.calibration import HEADINGS, METHODS, Peak, draw, follow, peaks, rows_of, table_of
from fgtrain.studies.compare.table import markdown_table
from fgtrain.tasks import Calibration


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--system", default="lotka_volterra", help="lotka_volterra, pendulum, reaction_diffusion")
    parser.add_argument("--trajectories", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5, help="solver steps between two of 20 observations")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--spread", type=float, default=0.5, help="of the guesses, about the true values")
    parser.add_argument("--seconds", type=float, default=4, help="CPU seconds for a start of a method")
    parser.add_argument("--memory-steps", nargs="*", type=int, default=[10, 30, 100])
    parser.add_argument("--out", type=Path, default=Path("calibration"), help="folder for the results")
    return parser.parse_args()


def main() -> None:
    """Calibrate, write the results and print the table."""
    args = parse()
    try:
        calibrate(args)
    except (*USER_ERRORS, ValueError) as error:
        fail(error)


def calibrate(args: argparse.Namespace) -> None:
    """Measure what the command line asks for."""
    silence_libraries()
    torch.set_num_threads(1)
    keep_freed_memory()
    if args.starts < 1 or not args.seconds > 0:
        raise ValueError(f"--starts must be at least 1 and --seconds positive, got {args.starts} and {args.seconds}")
    task, console = Calibration(args.system, args.trajectories, steps=args.steps), Console(stderr=True)
    jobs = [(method, start) for start in range(args.starts) for method in METHODS]
    shown = track(jobs, "calibrating", console=console, transient=True)
    paths = [follow(task, method, start, args.seconds, args.spread) for method, start in shown]
    with console.status("measuring memory"):
        memory = peaks(args.memory_steps, args.system, args.trajectories)
    args.out.mkdir(parents=True, exist_ok=True)
    save(draw(paths, memory), args.out / "calibration")
    (args.out / "calibration.md").write_text(_page(args, rows_of(paths), memory))
    found = {"paths": [path._asdict() for path in paths], "memory": [peak._asdict() for peak in memory]}
    (args.out / "calibration.json").write_text(json.dumps(found) + "\n")
    Console().print(table_of(paths))
    print(f"calibration.md, calibration.json, calibration.png and calibration.svg in {args.out}")


def _page(args: argparse.Namespace, rows: Sequence[tuple[str, ...]], memory: Sequence[Peak]) -> str:
    """The tables in Markdown."""
    lines = [
        f"`python scripts/calibrate.py --system {args.system}`: {args.trajectories} trajectories, "
        f"{20 * args.steps} steps, {args.starts} starts, at most {args.seconds:g} CPU seconds each, one thread.",
        "",
        *markdown_table(HEADINGS, rows),
        "",
        "MiB of a gradient; - if it was not tried for want of memory:",
        "",
    ]
    steps = sorted({peak.steps for peak in memory})
    known = {(peak.method, peak.steps): peak.mib for peak in memory}
    cells = [
        [method, *("-" if (mib := known[method, n]) is None else f"{mib:.1f}" for n in steps)]
        for method in dict.fromkeys(peak.method for peak in memory)
    ]
    return "\n".join([*lines, *markdown_table(["steps", *map(str, steps)], cells), ""])

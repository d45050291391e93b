"""Measure training steps against backprop's: fgtrain bench --models mlp cnn --num-tangents 1 8

Times are medians over rounds in which all methods take turns. Memory is the peak above the parameters. Both are also
given relative to one backprop step and to one forward pass without gradients, of the same model in the same run.
--scaling models a step with many processes from compute measured here and bandwidths you name. --chains measures
forward mode over few parameters and many small operations, such as a simulation. --thin-wire trains by two hosts, made
of network namespaces, over links of limited rate; it needs root, and --quick takes three minutes.
scripts/results/README.md has measurements.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: silences its process groups

import torch
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table

from fgtrain.lightning.atomic_files import is_device, make_folder, refuse_unwritable, write_atomically
from fgtrain.memory import keep_freed_memory
from fgtrain.models.vision import refuse_unknown
from fgtrain.runs.messages import OneLineParser, errors_as_lines, plain_console, silence_libraries
from fgtrain.studies.benchmarks.chains import ChainCost, chains_table, measure_chains
from fgtrain.studies.benchmarks.loop import loop_overhead
from fgtrain.studies.benchmarks.methods import methods_of
from fgtrain.studies.benchmarks.peers import peers_of
from fgtrain.studies.benchmarks.scaling import Link, measure_compute, rows_of, scaling_table
from fgtrain.studies.benchmarks.steps import MODELS, REFERENCES, Row, measure
from fgtrain.studies.thin_wire import METHODS, PROBLEMS, Measured, measure_pair
from fgtrain.studies.thin_wire_report import write_report

T = TypeVar("T")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], help="mlp, cnn, deep24 or any of torchvision's")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64])
    parser.add_argument("--methods", nargs="+", default=["fwdgrad"], help="files in conf/method")
    parser.add_argument("--tangents", nargs="+", default=["low_rank"], help="files in conf/tangents")
    parser.add_argument("--num-tangents", nargs="+", type=int, default=[1])
    parser.add_argument("--compile", action="store_true", help="also measure all methods on a compiled model")
    parser.add_argument(
        "--peers", action="store_true", help="also measure torch.func.jvp, its vmap, and torchzero if it is installed"
    )
    parser.add_argument("--precision", default="32", choices=["32", "bf16-mixed", "bf16-true"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--loop", action="store_true", help="instead: compare a step of train.py with plain PyTorch and Lightning"
    )
    parser.add_argument("--scaling", action="store_true", help="instead: modelled step time against ranks")
    parser.add_argument("--chains", action="store_true", help="instead: derivatives along chains of small operations")
    parser.add_argument("--widths", nargs="+", type=int, default=[2048, 65536], help="of an operation, for --chains")
    parser.add_argument("--thin-wire", action="store_true", help="instead: seconds to an accuracy against bandwidth")
    parser.add_argument("--quick", action="store_true", help="three methods, two links, one target, for --thin-wire")
    parser.add_argument("--mbit", nargs="+", type=float, help="links, for --thin-wire")
    parser.add_argument("--seconds", type=float, help="of a run, for --thin-wire")
    parser.add_argument("--out", type=Path, default=Path("thin_wire"), help="folder, for --thin-wire")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8, 64], help="for --scaling")
    parser.add_argument("--gbit", nargs="+", type=float, default=[0.1, 1, 10], help="bandwidths, for --scaling")
    parser.add_argument("--latency-us", type=float, default=50, help="of the link, for --scaling")
    parser.add_argument("--json", type=Path, help="file for the rows")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, write the rows."""
    args = parse()
    with errors_as_lines(ValueError, RuntimeError):
        bench(args)


def bench(args: argparse.Namespace) -> None:
    """Measure what the command line asks for."""
    keep_freed_memory()
    check_arguments(args)
    if args.json and args.thin_wire:
        raise ValueError("--thin-wire writes its numbers into the folder of --out; leave out --json")
    if args.json:
        refuse_unwritable(args.json)
    if args.thin_wire:
        print_thin_wire(args)
        return
    if args.loop:
        print_loop_overhead(args)
        return
    torch.set_num_threads(args.threads)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    if args.scaling:
        print_scaling(args, device)
        return
    if args.chains:
        print_chains(args)
        return
    methods = methods_of(args.methods, args.tangents, args.num_tangents)
    peers = peers_of(args.num_tangents) if args.peers else []
    if args.compile:
        methods += [method._replace(compiled=True) for method in (*REFERENCES, *methods)]
    options = {"precision": args.precision, "rounds": args.rounds}
    with plain_console(stderr=True).status("") as status:
        parts = (
            measure(model, batch_size, [*methods, *peers], device, **options, progress=status.update)
            for model in args.models
            for batch_size in args.batch_sizes
        )
        rows = rows_of_parts(parts, lambda row: row.as_dict(), args.json)
    plain_console(150).print(table(rows))


def rows_of_parts(parts: Iterable[list[T]], as_dict: Callable[[T], dict[str, Any]], path: Path | None) -> list[T]:
    """All rows, written as JSON to a file after every part, so that Ctrl-C loses none, or to a device at the end."""
    rows: list[T] = []
    waits = path is not None and is_device(path)
    try:
        for part in parts:
            rows += part
            if not waits:
                write_rows(list(map(as_dict, rows)), path)
    finally:
        if waits and rows:
            write_rows(list(map(as_dict, rows)), path)
    return rows


def write_rows(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Write the rows as JSON, if there is a path."""
    if path is not None:
        write_atomically(json.dumps(rows, indent=2) + "\n", path)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise a ValueError for a number out of range or a model that does not exist, before anything is measured."""
    for name in ("batch_sizes", "num_tangents", "threads", "rounds", "widths", "ranks"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not (min(args.gbit) > 0 and 0 <= args.latency_us < math.inf):
        raise ValueError(f"--gbit must be positive and --latency-us at least 0, got {args.gbit} and {args.latency_us}")
    for name in set(args.models) - MODELS.keys():
        refuse_unknown(name)


def table(rows: list[Row]) -> Table:
    """A printable table of the rows."""
    grid = Table(title=f"one training step on {rows[0].device}, threads: {rows[0].threads}", box=SIMPLE_HEAD)
    for heading in ("model", "batch", "method", "tangents", "K"):
        grid.add_column(heading, no_wrap=True)
    for heading in ("ms", "per backprop", "per forward", "peak MiB", "per backprop", "per forward"):
        grid.add_column(heading, justify="right")
    for row in rows:
        low, high = row.ratio_to_backprop_quartiles
        method = f"{row.method}, compiled" if row.compiled else row.method
        named = (row.model, str(row.batch_size), method, row.tangents, str(row.num_tangents or ""))
        spread = f"{row.ratio_to_backprop:.2f} ({low:.2f}-{high:.2f})"
        times = (f"{row.step_ms:.2f}", spread, f"{row.ratio_to_forward:.2f}")
        memory = (f"{row.peak_mib:.1f}", f"{row.peak_to_backprop:.2f}", f"{row.peak_to_forward:.2f}")
        grid.add_row(*named, *times, *memory)
    return grid


def print_loop_overhead(args: argparse.Namespace) -> None:
    """Print the microseconds per step of the default run, of plain PyTorch and of plain Lightning."""
    silence_libraries()
    grid = Table(title="microseconds a step, digits MLP, one thread", box=SIMPLE_HEAD)
    for heading in ("method", "bare loop", "plain Lightning", "scripts/train.py", "to plain Lightning"):
        grid.add_column(heading, justify="right")
    parts = ([{"method": method, **loop_overhead(method)}] for method in args.methods)
    for row in rows_of_parts(parts, dict, args.json):
        method, *times, to_plain = row.values()
        grid.add_row(str(method), *(f"{time:.0f}" for time in times), f"{to_plain:.2f}")
    plain_console().print(grid)


def print_chains(args: argparse.Namespace) -> None:
    """Print the forward passes that derivatives along chains of small operations take."""
    rows = rows_of_parts(measure_chains(args.widths, args.rounds), ChainCost._asdict, args.json)
    plain_console(150).print(chains_table(rows))


def print_scaling(args: argparse.Namespace, device: torch.device) -> None:
    """Print milliseconds per step against the number of ranks, modelled from measured compute and the given link."""
    links = [Link(gbit * 1e9 / 8, args.latency_us / 1e6) for gbit in args.gbit]
    parts = (
        rows_of([measure_compute(model, batch_size, num_tangents, device, args.rounds)], args.ranks, links)
        for model in args.models
        for batch_size in args.batch_sizes
        for num_tangents in args.num_tangents
    )
    rows = rows_of_parts(parts, dict, args.json)
    plain_console(150).print(scaling_table(rows, f"ms a step, compute measured on {device}, link modelled"))


def print_thin_wire(args: argparse.Namespace) -> None:
    """Train over links of limited rate; write the table, the figure and the numbers after every run."""
    silence_libraries()
    methods, problems, mbit = list(METHODS), PROBLEMS, [1.0, 10.0, 100.0]
    if args.quick:
        methods, mbit = ["backprop", "backprop, PowerSGD", "gauss_newton"], [1.0, 100.0]
        problems = {"mnist_subset": PROBLEMS["mnist_subset"]._replace(targets=(0.7,), seconds=15)}
    if args.seconds is not None:
        problems = {data: problem._replace(seconds=args.seconds) for data, problem in problems.items()}
    mbit = args.mbit or mbit
    if not min(*mbit, *(problem.seconds for problem in problems.values())) > 0:
        raise ValueError("--mbit and --seconds must be positive")
    make_folder(args.out)
    jobs = [(data, method, rate) for data in problems for rate in mbit for method in methods]
    measured: list[Measured] = []
    console, progress = plain_console(), plain_console(stderr=True)
    for data, method, rate in track(jobs, "training over the link", console=progress, transient=True):
        measured.append(measure_pair(data, method, rate, problems[data]))
        page = write_report(measured, problems, args.out)
    console.print(page, soft_wrap=True, highlight=False)
    console.print(f"thin_wire.md, thin_wire.json, thin_wire.png and thin_wire.svg in {args.out}", soft_wrap=True)

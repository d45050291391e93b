"""Performance profiles on test functions: fgtrain profiles --methods backprop fwdgrad spsa --dims 2 10

Minimises 89 test functions from many starting points with a grid of learning rates. A step treats all starts and
learning rates of a function as one batch. Each method uses, for each function, the learning rate that solves the most
problems. The result is the share of problems solved (1 % of f(x_0) - f* left) against function evaluations: a pass
counts 1, each derivative in it 1, a reverse sweep 2. All methods have the same budget of evaluations. Writes
profiles.json, profiles.png and profiles.svg. After an interruption, the same command goes on.
"""

import argparse
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import track
from rich.table import Table

from fgtrain.errors import ConfigError
from fgtrain.figures import save
from fgtrain.lightning.atomic_files import write_atomically
from fgtrain.runs.messages import OneLineParser, errors_as_lines, plain_console, silence_libraries
from fgtrain.studies.compare.plan import compose_run
from fgtrain.studies.parts import Parts
from fgtrain.studies.profiles import Solved, draw, problems, share_solved, solve, speed_of_batching
from fgtrain.tasks import Rosenbrock


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["backprop", "fwdgrad", "spsa"], help="files in conf/method")
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 10])
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--evaluations", type=int, default=1000, help="budget of every start, at least 10")
    parser.add_argument("--rates", type=int, default=9, help="learning rates, a factor of sqrt(10) apart")
    parser.add_argument("--tolerance", type=float, default=0.01, help="share of f(x_0) - f* that may be left")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("profiles"), help="folder for the results")
    return parser.parse_args()


def main() -> None:
    """Solve the problems, write the results and print the table."""
    args = parse()
    with errors_as_lines(ValueError):
        configs = configs_of(args)
        with Parts(args) as parts:
            profile(args, configs, parts)


def configs_of(args: argparse.Namespace) -> dict[str, DictConfig]:
    """{method: its configuration}, after checks of all arguments.

    Raises:
        ConfigError: a number is out of range, such as a budget that is too small to show a profile.
    """
    if min(args.starts, args.rates) < 1:
        raise ConfigError(f"--starts and --rates must be at least 1, got {args.starts} and {args.rates}")
    if not 0 < args.tolerance < 1:
        raise ConfigError(f"--tolerance must be between 0 and 1, got {args.tolerance}")
    if args.evaluations < 10:
        raise ConfigError(f"--evaluations must be at least 10, got {args.evaluations}")
    silence_libraries()
    return {m: compose_run(["task=sphere"], f"method={m}", "run_dir=.")[0] for m in args.methods}


def profile(args: argparse.Namespace, configs: Mapping[str, DictConfig], parts: Parts) -> None:
    """Solve what the command line asks for."""
    torch.set_default_dtype(torch.float64)
    rates = [10 ** (-k / 2) for k in range(args.rates)]
    found = []
    jobs = [(m, f) for f in problems(args.dims, args.starts * args.rates) for m in args.methods]
    for method, function in track(jobs, "solving", console=plain_console(stderr=True), transient=True):
        estimator = instantiate(configs[method].method)
        options = {"tolerance": args.tolerance, "seed": args.seed}
        run = partial(solve, function, method, estimator, rates, args.starts, args.evaluations, **options)
        found.append(parts(Solved, f"{method} on {function.name} of {function.dim}", run))
    save(draw(found, args.evaluations), args.out / "profiles")
    rows = [solved._asdict() for solved in found]
    write_atomically(json.dumps(rows, indent=1) + "\n", args.out / "profiles.json")
    powers = [10.0**k for k in range(1, 1 + int(math.log10(args.evaluations)))]
    budgets = torch.tensor(sorted({*powers, float(args.evaluations)}))
    table = Table(title=f"share of {len(jobs) // len(args.methods) * args.starts} problems solved within evaluations")
    for name in ("method", *(f"{budget:.0f}" for budget in budgets.tolist())):
        table.add_column(name, justify="right")
    for method in args.methods:
        shares = share_solved([s for s in found if s.method == method], budgets)
        table.add_row(method, *(f"{share:.2f}" for share in shares.tolist()))
    plain_console().print(table)
    estimator, rows_at_once = instantiate(configs[args.methods[-1]].method), args.starts * args.rates
    faster = speed_of_batching(lambda count: Rosenbrock(count, "domain", dim=max(args.dims)), estimator, rows_at_once)
    print(f"one iteration of {rows_at_once} starts and learning rates is {faster:.0f} times faster than one at a time")
    print(f"profiles.json, profiles.png and profiles.svg in {args.out}")

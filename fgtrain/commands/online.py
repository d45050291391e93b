"""Learning on a stream compared with backpropagation through time: fgtrain online --quick

A recurrent network of independent units learns to recall a symbol that the stream showed `lag` steps before. The
settings are those of conf/experiment/online.yaml; the longest initial time constant of a unit is four times the lag.
The learning rate of every way is the best of the same three at the shortest lag, with a third of the updates. Writes
online.json, online.png and online.svg. After an interruption, the same command goes on.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: silences its process groups

import torch
from hydra.utils import instantiate
from rich.progress import track
from rich.table import Table

from fgtrain.errors import ConfigError
from fgtrain.figures import save
from fgtrain.lightning.atomic_files import write_atomically
from fgtrain.runs.messages import OneLineParser, errors_as_lines, plain_console, silence_libraries
from fgtrain.studies.compare.plan import compose_run
from fgtrain.studies.online import RATES, SAME_GRADIENTS, WAYS, Cost, Recalled, cost, draw, learn, table_of
from fgtrain.studies.parts import Parts


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="lag 20, lengths 100 and 1,000, 300 updates: two minutes")
    parser.add_argument("--lags", nargs="+", type=int, help="steps from a symbol to its question")
    parser.add_argument("--lengths", nargs="+", type=int, help="lengths of the streams whose cost is measured")
    parser.add_argument("--updates", type=int, help="of chunks of 100 steps; default: 300, or the lag if that is more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("online"), help="folder for the results")
    return parser.parse_args()


def main() -> None:
    """Do the study, write the results and print the table."""
    args = parse()
    with errors_as_lines(ValueError):
        check_arguments(args)
        with Parts(args) as parts:
            study(args, parts)


def check_arguments(args: argparse.Namespace) -> None:
    """Fill in lags and lengths, and refuse numbers out of range."""
    args.lags = args.lags or ([20] if args.quick else [50, 100, 200, 500, 1000])
    args.lengths = args.lengths or ([100, 1000] if args.quick else [100, 1000, 10_000])
    if min(*args.lags, *args.lengths, *([] if args.updates is None else [args.updates])) < 2:
        raise ConfigError("--lags, --lengths and --updates must be at least 2")
    if not 0 <= args.seed < 2**32 - 1:  # the next one is the seed of the search
        raise ConfigError(f"--seed must be from 0 to {2**32 - 2}, got {args.seed}")


def study(args: argparse.Namespace, parts: Parts) -> None:
    """Learn at every lag and measure at every length, as the command line asks."""
    silence_libraries()
    torch.set_num_threads(1)
    console = plain_console(stderr=True)
    trained = [way for way in WAYS if way not in SAME_GRADIENTS]
    searched = track(trained, "searching learning rates", console=console, transient=True)
    shortest = min(args.lags)
    rates = {
        way: min(
            (_learn(parts, way, shortest, lr, _updates(args, shortest) // 3, args.seed + 1) for lr in RATES),
            key=lambda found: found.loss,
        ).lr
        for way in searched
    }
    jobs = track([(w, lag) for lag in args.lags for w in trained], "learning", console=console, transient=True)
    recalled = [_learn(parts, way, lag, rates[way], _updates(args, lag), args.seed) for way, lag in jobs]
    sizes = track([(way, n) for way in WAYS for n in args.lengths], "measuring", console=console, transient=True)
    costs = [parts(Cost, f"cost of {way} at {n}", partial(_cost, way, n, args.seed)) for way, n in sizes]
    save(draw(recalled, costs), args.out / "online")
    found = {"recalled": [r._asdict() for r in recalled], "costs": [c._asdict() for c in costs]}
    write_atomically(json.dumps(found, indent=1) + "\n", args.out / "online.json")
    rows = table_of(recalled, costs)
    table = Table(title="symbols recalled; peak memory and time in forward passes by length")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in rows[0]))
    plain_console(140).print(table)
    print(f"online.json, online.png and online.svg in {args.out}")


def _updates(args: argparse.Namespace, lag: int) -> int:
    return args.updates or max(300, lag)


def _learn(parts: Parts, way: str, lag: int, lr: float, updates: int, seed: int) -> Recalled:
    return parts(Recalled, f"{way} at {lag}, lr={lr}, seed={seed}", partial(_train, way, lag, lr, updates, seed))


def _train(way: str, lag: int, lr: float, updates: int, seed: int) -> Recalled:
    cfg, _ = compose_run(
        ["experiment=online"], f"data.lag={lag}", f"model.memory={4 * lag}", f"seed={seed}", f"lr={lr}"
    )
    torch.manual_seed(seed)
    data = instantiate(cfg.data)
    model = instantiate(cfg.model, vocab_size=data.vocab_size)
    optimizer = instantiate(cfg.optimizer)(model.parameters())
    return learn(way, data, model, optimizer, updates, cfg.clip_grad_norm)


def _cost(way: str, length: int, seed: int) -> Cost:
    cfg, _ = compose_run(["experiment=online"], f"seed={seed}")
    torch.manual_seed(seed)
    data = instantiate(cfg.data)
    return cost(way, data, instantiate(cfg.model, vocab_size=data.vocab_size), length)

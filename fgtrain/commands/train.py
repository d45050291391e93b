"""Train with any method: fgtrain train method=fwdgrad

Everything is set by Hydra overrides: method=backprop, tangents=low_rank, method.num_tangents=8, data=mnist, model=cnn,
task=beale, lr=0.01, trainer.max_steps=5000; -m method=backprop,fwdgrad seed=0,1,2 sweeps. --info lists the options.

eval "$(fgtrain train -sc install=bash)" lets bash complete commands and arguments; install=fish and install=zsh exist.
"""

import os
from pathlib import Path

from omegaconf import DictConfig

from fgtrain.runs.cli import choices, run_app
from fgtrain.runs.results import print_results
from fgtrain.runs.starters import is_follower
from fgtrain.runs.sweeps import objective


def main() -> None:
    """Run what the command line asks for."""
    run_app(train, config_name="train", description=__doc__)


def train(cfg: DictConfig) -> float:
    """Train, print where the results are, and return the value that a search over configurations minimises."""
    from fgtrain.runs.launch import launch  # late: help, completion and most mistakes need not wait for PyTorch

    results = launch(cfg, choices())
    if not (cfg.quiet or is_follower()):
        print_results(results, Path(os.path.relpath(Path(cfg.run_dir))))
    return objective(results)

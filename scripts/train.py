"""Train with any method: python scripts/train.py method=fwdgrad

Everything is set by Hydra overrides: method=backprop, tangents=low_rank, method.num_tangents=8, data=mnist, model=cnn,
task=beale, lr=0.01, trainer.max_steps=5000; -m method=backprop,fwdgrad seed=0,1,2 sweeps. --help lists the groups.
"""

import os
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # before torch: silences its profiler

from omegaconf import DictConfig

from fgtrain.runs.cli import choices, run_app
from fgtrain.runs.launch import launch
from fgtrain.runs.results import print_results
from fgtrain.runs.sweeps import objective


def main(cfg: DictConfig) -> float:
    """Train, print where the results are, and return the value that a search over configurations minimises."""
    results = launch(cfg, choices())
    if not cfg.quiet:
        print_results(results, Path(os.path.relpath(cfg.run_dir)))
    return objective(results)


if __name__ == "__main__":
    run_app(main, config_name="train")

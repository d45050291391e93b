"""Train with any method: python scripts/train.py method=fwdgrad

Everything is set by Hydra overrides: method=backprop, tangents=low_rank, method.num_tangents=8, data=mnist, model=cnn,
task=beale, lr=0.01, trainer.max_steps=5000; -m method=backprop,fwdgrad seed=0,1,2 sweeps. --help lists the groups.
"""

import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fgtrain.cli import run_app
from fgtrain.lightning.launch import launch
from fgtrain.lightning.run import print_results


def main(cfg: DictConfig) -> None:
    """Train, and say where the results are."""
    results = launch(cfg, HydraConfig.get().runtime.choices)
    print_results(results, Path(os.path.relpath(cfg.run_dir)))


if __name__ == "__main__":
    run_app(main, config_name="train")

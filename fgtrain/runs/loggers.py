"""Where a run writes its curves: `logger=tensorboard`, `csv`, `wandb`, `mlflow`, `none`, or `[tensorboard,csv]`.

All of them get the metrics, the configuration and the final metrics by Lightning's interface. Histograms and the
layout of charts are TensorBoard's; pictures go to TensorBoard and Weights & Biases.
"""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from fgtrain.errors import ConfigError
from fgtrain.lightning.callbacks.dashboard import Curves


def loggers_of(cfg: DictConfig) -> list[Logger]:
    """The loggers of a run. A run of a version without the group wrote to TensorBoard.

    Raises:
        ConfigError: a logger's package is not installed.
    """
    if cfg.logger is None:
        return [Curves(cfg.run_dir, name="", version="", default_hp_metric=False)]
    return [_logger(name, node) for name, node in cfg.logger.items()]


def _logger(name: Any, node: DictConfig) -> Logger:
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        raise ConfigError(f"logger={name} needs a package that is not installed; pip install {name}") from error

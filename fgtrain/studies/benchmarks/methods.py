"""The methods of conf/method, built as scripts/train.py builds them."""

from collections.abc import Sequence
from itertools import product

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fgtrain.runs.cli import CONF
from fgtrain.runs.config_check import check
from fgtrain.studies.benchmarks.steps import Method


def methods_of(names: Sequence[str], tangents: Sequence[str], num_tangents: Sequence[int]) -> list[Method]:
    """Every named method, combined with every law and number of tangents that it takes.

    Args:
        names: files in conf/method.
        tangents: files in conf/tangents.
        num_tangents: values of K.

    Raises:
        HydraException: there is no such file.
        ConfigError: a method does not accept a value of K.
    """
    found = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name in names:
            node = _compose(f"method={name}").method
            laws = tangents if "tangents" in node and OmegaConf.is_interpolation(node, "tangents") else [""]
            counts = num_tangents if "num_tangents" in node else [None]
            for law, count in product(laws, counts):
                options = [f"tangents={law}"] if law else []
                options += [f"method.num_tangents={count}"] if count is not None else []
                estimator = instantiate(_compose(f"method={name}", *options).method)
                found.append(Method(name, estimator, law, count or 0))
    return found


def _compose(*overrides: str) -> DictConfig:
    cfg = compose("train", [*overrides, "run_dir=."])
    check(cfg)
    return cfg

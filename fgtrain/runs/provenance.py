"""The origin of a run, saved with it so that it can be repeated."""

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import AliasToken, YAMLError, scan

from fgtrain.errors import ConfigError
from fgtrain.lightning.atomic_files import write_atomically
from fgtrain.runs.config import refuse_interpolation, to_saved, typed

PACKAGES = ("fgtrain", "torch", "torchvision", "lightning", "hydra-core", "numpy", "scikit-learn", "tensorboard")
REQUIRED = ("lr", "data", "model", "method", "optimizer", "trainer", "task")
"""Keys that the configuration of a run always sets."""

_RUN_DIR = "<run_dir>"


def save_provenance(cfg: DictConfig, choices: Mapping[str, str]) -> None:
    """Write config.yaml and provenance.json into the run's folder.

    config.yaml is resolved, except for the folder itself and values from the environment. It is a Hydra configuration:
    `scripts/train.py --config-dir RUN --config-name config` runs it again, in a new folder.
    """
    run_dir = Path(cfg.run_dir)
    movable = cfg.copy()
    movable.run_dir = _RUN_DIR
    plain = _replaced(to_saved(movable), _RUN_DIR, "${run_dir}")
    plain |= {"run_dir": "${hydra:runtime.output_dir}", "resume": None}
    hydra = {
        "run": {"dir": "runs/${now:%Y-%m-%d}/${now:%H-%M-%S}_${method_name:}_${unique:}"},
        "output_subdir": None,
        "runtime": {"choices": {name: choices.get(name) for name in ("method", "task", "data", "model")}},
    }
    defaults = ["schema", "_self_", {"override hydra/job_logging": "warnings"}]
    saved = OmegaConf.create({"defaults": defaults, **plain, "hydra": hydra})
    write_atomically(OmegaConf.to_yaml(saved), run_dir / "config.yaml")  # a resumed run is compared with it
    write_atomically(json.dumps(provenance(cfg), indent=2) + "\n", run_dir / "provenance.json")


def provenance(cfg: DictConfig) -> dict[str, Any]:
    """The command, the seed, the versions of packages and the commit of the code."""
    return {
        "command": sys.argv,
        "seed": cfg.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git(Path(__file__).parent),
    }


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint, which may be a link to it; None if there is none with a config."""
    above = (*checkpoint.absolute().parents[:3], *checkpoint.resolve().parents[:3])
    return next((folder for folder in above if (folder / "config.yaml").is_file()), None)


def load_config(run_dir: Path) -> DictConfig:
    """The configuration of a run, for `fgtrain.runs.build.build`.

    Raises:
        ConfigError: the folder contains none, or it is malformed.
    """
    refuse_interpolation(run_dir)
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; give the folder of a run")
    try:
        if any(
            isinstance(token, AliasToken) for token in scan(path.read_text())
        ):  # a few lines of aliases can fill the memory
            raise ValueError("it has YAML aliases, which runs never write; write the values out")
        saved = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(saved, dict):
        raise ConfigError(f"{path} is not the configuration of a run: it holds a {type(saved).__name__}")
    own = {name: value for name, value in saved.items() if name not in ("defaults", "hydra")}
    try:
        cfg = typed(own | {"run_dir": str(run_dir)})
    except ConfigKeyError as error:
        raise ConfigError(f"{path} is not the configuration of a run: {str(error).splitlines()[0]}") from error
    if missing := [name for name in REQUIRED if own.get(name) is None]:
        raise ConfigError(f"{path} is not the whole configuration of a run: it has no {', '.join(missing)}")
    return cfg


def _replaced(tree: Any, old: str, new: str) -> Any:
    if isinstance(tree, dict):
        return {key: _replaced(value, old, new) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_replaced(value, old, new) for value in tree]
    return tree.replace(old, new) if isinstance(tree, str) else tree


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    """The commit of the code and whether it has uncommitted changes; None outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(changes.stdout.strip())}

"""The keys that the command of a resumed run may change."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fgtrain.errors import ConfigError
from fgtrain.lightning.checkpoints import read_checked, refuse_incomplete
from fgtrain.runs.config import signature_of, to_plain, to_saved
from fgtrain.runs.provenance import load_config, run_of

LENGTH = ("trainer.max_steps", "trainer.max_epochs", "trainer.max_time", "trainer.min_steps", "trainer.min_epochs")
LENGTH += ("data.num_steps", "callbacks.early_stopping")
"""The length of training; a task without data counts its steps in data.num_steps."""

STOPS = ("trainer.max_time", "callbacks.early_stopping")

FREE = ("callbacks", "logger", "trainer.profiler", "quiet", "resume", "self_check", "data.root")
FREE += ("max_skipped_steps", "max_skipped_share", "detect_divergence")
FREE += ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.inference_mode")
FREE += ("trainer.log_every_n_steps", "trainer.val_check_interval", "trainer.check_val_every_n_epoch")
FREE += ("trainer.limit_val_batches", "trainer.limit_test_batches", "trainer.num_sanity_val_steps")
FREE += ("distributed.check_every_n_steps", "distributed.timeout_seconds")
"""Keys that do not affect the updates: logging, checks, checkpoints and hardware."""


def stop_holds(cfg: DictConfig, checkpoint: Path) -> bool:
    """Whether an earlier stop, by early stopping or trainer.max_time, still holds under `cfg`.

    Raises:
        ConfigError: the run of the checkpoint cannot continue under `cfg`. The message names a key that differs, with
            both values, or a length that the run has already reached.
    """
    run_dir = run_of(checkpoint)
    changed = {} if run_dir is None else _changes(cfg, run_dir)
    longer = {key for key in changed if _is_of(LENGTH, key)}
    if not longer or checkpoint.is_dir():
        return True
    saved = read_checked(checkpoint)
    refuse_incomplete(saved, checkpoint)
    loops = saved["loops"]["fit_loop"]
    for key, done in (("max_steps", saved["global_step"]), ("max_epochs", saved["epoch"])):
        limit = cfg.trainer.get(key)
        if f"trainer.{key}" in changed and limit is not None and 0 <= limit <= done:
            raise ConfigError(
                f"trainer.{key}={limit}: the run of {run_dir} has done {done} already; raise it to continue, or start "
                "another run in another folder with hydra.run.dir=..."
            )
    stops = {key for key in longer if _is_of(STOPS, key)}
    if loops["state_dict"].get("should_stop", False) and not stops:
        raise ConfigError(
            f"the run of {run_dir} was ended by early stopping or trainer.max_time, not by its length; to continue, "
            "raise callbacks.early_stopping.patience or trainer.max_time"
        )
    return not stops


def is_extended(cfg: DictConfig, run_dir: Path) -> bool:
    """Whether `cfg` changes the length of the run in a folder.

    Raises:
        ConfigError: it changes a key that must not change.
    """
    return any(_is_of(LENGTH, key) for key in _changes(cfg, run_dir))


def _changes(cfg: DictConfig, run_dir: Path) -> dict[str, tuple[Any, Any]]:
    """{key: (value in the folder, value in `cfg`)} of the keys that differ and may differ."""
    if not (run_dir / "config.yaml").is_file():
        return {}
    saved = load_config(run_dir)
    saved.run_dir = cfg.run_dir
    before, now = (dict(_leaves(to_plain(config))) for config in (saved, cfg))
    said_before, said_now = (dict(_leaves(to_saved(config))) for config in (saved, cfg))
    for key in now.keys() - before.keys():  # arguments that are newer than the run
        before[key] = said_before[key] = _default(saved, key)
    keys = [key for key in (*now, *(before.keys() - now.keys())) if before.get(key, _NONE) != now.get(key, _NONE)]
    keys.sort(key=lambda key: not key.endswith("_target_"))  # classes before their arguments
    for key in keys:
        if not _is_of(FREE + LENGTH, key):
            others = sum(not _is_of(FREE + LENGTH, k) for k in keys) - 1
            raise ConfigError(
                f"{key} is {said_before.get(key, _NONE)} in the run of {run_dir} and {said_now.get(key, _NONE)} in "
                f"this command{f' ({others} more keys differ)' if others else ''}: a run must continue with the values "
                "it began with; use the same value, or start another run in another folder with hydra.run.dir=..."
            )
    return {key: (before.get(key, _NONE), now.get(key, _NONE)) for key in keys}


_NONE = "not set"


def _default(cfg: DictConfig, key: str) -> Any:
    """The default of an argument that `cfg` does not give to its `_target_`."""
    parent, _, name = key.rpartition(".")
    target = OmegaConf.select(cfg, f"{parent}._target_") if parent else None
    if target is None:
        return _NONE
    argument = signature_of(target).get(name)
    return _NONE if argument is None or argument.default is argument.empty else argument.default


def _is_of(groups: tuple[str, ...], key: str) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value

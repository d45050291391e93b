"""Evaluate a checkpoint on a split, with the model and data of the run that wrote it."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from omegaconf import DictConfig

from fgtrain.data import Steps
from fgtrain.errors import ConfigError, StorageError
from fgtrain.lightning.atomic_files import refuse_unwritable, write_atomically
from fgtrain.lightning.checkpoints import NAMES, first_good, list_checkpoints, read_checked
from fgtrain.runs.build import build
from fgtrain.runs.library_errors import library_errors_named
from fgtrain.runs.provenance import load_config, run_of
from fgtrain.runs.results import read_results
from fgtrain.runs.world import ONE_PROCESS

SPLITS = ("train", "val", "test")


@library_errors_named()
def evaluate(checkpoint: Path, split: str, out: Path | None = None) -> dict[str, Any]:
    """Metrics of a checkpoint on a split, written as results.json.

    Args:
        checkpoint: a .ckpt file in the folder of its run, or that folder, which stands for its last checkpoint.
        split: "train", "val" or "test".
        out: file to write; None for evaluation_<checkpoint>_<split>.json in the run's folder.

    Raises:
        ConfigError: a file or a split does not exist, or the checkpoint belongs to another model.
        CheckpointError: the file is damaged or not a checkpoint.
        StorageError: the results cannot be written.
    """
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split}")
    if checkpoint.is_dir():
        found = list_checkpoints(checkpoint)
        if not found:
            raise ConfigError(f"{checkpoint} contains no checkpoint ({' or '.join(NAMES)})")
        checkpoint = first_good(found)
    run_dir, cfg = _run_of(checkpoint)
    state = read_checked(checkpoint)
    results = read_results(run_dir) or {}
    out = out or run_dir / f"evaluation_{checkpoint.stem}_{split}.json"
    try:
        refuse_unwritable(out)
    except StorageError as error:
        raise StorageError(f"{error}; --out names another file") from error
    cfg.quiet, cfg.resume = True, None
    cfg.trainer = {**(cfg.trainer or {}), **ONE_PROCESS}
    module, data, trainer, _ = build(cfg)
    trainer.loggers = []
    if isinstance(data, Steps):
        raise ConfigError(f"{checkpoint} is of a task without data, which has no splits; see its results.json")
    try:
        module.load_state_dict(state["state_dict"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:  # torch raises these if the parts do not fit
        first = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"{checkpoint} does not fit the run of {run_dir / 'config.yaml'}: {first}") from error
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    loader = {"train": data.train_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}[split]()
    if split == "train" and isinstance(loader, (list, tuple, dict)):
        loader = CombinedLoader(loader, "max_size_cycle")  # as in training
    found = trainer.test(module, loader, verbose=False)
    if not any(found):
        raise ConfigError(f"the {split} split of {type(data).__name__} is empty")
    metrics = {name.replace("test/", f"{split}/"): value for of_loader in found for name, value in of_loader.items()}
    results |= {"seed": cfg.seed, "checkpoint": checkpoint.name, "steps": state.get("global_step"), "metrics": metrics}
    results["num_parameters"] = sum(p.numel() for p in module.model.parameters())
    write_atomically(json.dumps(results, indent=2) + "\n", out)
    return results | {"written": str(out)}


def _run_of(checkpoint: Path) -> tuple[Path, DictConfig]:
    """The folder of the run that wrote a checkpoint, and its configuration."""
    if not checkpoint.is_file():
        raise ConfigError(f"{checkpoint} is not a file; give the path of a checkpoint (.ckpt)")
    if (folder := run_of(checkpoint)) is not None:
        return folder, load_config(folder)
    raise ConfigError(
        f"{checkpoint} is not in a run's folder: there is no config.yaml beside it or above it; copy that of its run "
        f"to {checkpoint.with_name('config.yaml')}"
    )

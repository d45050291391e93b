"""A checkpoint on a split: the same model, data and results as the run that wrote it."""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from fgtrain.errors import ConfigError
from fgtrain.lightning.provenance import load_config
from fgtrain.lightning.run import build
from fgtrain.tasks import Function

SPLITS = ("train", "val", "test")


def evaluate(checkpoint: Path, split: str, out: Path | None = None) -> dict[str, Any]:
    """Metrics of a checkpoint on a split, written as results.json.

    Args:
        checkpoint: a .ckpt file in a run's folder, whose config.yaml says what it is of.
        split: "train", "val" or "test".
        out: file to write; None names it evaluation_<checkpoint>_<split>.json in the run's folder.

    Raises:
        ConfigError: a file or a split does not exist, or the checkpoint is of another model.
    """
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split}")
    run_dir, cfg = _run_of(checkpoint)
    cfg.quiet, cfg.resume = True, None
    module, data, trainer, _ = build(cfg)
    trainer.loggers = []
    if isinstance(module.task, Function):
        raise ConfigError(f"{checkpoint} is of a test function, which has no splits; its results.json says it all")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        module.load_state_dict(state["state_dict"])
    except (RuntimeError, KeyError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"{checkpoint} does not fit the run of {run_dir / 'config.yaml'}: {first}") from error
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    loader = {"train": data.train_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}[split]()
    assert isinstance(loader, DataLoader) or hasattr(loader, "__iter__")
    (metrics,) = trainer.test(module, loader, verbose=False)
    metrics = {name.replace("test/", f"{split}/"): value for name, value in metrics.items()}
    results = json.loads((run_dir / "results.json").read_text()) if (run_dir / "results.json").exists() else {}
    results |= {"seed": cfg.seed, "checkpoint": checkpoint.name, "steps": state["global_step"], "metrics": metrics}
    results["num_parameters"] = sum(p.numel() for p in module.model.parameters())
    out = out or run_dir / f"evaluation_{checkpoint.stem}_{split}.json"
    out.write_text(json.dumps(results, indent=2) + "\n")
    return results | {"written": str(out)}


def _run_of(checkpoint: Path) -> tuple[Path, DictConfig]:
    """The folder of the run that wrote a checkpoint, and its configuration."""
    if not checkpoint.is_file():
        raise ConfigError(f"{checkpoint} is no file; give the path of a checkpoint (.ckpt)")
    for folder in checkpoint.absolute().parents[:3]:
        if (folder / "config.yaml").is_file():
            return folder, load_config(folder)
    raise ConfigError(f"{checkpoint} is not in a run's folder: there is no config.yaml beside it or above")

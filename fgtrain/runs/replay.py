"""Train again from a replay log: the same loop, with an estimator that reads derivatives instead of computing them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from fgtrain.data import Steps
from fgtrain.errors import CheckpointError
from fgtrain.estimators import Estimate, GradientEstimator
from fgtrain.estimators.base import Reduce
from fgtrain.forward_ad.passes import LossFn
from fgtrain.lightning.callbacks.replay_log import FORMAT, PARTS, digest
from fgtrain.lightning.checkpoints import read_checked
from fgtrain.lightning.module import EstimatorModule
from fgtrain.runs.build import build
from fgtrain.runs.provenance import load_config
from fgtrain.runs.world import ONE_PROCESS


class Replayed(GradientEstimator):
    """Rebuilds the gradients of another estimator from its logged derivatives.

    Args:
        estimator: the other estimator.
        derivatives: (batches, K), in the order of the batches.
    """

    scalar_reducible = True

    def __init__(self, estimator: GradientEstimator, derivatives: Tensor) -> None:
        super().__init__()
        self.estimator = estimator
        self.rows: Iterator[Tensor] = iter(derivatives)

    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        row = next(self.rows).to(next(model.parameters()).device)
        with torch.no_grad():
            grads = self.estimator.replay(model, row, generator)
        return Estimate(row.new_zeros(()), grads, row)


class _Replaying(L.Callback):
    """Checks the initial weights and ends training where the log ends."""

    def __init__(self, path: Path, initial: str, batches: int) -> None:
        self.path = path
        self.initial = initial
        self.left = batches

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if digest(pl_module) != self.initial:
            raise CheckpointError(
                f"{self.path} starts from other weights than this machine draws from the same seed; replay it with the "
                "packages in provenance.json"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.left -= 1
        trainer.should_stop = self.left == 0


def replay(run_dir: Path) -> tuple[EstimatorModule, int]:
    """The final model of a run and the number of its steps, from `config.yaml` and `replay.pt` alone.

    Raises:
        CheckpointError: the log is damaged, or leads to other weights than those of the run.
        ConfigError: the folder is not that of a run.
    """
    path = run_dir / "replay.pt"
    log = _read_log(path)
    cfg = load_config(run_dir)
    cfg.callbacks, cfg.detect_divergence, cfg.self_check, cfg.resume, cfg.quiet = {}, None, False, None, True
    limits = {"limit_train_batches": None, "limit_val_batches": 0, "overfit_batches": 0.0, "max_time": None}
    cfg.trainer = {**(cfg.trainer or {}), **limits, **ONE_PROCESS}
    module, _, trainer, _ = build(cfg)
    trainer.loggers = []
    derivatives = log["derivatives"]
    module.estimator = Replayed(module.estimator, derivatives)
    trainer.callbacks.append(_Replaying(path, log["initial"], len(derivatives)))  # ty: ignore[missing-attribute]
    trainer.fit(module, Steps(log["batches_per_epoch"]))
    if trainer.global_step != log["steps"] or digest(module) != log["final"]:
        raise CheckpointError(
            f"{path} leads to other weights than the run had after {log['steps']} steps; if the run was made longer, "
            "its learning rates no longer follow from config.yaml"
        )
    return module, log["steps"]


def _read_log(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"there is no {path}; only a run with callbacks=replay_log writes one")
    log = read_checked(path)
    if log.get("format") != FORMAT or not log.keys() >= PARTS:
        raise CheckpointError(f"{path} is not a replay log of format {FORMAT}; callbacks=replay_log writes one")
    rows = log["derivatives"]
    sound = {
        "derivatives": isinstance(rows, Tensor)
        and rows.layout is torch.strided
        and rows.dim() == 2
        and rows.numel() > 0
        and rows.is_floating_point(),
        "initial": isinstance(log["initial"], str),
        "final": isinstance(log["final"], str),
        "steps": type(log["steps"]) is int and log["steps"] >= 0,
        "batches_per_epoch": type(log["batches_per_epoch"]) is int and log["batches_per_epoch"] > 0,
    }
    bad = [name for name, is_sound in sound.items() if not is_sound]
    if bad:
        raise CheckpointError(f"{path} is damaged: {', '.join(bad)} cannot come from a run")
    return log

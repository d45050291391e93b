"""A run stored as its seed and K floats a step, which suffice to repeat weight perturbation without the data."""

import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from fgtrain.errors import ConfigError
from fgtrain.lightning.atomic_files import save_atomically
from fgtrain.lightning.module import EstimatorModule

FORMAT = 1
PARTS = {"format", "initial", "final", "steps", "batches_per_epoch", "derivatives"}


class ReplayLog(L.Callback):
    """Writes the directional derivatives of every step, or the weights of directions: 4 K bytes in single precision.

    `scripts/replay.py RUN` rebuilds the weights from them. Buffers (BatchNorm statistics) are functions of the data and
    cannot be rebuilt. The file is written with every checkpoint and at the end.

    Args:
        path: the file of the log.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._rows: list[Tensor] = []
        self._initial = ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, EstimatorModule)
        estimator = pl_module.estimator
        if not estimator.scalar_reducible:
            raise ConfigError(
                f"a replay log needs estimates that depend on seeds and derivatives only, unlike those of "
                f"{type(estimator).__name__}; use ForwardGradient, GaussNewton, SPSA or MeZO"
            )
        if trainer.world_size > 1 and pl_module.distributed_tangents != "shared":
            raise ConfigError("a replay log needs distributed.tangents=shared")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._initial = self._initial or digest(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        row = outputs["replayed"]
        self._rows.append(torch.full_like(row, torch.nan) if outputs["skipped"] else row)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._write(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"derivatives": self._stacked(), "initial": self._initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = list(state_dict["derivatives"])
        self._initial = state_dict["initial"]

    def _stacked(self) -> Tensor:
        if len(self._rows) > 1:
            self._rows = list(torch.stack([row.to(self._rows[-1].device) for row in self._rows]).cpu())
        return torch.stack(self._rows) if self._rows else torch.empty(0, 0)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        content = {
            "format": FORMAT,
            "initial": self._initial,
            "final": digest(pl_module),
            "steps": trainer.global_step,
            "batches_per_epoch": int(trainer.num_training_batches),
            "derivatives": self._stacked(),
        }
        save_atomically(content, self.path)


def digest(module: nn.Module) -> str:
    """SHA-256 of the trainable parameters, in the order of their names."""
    found = hashlib.sha256()
    for name, p in sorted(module.named_parameters()):
        if p.requires_grad:
            found.update(name.encode() + p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

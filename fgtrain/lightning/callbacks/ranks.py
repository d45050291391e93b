"""Checks that all processes have the same parameters, and logs the bytes that they send."""

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgtrain.distributed import Ranks
from fgtrain.errors import RanksDiffer
from fgtrain.lightning.module import EstimatorModule
from fgtrain.network.sharding import is_sharded


class RankCheck(L.Callback):
    """Logs the bytes that a step sends, and ends the run if ranks no longer have the same parameters.

    `comm/bytes_per_step` is what one rank sends per optimizer step, see `fgtrain.distributed.Ranks`. A check sends
    eight bytes. Parameters that are sharded over ranks are not compared.

    Args:
        check_every_n_steps: optimizer steps between two checks, the first after the first step; 0 for none.
        log_every_n_steps: optimizer steps between two entries in the log.

    Raises:
        RanksDiffer: the message names the first parameter that differs, or the steps at which the ranks start.
    """

    def __init__(self, check_every_n_steps: int = 1000, log_every_n_steps: int = 50) -> None:
        self.check_every_n_steps = check_every_n_steps
        self.log_every_n_steps = log_every_n_steps
        self.bytes_per_step = 0.0
        self._first_step = 0
        self._last_check = -1
        self._sent = self._sent_before = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step = trainer.global_step
        assert isinstance(pl_module, EstimatorModule)
        first = torch.tensor(trainer.global_step, device=pl_module.device)
        steps = [int(step) for step in pl_module.ranks.gather(first)]
        if len(set(steps)) > 1:
            raise RanksDiffer(
                f"the ranks start at steps {steps}, so not from the same checkpoint; name one that every rank finds: "
                "ckpt_path=..."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, EstimatorModule)
        self._sent_before = pl_module.ranks.bytes_sent

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, EstimatorModule)
        ranks, done = pl_module.ranks, trainer.global_step - self._first_step
        self._sent += ranks.bytes_sent - self._sent_before  # the step's bytes only, without checks and validation
        if done == 0:
            return
        self.bytes_per_step = self._sent / done
        if trainer.global_step % self.log_every_n_steps == 0:
            self._log(trainer)
        every = self.check_every_n_steps
        if ranks.size > 1 and every and (done == 1 or done % every == 0) and done != self._last_check:
            self._last_check = done
            check_agreement(pl_module.model, ranks, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._first_step:  # else keep the interrupted run's metrics
            self._log(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.bytes_per_step:  # for a run that is killed after its last step and resumed without another one
            trainer.callback_metrics["comm/bytes_per_step"] = torch.tensor(self.bytes_per_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                dist.broadcast(buffer, 0)

    def _log(self, trainer: L.Trainer) -> None:
        metrics = {"comm/bytes_per_step": torch.tensor(self.bytes_per_step)}
        trainer.callback_metrics.update(metrics)
        for logger in trainer.loggers:
            logger.log_metrics({"comm/bytes_per_step": self.bytes_per_step}, step=trainer.global_step)


def check_agreement(model: nn.Module, ranks: Ranks, step: int) -> None:
    """Compare the bits of the parameters on all ranks.

    Raises:
        RanksDiffer: on every rank; the message names the first parameter that differs.
    """
    replicated = {name: p for name, p in model.named_parameters() if not is_sharded(p)}
    if not replicated:
        return
    sums = torch.stack([_sum_of_bits(p) for p in replicated.values()])
    if len({int(total) for total in ranks.gather(sums.sum())}) > 1:
        table = torch.stack(ranks.gather(sums))  # (R, parameters)
        differs = (table != table[0]).any(0)
        if differs.any():
            column = int(differs.int().argmax())
            name = list(replicated)[column]
            others = [rank for rank in range(ranks.size) if table[rank, column] != table[0, column]]
            raise RanksDiffer(
                f"after step {step} parameter {name} of rank {', '.join(map(str, others))} differs from rank 0's, so "
                "the ranks train different models; look for random or rank-dependent parts of the model, the "
                "callbacks or the optimizer, and resume from a checkpoint"
            )


def _sum_of_bits(p: Tensor) -> Tensor:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
    return bits.contiguous().view(integers[bits.element_size()]).sum(dtype=torch.int64)

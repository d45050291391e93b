"""How Lightning runs several processes of fgtrain: replicas without a gradient all-reduce."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

STARTUP = timedelta(minutes=30)  # one rank may be downloading the data


class Replicas(DDPStrategy):
    """The same model on every rank, without DistributedDataParallel around it.

    Estimators do their own, small, communication (`fgtrain.distributed`), so DDP's gradient buckets, as large as the
    model, and its broadcast of all buffers at every forward pass are never made. Ranks start from rank 0's parameters
    and buffers; buffers (BatchNorm statistics) are rank 0's whenever the model is evaluated or saved, as under DDP.

    Args:
        start_method: how processes are started where nothing else (torchrun, SLURM, scripts/train.py) has.
        timeout: deadline of what happens outside of steps: loading data, validation, checkpoints.
        options: passed on to Lightning's DDPStrategy.
    """

    def __init__(self, start_method: Any = "popen", timeout: timedelta = STARTUP, **options: Any) -> None:
        super().__init__(start_method=start_method, timeout=timeout, **options)

    def configure_ddp(self) -> None:
        assert self.model is not None
        with torch.no_grad():
            for tensor in self.model.state_dict().values():
                if isinstance(tensor, torch.Tensor):
                    dist.broadcast(tensor, 0)

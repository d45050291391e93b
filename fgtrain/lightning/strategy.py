"""Lightning strategies for several processes: replicas without a gradient all-reduce, and FSDP2."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fgtrain.errors import ConfigError
from fgtrain.estimators import GradientEstimator
from fgtrain.lightning.checkpoints import refuse_foreign, refuse_incomplete
from fgtrain.network.sharding import shard

STARTUP = timedelta(minutes=10)  # one rank may be downloading the data


class Replicas(DDPStrategy):
    """The same model on every rank, without DistributedDataParallel around it.

    Estimators communicate little and by themselves (`fgtrain.distributed`). So there are no gradient buckets as large
    as the model and no broadcast of all buffers at every forward pass, which DDP makes. Ranks start from rank 0's
    parameters and buffers. As under DDP, evaluation and checkpoints use rank 0's buffers (BatchNorm statistics).

    Args:
        start_method: how to start processes if nothing else (torchrun, SLURM, scripts/train.py) has started them.
        timeout: deadline of start-up, such as loading data; from the first step on, the one of `Ranks` applies.
        options: passed on to Lightning's DDPStrategy.
    """

    def __init__(self, start_method: Any = "popen", timeout: timedelta = STARTUP, **options: Any) -> None:
        super().__init__(start_method=start_method, timeout=timeout, **options)

    def configure_ddp(self) -> None:
        assert self.model is not None
        equalize(self.model)


class Sharded(ModelParallelStrategy):
    """FSDP2 over all ranks, with checkpoints in one file, which a single process can read too.

    Args:
        num_ranks: R, the number of ranks that share the rows of parameters.
    """

    def __init__(self, num_ranks: int) -> None:
        super().__init__(
            data_parallel_size=num_ranks, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=STARTUP
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        whole = torch.load(checkpoint_path, mmap=True, map_location="cpu", weights_only=True)
        refuse_incomplete(whole, checkpoint_path)
        refuse_foreign(whole, self.lightning_module)
        optimizers, states = self.optimizers, whole["optimizer_states"]
        if not any(saved["state"] for saved in states):  # Lightning cannot load SGD without momentum
            self.optimizers = []
        rest = super().load_checkpoint(checkpoint_path, weights_only)  # without the weights, which are loaded already
        if not self.optimizers:
            self.optimizers = optimizers
            for optimizer, saved in zip(optimizers, states, strict=True):
                for group, before in zip(optimizer.param_groups, saved["param_groups"], strict=True):
                    group |= {name: value for name, value in before.items() if name != "params"}
        return rest | {"state_dict": whole["state_dict"]}


def expect_no_backward(ddp: DistributedDataParallel) -> None:
    """Let DDP broadcast buffers in the forward passes in which it would, but wait for no gradients after them."""
    reduces = True

    def before(*_: Any) -> None:
        nonlocal reduces
        reduces, ddp.require_backward_grad_sync = ddp.require_backward_grad_sync, False

    def after(*_: Any) -> None:
        ddp.require_backward_grad_sync = reduces
        ddp.require_forward_param_sync = reduces and torch.is_grad_enabled()  # before the next pass, as DDP sets it

    ddp.register_forward_pre_hook(before)
    ddp.register_forward_hook(after, always_call=True)


@torch.no_grad()
def equalize(model: nn.Module) -> None:
    """Give all ranks rank 0's parameters and buffers."""
    for tensor in model.state_dict().values():
        if isinstance(tensor, torch.Tensor):
            dist.broadcast(tensor, 0)


def shard_model(model: nn.Module, estimator: GradientEstimator, strategy: ModelParallelStrategy) -> int:
    """Shard the parameters over ranks by FSDP2; returns the bytes that a rank sends to gather them once.

    Raises:
        ConfigError: the method cannot train sharded parameters.
    """
    if not estimator.shardable:
        raise ConfigError(
            f"FSDP2 cannot train with {estimator}, which needs whole gradients or directions; use "
            "ForwardGradient with LowRank, or Replicas"
        )
    equalize(model)
    shard(model.to(strategy.root_device), strategy.device_mesh["data_parallel"])
    params: Any = model.parameters()
    return sum(p.to_local().nbytes for p in params) * (strategy.world_size - 1)

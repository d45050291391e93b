"""The number of processes of a run, and whether fgtrain, torchrun or SLURM starts them."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fgtrain.errors import ConfigError
from fgtrain.lightning.strategy import Replicas, Sharded
from fgtrain.runs.starters import started_by

START_METHODS = {
    "auto": "forkserver",  # imports once for all ranks, and once for all jobs of a sweep
    "ddp": "forkserver",
    "ddp_spawn": "spawn",
    "ddp_fork": "fork",
    "fsdp2": "forkserver",
}

ONE_PROCESS = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
"""Trainer arguments of what is done alone with a run of several processes: an evaluation, a replay."""


class World(NamedTuple):
    """The number of processes of a run, and whether something else has started them."""

    devices: int | list[int] | str
    num_devices: int
    num_nodes: int
    strategy: str
    started: bool

    @property
    def size(self) -> int:
        """R, the number of processes."""
        return self.num_devices * self.num_nodes

    def trainer_options(self) -> dict[str, Any]:
        """Arguments of the trainer that differ from the configuration."""
        if self.strategy not in START_METHODS or (self.size == 1 and not self.started):
            return {}
        strategy: Any = "auto"
        if self.size > 1 and self.strategy == "fsdp2":
            strategy = Sharded(self.size)
        elif self.size > 1:
            strategy = Replicas()
        return {"devices": self.devices, "num_nodes": self.num_nodes, "strategy": strategy}


def plan(trainer: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> World:
    """The processes that `trainer` (its configuration) asks for, checked against those that were started.

    Raises:
        ConfigError: the numbers disagree, so that the run would silently train on part of the data.
    """
    strategy = trainer.get("strategy", "auto")
    if not isinstance(strategy, str):
        strategy = "custom"
    if strategy.startswith(("fsdp", "deepspeed", "model_parallel")) and strategy != "fsdp2":
        raise ConfigError(
            f"trainer.strategy={strategy} needs a backward pass to reduce its gradients; use trainer=ddp, or "
            "trainer=fsdp2 with method=fwdgrad tangents=low_rank"
        )
    devices, num_nodes = trainer.get("devices", "auto"), trainer.get("num_nodes", 1)
    if num_nodes < 1:
        raise ConfigError(f"trainer.num_nodes must be at least 1, got {num_nodes}")
    found = started_by(environ)
    if found is not None:
        name, total, local = found
        if devices in ("auto", -1, "-1") and total % local == 0:
            devices, num_nodes = local, (total // local if num_nodes == 1 else num_nodes)
        asked = _count(devices, trainer) * num_nodes
        if asked != total:
            raise ConfigError(
                f"{name} started {total} process{'es' * (total > 1)}, but trainer.devices={devices} x "
                f"trainer.num_nodes={num_nodes} asks for {asked}, so each would train on the wrong part of the data; "
                f"leave trainer.devices=auto or start {asked}"
            )
        return World(devices, _count(devices, trainer), num_nodes, strategy, True)
    count = _count(devices, trainer)
    if num_nodes > 1 and strategy in START_METHODS:
        raise ConfigError(
            f"trainer.num_nodes={num_nodes} needs a start on every node; use torchrun --nnodes={num_nodes} "
            f"--nproc_per_node={count} -m fgtrain train ..., or srun"
        )
    if strategy == "fsdp2" and count == 1:
        raise ConfigError("trainer=fsdp2 shards parameters over at least 2 devices; set trainer.devices")
    return World(devices, count, num_nodes, strategy, False)


def _count(devices: Any, trainer: Mapping[str, Any]) -> int:
    """The number of devices of this node that `trainer.devices` means."""
    if devices in ("auto", -1, "-1"):
        on_gpu = trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        return torch.cuda.device_count() if on_gpu else 1
    if isinstance(devices, (list, tuple)):
        count = len(devices)
    elif isinstance(devices, str) and "," in devices:
        count = len([part for part in devices.split(",") if part.strip()])
    else:
        try:
            count = int(devices)
        except (TypeError, ValueError):
            count = 0
    if count < 1:
        raise ConfigError(f"trainer.devices must be a number above 0, a list of indices or auto, got {devices!r}")
    return count

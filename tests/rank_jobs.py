"""The jobs of the processes in tests/test_distributed.py."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fgtrain import Backprop, ForwardExact, ForwardGradient, GaussNewton, GradientEstimator, LowRank
from fgtrain.data import InMemoryDataModule
from fgtrain.distributed import Ranks
from fgtrain.errors import DivergenceError, RankFailed, RanksDiffer
from fgtrain.estimators import (
    FDFA,
    SPSA,
    ActivityPerturbation,
    CheckpointedBackprop,
    Highway,
    LocalGuess,
    LocalLosses,
    MeZO,
    SecondOrder,
)
from fgtrain.lightning import EstimatorModule, convert
from fgtrain.lightning.callbacks import RankCheck
from fgtrain.lightning.divergence import Divergence
from fgtrain.lightning.exchange import exchange_of
from fgtrain.lightning.strategy import Replicas
from fgtrain.models import MLP
from fgtrain.tasks import Classification

STEPS = 6
ESTIMATORS = {
    "backprop": Backprop,
    "normal": ForwardGradient,
    "projection": partial(ForwardGradient, num_tangents=2, combine="projection"),
    "low_rank": partial(ForwardGradient, LowRank(), num_tangents=3),
    "shrunk": partial(ForwardGradient, num_tangents=2, shrinkage=True),
    "shrunk_spsa": partial(SPSA, num_tangents=2, shrinkage=True),
    "clipped": partial(ForwardGradient, num_tangents=2, clip_derivative=0.5),
    "spsa": partial(SPSA, num_tangents=2),
    "mezo": MeZO,
    "gauss_newton": partial(GaussNewton, num_tangents=2),
    "forward_exact": ForwardExact,
    "checkpointed": CheckpointedBackprop,
    "local_guess": LocalGuess,
    "local_backprop": lambda: LocalLosses(Backprop()),
    "local_tail": lambda: LocalLosses(Backprop(), head="tail"),
    "highway": Highway,
    "activity": partial(ActivityPerturbation, num_tangents=2),
    "second_order": SecondOrder,
    "fdfa": FDFA,
    "local": LocalLosses,
}


class Data(InMemoryDataModule):
    """Forty-eight random examples, and seventeen to validate on."""

    input_shape = (1, 2, 2)
    num_classes = 3

    def load(self):
        generator = torch.Generator().manual_seed(0)
        splits = {
            name: (torch.randn(n, 1, 2, 2, generator=generator), torch.randint(3, (n,), generator=generator))
            for name, n in (("train", 48), ("val", 17), ("test", 17))
        }
        return splits, torch.Tensor.double


SGD = partial(torch.optim.SGD, lr=0.1)
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def make(estimator, *, width=5, optimizer=SGD, **options):
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # rank 0's initial weights count
    model = MLP((1, 2, 2), 3, [width, width], residual=True).double()
    return EstimatorModule(model, Classification(), estimator, optimizer, **options)


def fit(module, batch_size, folder, *callbacks, max_steps=STEPS, data=None, **options):
    given: dict[str, Any] = {"devices": 1, "precision": "64-true"} | options
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **given,
    )
    trainer.fit(module, data or Data(batch_size))
    return trainer


def start(size, job, folder, *args):
    """Run job(folder, *args) in `size` processes of one process group; the return values by rank."""
    mp.get_context("forkserver").set_forkserver_preload(["tests.rank_jobs", "tests.kills"])
    mp.start_processes(_run, (size, find_free_network_port(), job, folder, args), size, start_method="forkserver")
    return [torch.load(Path(folder) / f"{job.__name__}_{rank}_of_{size}.pt") for rank in range(size)]


def _run(rank, size, port, job, folder, args):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "NODE_RANK": "0"}
    dist.init_process_group("gloo")
    found = job(folder, *args)
    torch.save(found, Path(folder) / f"{job.__name__}_{rank}_of_{size}.pt")
    dist.barrier()
    dist.destroy_process_group()


def train_all(folder):
    """Weights, derivatives and traffic of every estimator, shared and per rank."""
    size, found = dist.get_world_size(), {}
    for name, estimator in ESTIMATORS.items():
        for tangents in ("shared", "per_rank"):
            module, check = make(estimator(), distributed_tangents=tangents), RankCheck(check_every_n_steps=2)
            trainer = fit(module, 12 // size, folder, check, devices=size, strategy=Replicas())
            metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
            weights = module.model.state_dict() | module.estimator.state_dict()
            found[name, tangents] = weights, check.bytes_per_step, metrics
    return found


def traffic_of_widths(folder):
    """Bytes per step of models of two sizes."""
    size, found = dist.get_world_size(), {}
    for width in (5, 50):
        for tangents in ("shared", "per_rank"):
            module, check = (
                make(ForwardGradient(num_tangents=3), width=width, distributed_tangents=tangents),
                RankCheck(check_every_n_steps=1),
            )
            fit(module, 12 // size, folder, check, devices=size, strategy=Replicas(), max_steps=2)
            found[width, tangents] = check.bytes_per_step
    return found


class Drifting(L.Callback):
    """Changes one number of one parameter on rank 1."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 3:
            with torch.no_grad():
                list(pl_module.model.parameters())[2].view(-1)[0] += 1e-12


def drift(folder):
    """The error of ranks that no longer agree."""
    check = RankCheck(check_every_n_steps=2)
    try:
        fit(make(ForwardGradient()), 6, folder, Drifting(), check, devices=2, strategy=Replicas(), max_steps=20)
    except RanksDiffer as error:
        return str(error)
    return None


class Ahead(L.Callback):
    """Rank 1 believes that it has taken three steps already."""

    def setup(self, trainer, pl_module, stage):
        if trainer.global_rank == 1:
            trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = 3


def ahead(folder):
    """The error of ranks that do not start at one step."""
    try:
        fit(make(ForwardGradient()), 6, folder, Ahead(), RankCheck(), devices=2, strategy=Replicas(), max_steps=20)
    except RanksDiffer as error:
        return str(error)
    return None


class OneBadNumber(Data):
    """The last example of the training set is nan."""

    def load(self):
        splits, convert = super().load()
        splits["train"][0][-1] = torch.nan
        return splits, convert


def skipped(folder):
    """Weights and skipped steps after an epoch in which one rank has an example that is nan."""
    found = {}
    for name in ("normal", "activity", "backprop", "local"):
        module = make(ESTIMATORS[name]())
        fit(module, 6, folder, devices=2, strategy=Replicas(), max_steps=4, data=OneBadNumber(6))
        found[name] = module.model.state_dict(), module.divergence.skipped_steps
    return found


def blown_up(folder):
    """The error of a rank whose loss is far above its start."""
    module = make(ForwardGradient(), divergence=Divergence(3, detect_divergence=10.0))
    module.make_optimizer = partial(torch.optim.SGD, lr=1e3)
    try:
        fit(module, 6, folder, devices=2, strategy=Replicas(), max_steps=50)
    except (DivergenceError, RankFailed) as error:
        return type(error).__name__
    return None


class BranchOfRank(nn.Module):
    """Every rank uses a branch of its own; no rank uses the last one, and the gradient of the head's weight is 0."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.branches = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.double()

    def losses(self, rank):
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(rank)).double()
        return lambda net: net.branches[rank](net.stem(x)).square().sum(1) + net.head(0 * x).square().sum(1)


def branches(folder):
    """The joint gradients of exact methods for losses that use other parameters on every rank."""
    torch.manual_seed(0)
    model, ranks = BranchOfRank(), Ranks()
    found = {}
    for name, tangents in (("backprop", "shared"), ("forward_exact", "shared"), ("forward_exact", "per_rank")):
        losses = model.losses(ranks.rank)
        found[name, tangents] = ranks.estimate(ESTIMATORS[name](), model, losses, (0,), tangents).grads
    exchange = exchange_of("fp16", Backprop(), model, ranks)
    found["fp16"] = ranks.estimate(Backprop(), model, losses, (0,), exchange=exchange).grads
    every = [Backprop()(model, model.losses(rank)).grads for rank in range(ranks.size)]
    return found, {name: sum(g[name] for g in every if name in g) / 2 for name in {**every[0], **every[1]}}


class PlainModule(L.LightningModule):
    """A module written without fgtrain."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        self.net = MLP((1, 2, 2), 3, [5]).double()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return MOMENTUM(self.parameters())


class Centred(PlainModule):
    """Its loss depends on a buffer that every batch changes, on each rank by its own examples."""

    centre: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(3, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        outputs = self.net(batch[0])
        if self.training:
            self.centre.mul_(0.5).add_(outputs.detach().mean(0))
        return F.cross_entropy(outputs - self.centre.clone(), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val", self.training_step(batch, batch_idx), sync_dist=True)


def centred(folder):
    """Weights, buffers and a metric of a plain and a converted module, with a step for every batch or for two."""
    found = []
    for micro_batches in (1, 2):
        for module in (Centred(), convert(Centred(), ESTIMATORS["backprop"]())):
            options = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": micro_batches}
            trainer = fit(module, 6, folder, **options)
            found.append({**module.state_dict(), "val": trainer.callback_metrics["val"]})
    return found


def converted(folder):
    """Weights of a converted module under Lightning's own DDP and under ours."""
    found = {}
    for strategy in ("ddp", "replicas"):
        for name in ("backprop", "normal", "low_rank", "activity"):
            module = convert(PlainModule(), ESTIMATORS[name]())
            given = Replicas() if strategy == "replicas" else strategy
            fit(module, 6, folder, devices=2, strategy=given)
            found[strategy, name] = module.state_dict()
    return found


def stuck(folder):
    """The error of a rank that waits for one that never comes."""
    ranks = Ranks(timeout_seconds=2)
    if dist.get_rank() == 1:
        return None
    try:
        ranks.mean(torch.ones(1))
    except RankFailed as error:
        return str(error)
    return None


class Collectives(TorchDispatchMode):
    """Counts the calls of operations between ranks."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "c10d_functional", "_c10d_functional"):
            self.calls[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


SHARDABLE: dict[str, Callable[[], GradientEstimator]] = {
    "low_rank": partial(ForwardGradient, LowRank(), num_tangents=2),
    "gauss_newton": partial(GaussNewton, num_tangents=2),
    "forward_exact": ForwardExact,
}


def sharded(folder, name):
    """Parameters after training, the shapes of this rank's parts of them and of their momenta, and the operations."""
    module = make(SHARDABLE[name](), optimizer=MOMENTUM)
    strategy = ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
    options = {"precision": "32-true", "inference_mode": False, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    with Collectives() as collectives:
        trainer = fit(
            module, 12 // dist.get_world_size(), folder, devices=dist.get_world_size(), strategy=strategy, **options
        )
    params: dict[str, Any] = dict(module.model.named_parameters())
    state = trainer.optimizers[0].state
    return {
        "weights": {name: p.full_tensor().detach() for name, p in params.items()},
        "shapes": {name: tuple(p.to_local().shape) for name, p in params.items()},
        "momenta": {name: tuple(state[p]["momentum_buffer"].to_local().shape) for name, p in params.items()},
        "calls": dict(collectives.calls),
    }


class BatchNormed(nn.Module):
    """Running statistics that differ by rank."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def forward(self, x):
        return self.flat(x)


def buffers(folder):
    """Running mean after training and validation."""
    module = make(ForwardGradient())
    module.model = BatchNormed().double()
    fit(module, 6, folder, RankCheck(), devices=2, strategy=Replicas(), max_steps=4)
    return module.model.flat[1].running_mean

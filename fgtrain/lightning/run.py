"""One training run, from a configuration to its results."""

import json
import logging
import signal
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from fgtrain.allocator import keep_freed_memory
from fgtrain.compilation import compile_model
from fgtrain.config import check, signature_of, to_plain
from fgtrain.distributed import lost_ranks_named
from fgtrain.errors import ConfigError, Interrupted
from fgtrain.lightning.callbacks import (
    Dashboard,
    Monitor,
    RandomState,
    RankCheck,
    SelfCheck,
    StepProgress,
    Summary,
)
from fgtrain.lightning.callbacks.dashboard import log_final
from fgtrain.lightning.checkpoints import checkpoint_to_resume, make_atomic, write_atomically
from fgtrain.lightning.divergence import Divergence
from fgtrain.lightning.launch import plan
from fgtrain.lightning.loop import use_step_loop
from fgtrain.lightning.module import EstimatorModule
from fgtrain.lightning.provenance import save_provenance
from fgtrain.tasks import Function

DATA_FACTS = ("input_shape", "num_classes", "vocab_size", "context")
"""Attributes of the data that a model is built for, where its constructor takes them."""


class Run(NamedTuple):
    """The parts of a run, ready to train."""

    module: EstimatorModule
    data: L.LightningDataModule
    trainer: L.Trainer
    monitor: Monitor


def build(cfg: DictConfig) -> Run:
    """Check the configuration and build what it names; nothing is trained or written yet.

    Raises:
        ConfigError: the configuration has a mistake.
    """
    check(cfg)
    L.seed_everything(cfg.seed, verbose=False)
    task = instantiate(cfg.task)
    data = instantiate(cfg.data, _convert_="all")
    if not isinstance(data, L.LightningDataModule):
        raise ConfigError(f"data must be a LightningDataModule, got {type(data).__name__}")
    known = {name: getattr(data, name) for name in DATA_FACTS if hasattr(data, name)}
    optimizer = instantiate(cfg.optimizer, _convert_="all")
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {error}") from error
    module = EstimatorModule(
        _model(cfg.model, known | {"task": task}),
        task,
        instantiate(cfg.method),
        optimizer,
        instantiate(cfg.scheduler),
        seed=cfg.seed,
        accumulate_grad_batches=cfg.accumulate_grad_batches,
        clip_grad_norm=cfg.clip_grad_norm,
        divergence=Divergence(cfg.max_skipped_steps, cfg.detect_divergence),
        distributed_tangents=cfg.distributed.tangents,
        distributed_timeout=cfg.distributed.timeout_seconds,
    )
    monitor = Monitor(cfg.trainer.log_every_n_steps)
    world = plan(to_plain(cfg)["trainer"])
    several = [RankCheck(cfg.distributed.check_every_n_steps, cfg.trainer.log_every_n_steps)] if world.size > 1 else []
    checks = [SelfCheck()] if cfg.self_check else []
    chosen = [instantiate(node) for node in (cfg.callbacks or {}).values()]
    console = [] if cfg.quiet else [Summary(), StepProgress()]  # the summary takes no part in the time of training
    callbacks = [*console, monitor, *several, RandomState(), *checks, Dashboard(to_plain(cfg)), *chosen]
    for library in ("lightning.pytorch", "lightning.fabric"):  # no device lists and tips
        logging.getLogger(library).setLevel(logging.WARNING)
    trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=TensorBoardLogger(cfg.run_dir, name="", version="", default_hp_metric=False),
        default_root_dir=cfg.run_dir,
        enable_progress_bar=False,
        enable_model_summary=False,
        **world.trainer_options(),
        _convert_="all",
    )
    if cfg.compile:
        compile_model(module.model, trainer.strategy.root_device)
    make_atomic(trainer.strategy)
    use_step_loop(trainer)
    return Run(module, data, trainer, monitor)


def _model(node: DictConfig, known: Mapping[str, Any]) -> torch.nn.Module:
    model = _instantiate_with(node, known)
    if isinstance(model, L.LightningModule):
        raise ConfigError(
            f"model is a LightningModule ({type(model).__name__}), which brings its own training; in a script of your "
            "own, pass it to fgtrain.lightning.convert"
        )
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model must be an nn.Module, got {type(model).__name__}")
    return model


def _instantiate_with(node: DictConfig, known: Mapping[str, Any]) -> Any:
    """Instantiate `node` with those of the `known` arguments that it takes and does not set itself."""
    takes = signature_of(node._target_)
    return instantiate(node, **{k: v for k, v in known.items() if k in takes and k not in node}, _convert_="all")


def run(cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """Train, test, write results.json into the run's folder and return what it holds.

    Args:
        cfg: the composed configuration.
        choices: the chosen method, task, data and model by name.
    """
    keep_freed_memory()
    run_dir = Path(cfg.run_dir)
    finished = run_dir / "results.json"
    if finished.exists():
        if cfg.resume == "auto":
            return json.loads(finished.read_text())
        raise ConfigError(f"run_dir={run_dir} holds a finished run; name another folder with hydra.run.dir=...")
    checkpoint = checkpoint_to_resume(cfg.resume, run_dir)
    module, data, trainer, monitor = build(cfg)
    if trainer.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_provenance(cfg, choices)
    with lost_ranks_named(trainer.global_rank), _ctrl_c_named(trainer):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    results: dict[str, Any] = {name: choices.get(name) for name in ("method", "task", "data", "model")}
    results |= {"seed": cfg.seed, "steps": trainer.global_step, **monitor.summary()}
    results["skipped_steps"] = module.divergence.skipped_steps
    sent = trainer.callback_metrics.pop("comm/bytes_per_step", torch.zeros(())).item()
    results |= {"world_size": trainer.world_size, "comm/bytes_per_step": sent}
    results["num_parameters"] = sum(p.numel() for p in module.model.parameters())
    results["num_trained"] = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
    if isinstance(module.task, Function):
        results |= _function_results(module)
    else:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        (tested,) = trainer.test(module, data, verbose=False)
        results["metrics"] = metrics | dict(tested)
    log_final(trainer, to_plain(cfg), results)
    if trainer.is_global_zero:
        write_atomically(json.dumps(results, indent=2) + "\n", finished)
    return results


@contextmanager
def _ctrl_c_named(trainer: L.Trainer) -> Generator[None]:
    """Lightning ends the process without a word at a Ctrl-C that `Recovery` does not take."""
    try:
        yield
    except SystemExit as end:
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        step = trainer.global_step
        raise Interrupted(f"interrupted after step {step}, which was not saved", signal.SIGINT) from end


def _function_results(module: EstimatorModule) -> dict[str, Any]:
    """Value, distance to the minimum and coordinates of the best point."""
    with torch.no_grad():
        metrics = module.task.metrics(module.model, None)
        best = int(metrics["loss"].nan_to_num(torch.inf).argmin())
        solution = module.model()[best].tolist()
    return {"metrics": {name: value[best].item() for name, value in metrics.items()}, "solution": solution}


@rank_zero_only
def print_results(results: Mapping[str, Any], run_dir: Path) -> None:
    """The closing table, and where to look further."""
    table = Table(title=f"{results['method']} on {results['task']}", title_justify="left")
    table.add_column("result")
    table.add_column("value", justify="right")
    flat = {k: v for k, v in results.items() if k not in ("method", "task", "metrics", "solution")}
    for name, value in (flat | results["metrics"]).items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    if "solution" in results:
        table.add_row("solution", ", ".join(f"{x:.5f}" for x in results["solution"][:6]))
    console = Console()
    console.print(table)
    console.print(f"results in {run_dir}", soft_wrap=True, highlight=False)
    console.print(f"look at it: tensorboard --host 127.0.0.1 --logdir {run_dir}", soft_wrap=True, highlight=False)

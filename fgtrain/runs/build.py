"""The parts of a run, from its configuration: model, data, method, optimizer, trainer and callbacks."""

import logging
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, NamedTuple

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig

from fgtrain.errors import ConfigError
from fgtrain.lightning.callbacks import Dashboard, Monitor, RandomState, RankCheck, SelfCheck, StepProgress, Summary
from fgtrain.lightning.checkpoints import make_atomic
from fgtrain.lightning.divergence import Divergence
from fgtrain.lightning.module import EstimatorModule
from fgtrain.network.compilation import compile_model
from fgtrain.runs.config import signature_of, to_plain, to_saved
from fgtrain.runs.config_check import check
from fgtrain.runs.loggers import loggers_of
from fgtrain.runs.world import plan
from fgtrain.schedulers import some_length

DATA_FACTS = ("input_shape", "num_classes", "vocab_size", "context")
"""Attributes of the data that are passed to the model's constructor if it takes them."""


class Run(NamedTuple):
    """The parts of a run, ready to train."""

    module: EstimatorModule
    data: L.LightningDataModule
    trainer: L.Trainer
    monitor: Monitor


def build(cfg: DictConfig) -> Run:
    """Check the configuration and build its parts; nothing is trained or written yet.

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
    optimizer, scheduler = instantiate(cfg.optimizer, _convert_="all"), instantiate(cfg.scheduler)
    _try_out(optimizer, scheduler)
    module = EstimatorModule(
        _model(cfg.model, known | {"task": task}),
        task,
        instantiate(cfg.method),
        optimizer,
        scheduler,
        seed=cfg.seed,
        accumulate_grad_batches=cfg.accumulate_grad_batches,
        clip_grad_norm=cfg.clip_grad_norm,
        divergence=Divergence(cfg.max_skipped_steps, cfg.detect_divergence, cfg.max_skipped_share, task.advice),
        distributed_tangents=cfg.distributed.tangents,
        distributed_timeout=cfg.distributed.timeout_seconds,
        distributed_gradients=cfg.distributed.gradients,
        local_steps=cfg.distributed.local_steps,
    )
    monitor = Monitor(cfg.trainer.log_every_n_steps)
    world = plan(to_plain(cfg)["trainer"])
    for library in ("lightning.pytorch", "lightning.fabric"):  # hides lists of devices and tips
        logging.getLogger(library).setLevel(logging.WARNING)
    callbacks = _callbacks(cfg, monitor, world.size)
    saves = {"enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks)}  # only by these
    trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=loggers_of(cfg),
        default_root_dir=cfg.run_dir,
        enable_progress_bar=False,
        enable_model_summary=False,
        **world.trainer_options(),
        **({} if "enable_checkpointing" in cfg.trainer else saves),
        _convert_="all",
    )
    if cfg.compile:
        compile_model(module.model, trainer.strategy.root_device)
    make_atomic(trainer.strategy)
    return Run(module, data, trainer, monitor)


def _callbacks(cfg: DictConfig, monitor: Monitor, num_processes: int) -> list[L.Callback]:
    """The callbacks of a run, in the order in which they run."""
    console = [] if cfg.quiet else [Summary(), StepProgress()]  # the training time of `monitor` excludes the summary
    every = 0 if cfg.distributed.gradients == "local" else cfg.distributed.check_every_n_steps
    several = [RankCheck(every, cfg.trainer.log_every_n_steps)] if num_processes > 1 else []
    checks = [SelfCheck()] if cfg.self_check else []
    chosen = [instantiate(node) for node in (cfg.callbacks or {}).values() if node is not None]
    return [*console, monitor, *several, RandomState(), *checks, Dashboard(to_saved(cfg)), *chosen]


def _try_out(optimizer: Callable[..., Any], scheduler: Callable[..., Any] | None) -> None:
    """Raise a ConfigError for arguments that the optimizer or the scheduler refuses, before a run needs them."""
    part = "optimizer"
    try:
        trial = optimizer([torch.nn.Parameter(torch.zeros(1))])
        part = "scheduler"
        if scheduler is not None:
            _refuse_other_schedulers(scheduler(trial, **some_length(scheduler)))
    except (TypeError, ValueError, IndexError) as error:  # an IndexError for too short a list
        raise ConfigError(f"{part}: {error}") from error


def _refuse_other_schedulers(made: Any) -> None:
    if not callable(getattr(made, "step", None)):
        raise ConfigError(f"a run needs a scheduler like those of PyTorch, got {type(made).__name__}")
    required = [
        p.name for p in signature(made.step).parameters.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    ]
    if required:
        raise ConfigError(
            f"{type(made).__name__} needs {', '.join(required)} at every step, which a run does not pass; "
            "choose a schedule that depends on the step only, such as scheduler=cosine"
        )


def _model(node: DictConfig, known: Mapping[str, Any]) -> torch.nn.Module:
    model = _instantiate_with(node, known)
    if isinstance(model, L.LightningModule):
        raise ConfigError(
            f"model is a LightningModule ({type(model).__name__}), which has its own training_step; in your own "
            "script, pass it to fgtrain.lightning.convert"
        )
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model must be an nn.Module, got {type(model).__name__}")
    return model


def _instantiate_with(node: DictConfig, known: Mapping[str, Any]) -> Any:
    """Instantiate `node` with those `known` arguments that it takes and does not set."""
    takes = signature_of(node._target_)
    for name in DATA_FACTS:
        if name in takes and takes[name].default is Parameter.empty and name not in known and name not in node:
            raise ConfigError(
                f"model: {node._target_} needs {name}, which the data lacks; give the datamodule an attribute of "
                f"that name, or set +model.{name}=..."
            )
    return instantiate(node, **{k: v for k, v in known.items() if k in takes and k not in node}, _convert_="all")

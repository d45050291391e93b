"""Lightning's loop over training batches, with the cost of a step cut to what the run uses."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.core.hooks import DataHooks, ModelHooks
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.optimization.manual import ManualResult
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import Strategy

_MODULE_HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class StepLoop(_TrainingEpochLoop):
    """Does what Lightning's own loop does with a batch, but calls only the hooks that somebody has overridden.

    Lightning enters every hook of every callback, with a profiler span and several `nn.Module.__setattr__` each, and
    inspects signatures anew at every batch: about a millisecond a step, more than a small network's arithmetic. Here
    that is found out once per epoch. Everything else (progress, validation, checkpoints, logging, resuming) is
    inherited. Where the short way is not the same as the long one (several processes, a profiler, automatic
    optimization, hooks around the batch in the module, a resumed batch) it is Lightning's own that runs.
    """

    def __init__(self, trainer: L.Trainer, min_steps: int | None = None, max_steps: int = -1) -> None:
        super().__init__(trainer, min_steps, max_steps)
        self.trainer: Any = trainer  # which Lightning gives its attributes where no checker sees them
        self._short: bool | None = None  # not known yet
        self._validates = True
        self._at_start: list[Callable[..., Any]] = []
        self._at_step: list[Callable[..., Any]] = []
        self._at_end: list[Callable[..., Any]] = []

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        if self._short is None:
            self._short = self._is_short(data_fetcher)
            self._validates = self.trainer.enable_validation
            self._at_start = self._overridden_in_callbacks("on_train_batch_start")
            self._at_step = self._overridden_in_callbacks("on_before_optimizer_step")
            self._at_end = self._overridden_in_callbacks("on_train_batch_end")
            if self._short:  # on this instance alone: the plugin belongs to this trainer
                setattr(self.trainer.precision_plugin, "_after_closure", self._before_optimizer_step)

    def teardown(self) -> None:
        super().teardown()
        if self._short:
            delattr(self.trainer.precision_plugin, "_after_closure")
        self._short = None

    def _is_short(self, data_fetcher: _DataFetcher) -> bool:
        trainer, module = self.trainer, self.trainer.lightning_module
        return (
            trainer.world_size == 1
            and isinstance(trainer.profiler, PassThroughProfiler)
            and not module.automatic_optimization
            and not isinstance(data_fetcher, _DataLoaderIterDataFetcher)
            and trainer.strategy.model is module
            and not _overrides(module, ModelHooks, *_MODULE_HOOKS)
            and not _overrides(trainer.precision_plugin, Precision, "_after_closure")
            and not _overrides(module, DataHooks, *_TRANSFER_HOOKS)
            and not (trainer.datamodule and _overrides(trainer.datamodule, DataHooks, *_TRANSFER_HOOKS))
            and not _overrides(trainer.strategy, Strategy, "on_train_batch_start", "batch_to_device", "training_step")
        )

    def _overridden_in_callbacks(self, hook: str) -> list[Callable[..., Any]]:
        return [getattr(c, hook) for c in self.trainer.callbacks if _overrides(c, L.Callback, hook)]

    def advance(self, data_fetcher: _DataFetcher) -> None:
        if self.restarting or not self._short:
            super().advance(data_fetcher)
            return
        if self.val_loop.restarting:  # setting it walks through all loops
            self.val_loop.restarting = False
        trainer, progress = self.trainer, self.batch_progress
        batch, _, _ = next(data_fetcher)
        batch_idx = self.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        batch = trainer.precision_plugin.convert_input(batch)
        if trainer.strategy.root_device.type != "cpu":
            batch = move_data_to_device(batch, trainer.strategy.root_device)
        progress.increment_ready()
        connector, results = trainer._logger_connector, self._results
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None
        self._call(self._at_start, "on_train_batch_start", batch, batch_idx)
        progress.increment_started()
        outputs = self._training_step(batch, batch_idx)
        progress.increment_processed()
        self._call(self._at_end, "on_train_batch_end", outputs, batch, batch_idx)
        if results:  # somebody has logged in training
            connector.on_batch_end()
        results.batch = results.batch_size = None
        progress.increment_completed()
        if results:
            connector.update_train_step_metrics()

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        trainer = self.trainer
        special = self._skip_next_val or trainer.should_stop or trainer.received_sigterm
        if not self._short or special or self._should_check_val_fx(data_fetcher):
            super().on_advance_end(data_fetcher)
        else:
            self._batches_that_stepped += 1

    def _training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.manual_optimization.on_run_start()  # optimizer steps are counted
        _set_current_hook(self.trainer.lightning_module, "training_step")
        outputs = self.trainer.strategy.training_step(batch, batch_idx)
        _set_current_hook(self.trainer.lightning_module, None)
        self.manual_optimization.on_run_end()
        return ManualResult.from_training_step_output(outputs).asdict()

    def _before_optimizer_step(self, module: L.LightningModule, optimizer: Any) -> None:
        """In place of the precision plugin's: gradients are clipped by the module."""
        for hook in self._at_step:
            hook(self.trainer, module, optimizer)

    def _should_check_val_epoch(self) -> bool:
        every = self.trainer.check_val_every_n_epoch
        return self._validates and (every is None or (self.trainer.current_epoch + 1) % every == 0)

    def _call(self, hooks: list[Callable[..., Any]], name: str, *args: Any) -> None:
        module = self.trainer.lightning_module
        _set_current_hook(module, name)
        for hook in hooks:
            hook(self.trainer, module, *args)
        _set_current_hook(module, None)


def use_step_loop(trainer: L.Trainer) -> None:
    """Let `trainer.fit` go through a `StepLoop`."""
    loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = StepLoop(trainer, loop.min_steps, loop.max_steps)


def _overrides(instance: object, base: type, *hooks: str) -> bool:
    """Whether any of the hooks is not that of `base`; one set on the instance counts."""
    return any(getattr(getattr(instance, hook), "__func__", None) is not getattr(base, hook) for hook in hooks)


def _set_current_hook(module: L.LightningModule, name: str | None) -> None:
    """What `self.log` asks for; past nn.Module's own __setattr__, which looks for parameters first."""
    object.__setattr__(module, "_current_fx_name", name)

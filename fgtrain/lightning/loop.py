"""Lightning's loops over epochs and batches, with the cost of a step cut to what the run uses."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.core.hooks import DataHooks, ModelHooks
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.manual import ManualResult
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import Strategy

_TRAIN_HOOKS = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
)
_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_STRATEGY_HOOKS = ("on_train_batch_start", "batch_to_device", "training_step", "post_training_step")
_PRECISION_HOOKS = ("train_step_context", "_after_closure")


def use_step_loop(trainer: L.Trainer) -> None:
    """Let `trainer.fit` go through an `EpochLoop` of a `StepLoop`.

    Lightning enters every hook of every callback, with a profiler span and several `nn.Module.__setattr__` each, and
    inspects signatures anew at every batch: about a millisecond a step, more than a small network's arithmetic. Here
    what a run overrides is found out once. Everything else (progress, validation, checkpoints, logging, resuming) is
    inherited. Where the short way is not the same as the long one (several processes, a profiler, automatic
    optimization, hooks around the batch in the module, a resumed batch) it is Lightning's own that runs.
    """
    steps = trainer.fit_loop.epoch_loop
    trainer.fit_loop = EpochLoop(trainer, trainer.fit_loop.min_epochs, trainer.fit_loop.max_epochs)
    trainer.fit_loop.epoch_loop = StepLoop(trainer, steps.min_steps, steps.max_steps)


class EpochLoop(_FitLoop):
    """Does what Lightning's own loop does with an epoch, which for a small data set is a few steps."""

    def on_run_start(self) -> None:
        super().on_run_start()
        if isinstance(self.epoch_loop, StepLoop) and self._data_fetcher is not None:
            self.epoch_loop.shorten(self._data_fetcher)

    def on_advance_start(self) -> None:
        hooks = self._hooks()
        if hooks is None or self.restarted_on_epoch_start or self.restarted_mid_epoch or self.restarted_on_epoch_end:
            super().on_advance_start()
            return
        self.setup_data()
        assert self._combined_loader is not None
        progress: Any = self.epoch_progress
        for loader in self._combined_loader.flattened:
            _set_sampler_epoch(loader, progress.current.processed)
        progress.increment_ready()
        hooks("on_train_epoch_start")
        progress.increment_started()

    def on_advance_end(self) -> None:
        hooks = self._hooks()
        if hooks is None or self.epoch_loop._results or self.trainer.received_sigterm:
            super().on_advance_end()
            return
        connector = self.trainer._logger_connector
        connector.epoch_end_reached()
        self.epoch_progress.increment_processed()
        hooks("on_train_epoch_end")
        if self.epoch_loop._results:  # somebody has logged
            connector.on_epoch_end()
            self.epoch_loop._batches_that_stepped -= 1  # to the last step of the epoch
            connector.update_train_epoch_metrics()
            self.epoch_loop._batches_that_stepped += 1
        self.epoch_progress.increment_completed()

    def _hooks(self) -> "Hooks | None":
        return self.epoch_loop.hooks if isinstance(self.epoch_loop, StepLoop) else None


class StepLoop(_TrainingEpochLoop):
    """Does what Lightning's own loop does with a batch.

    Attributes:
        hooks: those of the callbacks, where the short way is the same as the long one.
    """

    def __init__(self, trainer: L.Trainer, min_steps: int | None = None, max_steps: int = -1) -> None:
        super().__init__(trainer, min_steps, max_steps)
        self.trainer: Any = trainer  # which Lightning gives its attributes where no checker sees them
        self.hooks: Hooks | None = None
        self._validates = True

    def shorten(self, data_fetcher: _DataFetcher) -> None:
        """Take the short way from here to the end of the run, if it is the same as the long one."""
        trainer = self.trainer
        self._validates = trainer.enable_validation
        if self.hooks is None and _is_short(trainer, data_fetcher):
            self.hooks = Hooks(trainer)
            # on this instance alone: the plugin belongs to this trainer
            setattr(trainer.precision_plugin, "_after_closure", self._before_optimizer_step)

    def teardown(self) -> None:
        super().teardown()
        if self.hooks is not None:
            delattr(self.trainer.precision_plugin, "_after_closure")
        self.hooks = None

    @property
    def global_step(self) -> int:
        """Optimizer steps so far."""
        if self.hooks is None:
            return super().global_step
        return self.manual_optimization.optim_step_progress.total.completed

    def advance(self, data_fetcher: _DataFetcher) -> None:
        hooks = self.hooks
        if self.restarting or hooks is None:
            super().advance(data_fetcher)
            return
        if self.val_loop.restarting:  # setting it walks through all loops
            self.val_loop.restarting = False
        strategy, progress = self.trainer.strategy, self.batch_progress
        batch, _, _ = next(data_fetcher)
        batch_idx = self.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        batch = strategy.precision_plugin.convert_input(batch)
        if strategy.root_device.type != "cpu":
            batch = move_data_to_device(batch, strategy.root_device)
        progress.increment_ready()
        connector, results = self.trainer._logger_connector, self._results
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None
        hooks("on_train_batch_start", batch, batch_idx)
        progress.increment_started()
        outputs = self._training_step(hooks.module, batch, batch_idx)
        progress.increment_processed()
        hooks("on_train_batch_end", outputs, batch, batch_idx)
        if results:  # somebody has logged in training
            connector.on_batch_end()
        results.batch = results.batch_size = None
        progress.increment_completed()
        if results:
            connector.update_train_step_metrics()

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        trainer = self.trainer
        special = self._skip_next_val or trainer.should_stop or trainer.received_sigterm
        if self.hooks is None or special or self._should_check_val_fx(data_fetcher):
            super().on_advance_end(data_fetcher)
        else:
            self._batches_that_stepped += 1

    def _training_step(self, module: L.LightningModule, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.manual_optimization.on_run_start()  # optimizer steps are counted
        _set_current_hook(module, "training_step")
        with self.trainer.strategy.precision_plugin.forward_context():
            outputs = module.training_step(batch, batch_idx)
        _set_current_hook(module, None)
        self.manual_optimization.on_run_end()
        return ManualResult.from_training_step_output(outputs).asdict()

    def _before_optimizer_step(self, module: L.LightningModule, optimizer: Any) -> None:
        """In place of the precision plugin's: gradients are clipped by the module."""
        if self.hooks is not None:
            self.hooks("on_before_optimizer_step", optimizer)

    def _should_check_val_epoch(self) -> bool:
        every = self.trainer.check_val_every_n_epoch
        return self._validates and (every is None or (self.trainer.current_epoch + 1) % every == 0)


class Hooks:
    """The hooks that somebody has overridden in a callback, called as Lightning calls them.

    Args:
        trainer: in a run.

    Attributes:
        module: that the trainer trains.
    """

    def __init__(self, trainer: Any) -> None:
        self.module: L.LightningModule = trainer.lightning_module
        self._trainer = trainer
        self._found: dict[str, list[Callable[..., Any]]] = {}
        for name in _TRAIN_HOOKS:
            callbacks = [c for c in trainer.callbacks if _overrides(c, L.Callback, name)]
            if name == "on_train_epoch_end":  # those that look at what the others log come last
                callbacks.sort(key=lambda c: isinstance(c, (Checkpoint, EarlyStopping)))
            self._found[name] = [getattr(c, name) for c in callbacks]

    def __call__(self, name: str, *args: Any) -> None:
        found = self._found[name]
        if found:
            trainer, module = self._trainer, self.module
            before = module._current_fx_name
            _set_current_hook(module, name)
            for hook in found:
                hook(trainer, module, *args)
            _set_current_hook(module, before)


def _is_short(trainer: Any, data_fetcher: _DataFetcher) -> bool:
    module = trainer.lightning_module
    return (
        trainer.world_size == 1
        and isinstance(trainer.profiler, PassThroughProfiler)
        and not module.automatic_optimization
        and not isinstance(data_fetcher, _DataLoaderIterDataFetcher)
        and trainer.strategy.model is module
        and not _overrides(module, ModelHooks, *_TRAIN_HOOKS)
        and not _overrides(trainer.precision_plugin, Precision, *_PRECISION_HOOKS)
        and not _overrides(module, DataHooks, *_TRANSFER_HOOKS)
        and not (trainer.datamodule and _overrides(trainer.datamodule, DataHooks, *_TRANSFER_HOOKS))
        and not _overrides(trainer.strategy, Strategy, *_STRATEGY_HOOKS)
    )


def _overrides(instance: object, base: type, *hooks: str) -> bool:
    """Whether any of the hooks is not that of `base`; one set on the instance counts."""
    return any(getattr(getattr(instance, hook), "__func__", None) is not getattr(base, hook) for hook in hooks)


def _set_current_hook(module: L.LightningModule, name: str | None) -> None:
    """What `self.log` asks for; past nn.Module's own __setattr__, which looks for parameters first."""
    object.__setattr__(module, "_current_fx_name", name)

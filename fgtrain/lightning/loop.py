"""Lightning's loops over epochs and batches: a run goes on exactly where it was cut, and a step costs what it uses."""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.core.hooks import DataHooks, ModelHooks
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.optimization.manual import ManualResult
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches, _request_dataloader
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from fgtrain.errors import CheckpointError
from fgtrain.random import preserved_random_state

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
    optimization, hooks around the batch in the module) it is Lightning's own that runs.

    Lightning guesses from its counters where a resumed run has to enter; `EpochLoop` knows.
    """
    steps = trainer.fit_loop.epoch_loop
    trainer.fit_loop = EpochLoop(trainer, trainer.fit_loop.min_epochs, trainer.fit_loop.max_epochs)
    trainer.fit_loop.epoch_loop = StepLoop(trainer, steps.min_steps, steps.max_steps)


def batches_per_epoch(trainer: Any) -> int | float:
    """Training batches of an epoch; infinite where the loader does not know its length.

    Before the run has its loader another one is asked: a resumed run must read its state before its loader is made.
    """
    loop = trainer.fit_loop
    if loop._combined_loader is not None:
        return loop.max_batches
    with preserved_random_state():
        found = _request_dataloader(loop._data_source)
    combined = found if isinstance(found, CombinedLoader) else CombinedLoader(found, "max_size_cycle")
    limits = []
    for loader in combined.flattened:
        prepared = trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING)
        length = sized_len(prepared)
        length = math.inf if length is None else length
        limits.append(_parse_num_batches(RunningStage.TRAINING, length, trainer.limit_train_batches))
    return min(limits, default=0) if combined._mode == "min_size" else max(limits, default=0)


def total_steps(trainer: Any, accumulate_grad_batches: int = 1) -> int | None:
    """Optimizer steps of the whole run, if it has an end; Lightning's estimate knows of no manual accumulation."""
    limits: list[int] = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs >= 0 and math.isfinite(batches := batches_per_epoch(trainer)):
        limits.append(trainer.max_epochs * math.ceil(batches / accumulate_grad_batches))
    return min(limits, default=None)


class EpochLoop(_FitLoop):
    """Does what Lightning's own loop does with an epoch, which for a small data set is a few steps.

    A checkpoint holds where the run stands, whichever hook it is written in: whole epochs, and batches of the one under
    way. What is still to be done there (the validation that falls on a step, the hooks of an epoch's end) comes first
    when the run is resumed, even if no step is left. So a resumed run does what the undisturbed one does.

    Attributes:
        keeps_stop: a run that was stopped before its length (by early stopping) stays so when it is resumed.
    """

    def __init__(self, trainer: L.Trainer, min_epochs: int | None = 0, max_epochs: int | None = None) -> None:
        super().__init__(trainer, min_epochs, max_epochs)
        self.trainer: Any = trainer
        self.keeps_stop = True
        self._is_inside = False  # the next epoch to enter is one that was left in the middle
        self._owes_end = False  # and what comes after its last step so far has not been done

    @_Loop.restarting.setter
    def restarting(self, restarting: bool) -> None:
        _Loop.restarting.fset(self, restarting)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not self._owes_end and super().done

    @property
    def skip(self) -> bool:
        """Whether not even the hooks around training are to be called; those of a resumed run complete its files."""
        nothing = self.max_batches == 0 or self.trainer.limit_train_batches == 0
        return nothing or (super().skip and not self.is_resuming)

    def on_save_checkpoint(self) -> dict[str, Any]:
        state = super().on_save_checkpoint()
        metrics = {name: value.detach().cpu() for name, value in self.trainer.callback_metrics.items()}
        return state | {"callback_metrics": metrics, "should_stop": self.trainer.should_stop}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        super().on_load_checkpoint(state_dict)
        self.trainer.callback_metrics.update(state_dict.get("callback_metrics", {}))
        self.trainer.should_stop |= self.keeps_stop and state_dict.get("should_stop", False)

    def load_state_dict(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        super().load_state_dict(state_dict, prefix)
        assert isinstance(self.epoch_loop, StepLoop)
        epochs: Any = self.epoch_progress
        batches: Any = self.epoch_loop.batch_progress
        done, step_is_over = batches.current.processed, batches.current.completed == batches.current.processed
        has_ended = epochs.current.processed == epochs.current.ready  # also where the last step was in its middle
        whole = has_ended and batches.is_last_batch
        self._is_inside = done > 0 and not whole
        self._owes_end = self._is_inside and not has_ended
        before = epochs.current.processed - (has_ended and not whole and done > 0)
        for counter in (epochs.current, epochs.total):
            counter.ready = counter.started = before + self._is_inside
            counter.processed = counter.completed = before
        self.epoch_loop.enter_at(done if self._is_inside else 0, step_is_over)

    def _load_combined_loader_states(self) -> None:
        states, self._combined_loader_states_to_load = self._combined_loader_states_to_load, []
        assert self._combined_loader is not None
        loaders = self._combined_loader.flattened
        able = [loader for loader in loaders if isinstance(loader, _Stateful)]
        if states and len(states) != len(able):
            raise CheckpointError(
                f"the checkpoint holds the positions of {len(states)} training loaders, and {len(able)} of this run's "
                "can take one up, so it would train on other batches; use the data the run began with"
            )
        if self._is_inside and not self.epoch_loop.batch_progress.is_last_batch and len(able) < len(loaders):
            rank_zero_warn(
                "the run goes on in the middle of an epoch, but its training loader has no state_dict and "
                "load_state_dict: it begins anew, so that some examples come twice and others not at all"
            )
        self._combined_loader._load_state_dicts(states)

    def reset(self) -> None:
        if self._combined_loader_states_to_load:
            raise CheckpointError(
                "something asked for the training loader before its position was read from the checkpoint, so the run "
                "would train on other batches; take the number of batches from the data, not from the trainer"
            )
        self.restarting = False
        super().reset()

    def on_run_start(self) -> None:
        if isinstance(self.epoch_loop, StepLoop):
            self.epoch_loop.validates = self.trainer.enable_validation
        super().on_run_start()
        if isinstance(self.epoch_loop, StepLoop) and self._data_fetcher is not None:
            self.epoch_loop.shorten(self._data_fetcher)

    def on_advance_start(self) -> None:
        hooks = self._hooks()
        if hooks is None and not self._is_inside:
            super().on_advance_start()
            return
        self.setup_data()
        assert self._combined_loader is not None
        progress: Any = self.epoch_progress
        for loader in self._combined_loader.flattened:
            _set_sampler_epoch(loader, progress.current.processed)
        if self._is_inside or hooks is None:
            return
        progress.increment_ready()
        hooks("on_train_epoch_start")
        progress.increment_started()

    def on_iteration_done(self) -> None:
        fresh = self.is_resuming and isinstance(self.epoch_loop, StepLoop) and not self.epoch_loop.has_fetched
        super().on_iteration_done()
        self._resuming_from_checkpoint = fresh  # nothing was drawn from the loader's iterator: the next epoch takes it
        self._is_inside = self._owes_end = False

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
        has_fetched: whether a batch was asked for since the epoch was entered.
        validates: whether the run has something to validate on.
    """

    def __init__(self, trainer: L.Trainer, min_steps: int | None = None, max_steps: int = -1) -> None:
        super().__init__(trainer, min_steps, max_steps)
        self.trainer: Any = trainer  # which Lightning gives its attributes where no checker sees them
        self.hooks: Hooks | None = None
        self.has_fetched = False
        self.validates = True
        self._is_inside = False  # an epoch that was left in the middle is entered
        self._owes_end = False  # and what comes after its last step has not been done

    def enter_at(self, batches: int, step_is_over: bool) -> None:
        """Go on after so many batches of an epoch.

        Args:
            batches: done so far.
            step_is_over: whether the validation that falls on the last of them has been done, if any.
        """
        self._is_inside, self._owes_end = batches > 0, batches > 0 and not step_is_over
        progress: Any = self.batch_progress
        for counter, done in ((progress.current, batches), (progress.total, progress.total.processed)):
            counter.ready = counter.started = counter.processed = counter.completed = done
        progress.is_last_batch = batches > 0 and progress.is_last_batch
        self._batches_that_stepped = progress.total.processed - self._owes_end

    def reset(self) -> None:
        self.has_fetched = False
        if not self._is_inside:
            super().reset()

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        if self._is_inside and self.batch_progress.is_last_batch:
            data_fetcher.fetched -= self.batch_progress.current.ready  # it stands at the start of the next epoch
        self._is_inside = False
        if self._owes_end:
            self._owes_end = False
            super().on_advance_end(data_fetcher)

    def shorten(self, data_fetcher: _DataFetcher) -> None:
        """Take the short way from here to the end of the run, if it is the same as the long one."""
        trainer = self.trainer
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
        hooks, self.has_fetched = self.hooks, True
        if hooks is None:
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
        return self.validates and (every is None or (self.trainer.current_epoch + 1) % every == 0)


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

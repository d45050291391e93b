"""The position of a run in its data, saved in checkpoints and restored from them for Lightning's own loops."""

import copy
import warnings
from typing import Any

import lightning as L
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from fgtrain.distributed import of_all_ranks
from fgtrain.errors import CheckpointError
from fgtrain.lightning._lightning import (
    Counters,
    fetched_ahead,
    keep_reloads,
    raise_limits,
    restart_loaders,
)
from fgtrain.lightning.length import train_loaders
from fgtrain.lightning.loaders import (
    all_loaders,
    generators,
    goes_on,
    has_ended,
    has_random_workers,
    loadable,
    loaders_with_position,
    with_position,
)
from fgtrain.lightning.place import Place, validation_is_due
from fgtrain.random import preserved_random_state, random_state, set_random_state


class Position(L.Callback):
    """Makes a resumed run equal to an undisturbed one, whichever hook wrote its checkpoint.

    Lightning guesses the progress of an epoch from the counters in a checkpoint. If it guesses wrong, it validates
    twice or not at all, omits the hooks at the end of an epoch, or starts the epoch's data again. When this callback
    reads the counters, it sets them to one of the few states from which Lightning's loops continue correctly:

    - before an epoch, or within it after a finished step: the next batch follows;
    - after a step whose validation is pending: as if during that validation, so that it runs first;
    - after the last step of an epoch or of the run, if the end of the epoch is pending: one step earlier. Lightning
      then fetches a batch, `EstimatorModule.on_train_batch_start` ends the epoch instead of training, and the loader is
      reset.

    Lightning does not enter a run that has reached its limits or was stopped. The limits are therefore raised by one
    until the pending work has begun.

    Attributes:
        keeps_stop: whether a run that was stopped early (by early stopping) stays stopped when it is resumed.
        ends_epoch: whether the next batch only ends the epoch and is not trained on.
    """

    def __init__(self) -> None:
        self.keeps_stop = True
        self.ends_epoch = False
        self._added_steps = self._added_epochs = 0
        self._stops = False  # once the pending work has begun
        self._was_last: bool | None = None  # is_last_batch before `_enter` moved one step back
        self._metrics: dict[str, Any] = {}
        self._loaders: list[Any] = []
        self._random: dict[str, Any] | None = None  # from before the loaders were made
        self._generators: list[Tensor] = []  # the states of the loaders' own generators
        self._intervals: tuple[Any, Any] | None = None  # of validation, while they are overridden
        self._reads = False  # a checkpoint has been read, and training has not begun since
        self._validates = False  # its validation is pending
        self._leaves = False  # its last step was the last of an epoch
        self._is_complete = False  # it leaves nothing to do
        self._loses_place = False  # a training loader cannot restore its position
        self._is_inside = False  # its epoch has more batches
        self._ahead: dict[str, Any] | None = None  # what was fetched ahead of the position; None if it is unknown
        self._data_state: dict[str, Any] = {}  # of the data module

    def limits(self, trainer: Any) -> tuple[int, int]:
        """`max_steps` and `max_epochs` of the run."""
        return trainer.max_steps - self._added_steps, trainer.max_epochs - self._added_epochs

    def on_save_checkpoint(self, trainer: Any, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        fit = checkpoint["loops"]["fit_loop"]
        metrics = {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()}
        fit["state_dict"] |= {"callback_metrics": metrics, "should_stop": trainer.should_stop or self._stops}
        fit["state_dict"]["generators"] = of_all_ranks([g.get_state() for g in generators(trainer)])
        fit["state_dict"]["ahead"] = of_all_ranks(loadable(fetched_ahead(trainer)))
        if self._was_last is not None:
            fit["epoch_loop.batch_progress"]["is_last_batch"] = self._was_last

    def on_load_checkpoint(self, trainer: Any, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._reads = True
        self._refuse_early_loader(trainer)
        fit = checkpoint["loops"]["fit_loop"]
        self._metrics = fit["state_dict"].get("callback_metrics", {})
        self._loaders = fit["state_dict"].get("combined_loader", [])
        ahead_of_ranks = fit["state_dict"].get("ahead", [])[trainer.global_rank :]
        self._ahead = ahead_of_ranks[0] if ahead_of_ranks else None
        if not trainer.reload_dataloaders_every_n_epochs:  # else loaders start anew in an undisturbed run too
            of_ranks = fit["state_dict"].get("generators", [])[trainer.global_rank :]
            self._generators = of_ranks[0] if of_ranks else []
        if trainer.datamodule is not None:
            self._data_state = copy.deepcopy(checkpoint.get(type(trainer.datamodule).__qualname__, {}))
        loaders = train_loaders(trainer)
        able = len(self._loaders) if loaders is None else len(with_position(loaders))  # Lightning checks those of `fit`
        if self._loaders and len(self._loaders) != able:
            raise CheckpointError(
                f"the checkpoint holds the positions of {len(self._loaders)} training loaders, but {able} of this "
                "run's can restore one, so it would train on other batches; use the data the run began with"
            )
        self._loses_place = loaders is not None and able < len(loaders.flattened)
        self._enter(trainer, fit, checkpoint["global_step"])

    def _enter(self, trainer: Any, fit: dict[str, Any], step: int) -> None:
        """Raise the limits and set the counters, so that Lightning's loops do next what the run would have done."""
        found, stopped = Counters.of(fit), self.keeps_stop and fit["state_dict"].get("should_stop", False)
        here = Place.of(found, trainer, step, stopped=stopped)
        self.ends_epoch, self._validates, self._is_complete = here.ends_epoch, here.validates, here.is_complete
        self._was_last = found.is_last if here.ends_epoch else None
        self._leaves = found.total > 0 and found.is_last
        self._added_steps = max(0, step + 1 - trainer.max_steps) if trainer.max_steps >= 0 else 0
        self._added_epochs = max(0, here.epoch + 1 - trainer.max_epochs) if trainer.max_epochs >= 0 else 0
        raise_limits(trainer, self._added_steps, self._added_epochs)
        self._stops = stopped and here.is_over
        trainer.should_stop = trainer.should_stop or (stopped and not here.is_over)

        batch, total = found.batch - here.ends_epoch if here.is_inside else 0, found.total - here.ends_epoch
        # Lightning adds a step to the x axis of its logs if a validation is due here, even if it was done before.
        adds = here.validates or (
            not here.is_complete and validation_is_due(trainer, here.epoch, total, batch, is_last=False)
        )
        is_last = here.validates and found.is_last
        state = Counters(here.epoch, here.is_inside, batch, total, is_last, not here.validates)
        state.write(fit, total + here.ends_epoch - adds)
        if self._leaves:  # its loaders have no batch left to fetch: `_end_passes` restores them
            fit["state_dict"]["combined_loader"] = []
        self._random = random_state()
        self._is_inside = here.is_inside and not found.is_last
        if self._is_inside and not here.is_over and self._loses_place:
            rank_zero_warn(
                "the run continues in the middle of an epoch, but its training loader has no state_dict and "
                "load_state_dict: it starts over, so that some examples come twice and others not at all"
            )
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")

    def _refuse_early_loader(self, trainer: Any) -> None:
        if self._loaders and trainer.train_dataloader is not None:
            raise CheckpointError(
                "something asked for the training loader before its position was read from the checkpoint, so the run "
                "would train on other batches; take the number of batches from the data, not from the trainer"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._reads:
            self._refuse_early_loader(trainer)

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        if not self._reads:
            return
        self._reads = False
        trainer.callback_metrics.update(self._metrics)
        keep_reloads(trainer)
        every = trainer.reload_dataloaders_every_n_epochs
        following = trainer.current_epoch + self._validates  # the epoch whose loaders may be new
        if self._leaves and not self.ends_epoch and not (every and following % every == 0):
            self._end_passes(trainer)
        if self._validates:  # whatever the step
            self._intervals = trainer.val_check_batch, trainer.check_val_every_n_epoch
            trainer.val_check_batch, trainer.check_val_every_n_epoch = 1, None
        keeps_place = self._is_inside and len(loaders_with_position(trainer)) == len(all_loaders(trainer))
        if keeps_place and not self.ends_epoch:
            self._continue_pass(trainer)
        elif self._validates:
            self._restore_random_state(trainer)
        elif (self._generators or self._leaves) and not self.ends_epoch:
            self._restore_random_state(trainer)
            restart_loaders(trainer)
        if self._is_complete:
            self._restore_limits(trainer)
        elif trainer.global_step > 0 and has_random_workers(trainer):
            rank_zero_warn(
                "the training loader has persistent_workers=True: its new workers do not continue the random numbers "
                "of the old ones, so a dataset that draws some gives other examples; persistent_workers=False avoids it"
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._was_last = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_limits(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_limits(trainer)

    def leave_epoch(self, trainer: Any) -> None:
        """Restore the data after an epoch was entered only to end it."""
        self.ends_epoch = False
        if self._leaves:
            self._end_passes(trainer)
        else:
            self._restore_loaders(trainer)
            if self._ahead is not None:
                restart_loaders(trainer, self._ahead)
        self._restore_random_state(trainer)
        self._restore_limits(trainer)

    def _end_passes(self, trainer: Any) -> None:
        """Restore the loaders of a finished epoch, so that their next iterators begin another pass, or go on.

        Of two kinds of loaders with the state of a finished pass, one begins another one, and the other, such as
        torchdata's StatefulDataLoader, has nothing left to give. An unfinished pass ends when the next one begins, or
        goes on, as that of a stream does.
        """
        with preserved_random_state():
            for loader, state in zip(loaders_with_position(trainer), self._loaders, strict=False):
                continues = has_ended(trainer, loader) or goes_on(loader, state)
                loader.load_state_dict(copy.deepcopy(state))
                if next(iter(loader), None) is not None and continues:
                    loader.load_state_dict(copy.deepcopy(state))
                loader.state_dict()  # torchdata draws a random number in the first call after a load
        self._restore_data_state(trainer)

    def _continue_pass(self, trainer: Any) -> None:
        """Restore the data in the middle of an epoch, where Lightning has made new iterators and fetched ahead."""
        if self._ahead is not None and self._ahead["batches"]:
            self._restore_loaders(trainer)
            restart_loaders(trainer, self._ahead)
        elif self._ahead is None and any(sized_len(loader) is None for loader in loaders_with_position(trainer)):
            rank_zero_warn(
                "the run continues in the middle of an epoch, but its training loader has no length: Lightning had "
                "fetched a batch ahead, which the checkpoint does not hold, and this one batch is left out; give the "
                "loader a __len__, or let its batches be of tensors, to continue exactly"
            )
        self._restore_random_state(trainer)

    def _restore_loaders(self, trainer: Any) -> None:
        for loader, state in zip(loaders_with_position(trainer), self._loaders, strict=False):
            loader.load_state_dict(copy.deepcopy(state))
        self._restore_data_state(trainer)

    def _restore_data_state(self, trainer: Any) -> None:
        if self._data_state:  # its hooks and loaders saw the batches that were fetched
            trainer.datamodule.load_state_dict(copy.deepcopy(self._data_state))

    def _restore_random_state(self, trainer: Any) -> None:
        if self._random is not None:
            set_random_state(self._random)
            for generator, state in zip(generators(trainer), self._generators, strict=False):
                generator.set_state(state)
            self._random = None

    def _restore_limits(self, trainer: Any) -> None:
        if self._added_steps or self._added_epochs or self._stops:
            raise_limits(trainer, -self._added_steps, -self._added_epochs)
            trainer.should_stop = trainer.should_stop or self._stops
            self._added_steps = self._added_epochs = 0
            self._stops = False
        if self._intervals is not None:
            trainer.val_check_batch, trainer.check_val_every_n_epoch = self._intervals
            self._intervals = None

"""The position of a run in its data, saved in checkpoints and restored from them for Lightning's own loops."""

import copy
import io
import math
import pickle
import warnings
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from fgtrain._torch import tree_map
from fgtrain.distributed import of_all_ranks
from fgtrain.errors import CheckpointError
from fgtrain.lightning._lightning import (
    Counters,
    fetched_ahead,
    keep_reloads,
    raise_limits,
    restart_loaders,
    restarts_short_loaders,
)
from fgtrain.lightning.length import batches_per_epoch, train_loaders
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
        fit["state_dict"]["generators"] = of_all_ranks([g.get_state() for g in _generators(trainer)])
        fit["state_dict"]["ahead"] = of_all_ranks(_loadable(fetched_ahead(trainer)))
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
        able = len(self._loaders) if loaders is None else len(_stateful(loaders))  # Lightning checks those of `fit`
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
        here = _Place.of(found, trainer, step, stopped=stopped)
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
            not here.is_complete and _validation_is_due(trainer, here.epoch, total, batch, is_last=False)
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
        keeps_place = self._is_inside and len(_loaders(trainer)) == len(_all_loaders(trainer))
        if keeps_place and not self.ends_epoch:
            self._continue_pass(trainer)
        elif self._validates:
            self._restore_random_state(trainer)
        elif (self._generators or self._leaves) and not self.ends_epoch:
            self._restore_random_state(trainer)
            restart_loaders(trainer)
        if self._is_complete:
            self._restore_limits(trainer)
        elif trainer.global_step > 0 and _has_random_workers(trainer):
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
            for loader, state in zip(_loaders(trainer), self._loaders, strict=False):
                goes_on = _has_ended(trainer, loader) or _goes_on(loader, state)
                loader.load_state_dict(copy.deepcopy(state))
                if next(iter(loader), None) is not None and goes_on:
                    loader.load_state_dict(copy.deepcopy(state))
                loader.state_dict()  # torchdata draws a random number in the first call after a load
        self._restore_data_state(trainer)

    def _continue_pass(self, trainer: Any) -> None:
        """Restore the data in the middle of an epoch, where Lightning has made new iterators and fetched ahead."""
        if self._ahead is not None and self._ahead["batches"]:
            self._restore_loaders(trainer)
            restart_loaders(trainer, self._ahead)
        elif self._ahead is None and any(sized_len(loader) is None for loader in _loaders(trainer)):
            rank_zero_warn(
                "the run continues in the middle of an epoch, but its training loader has no length: Lightning had "
                "fetched a batch ahead, which the checkpoint does not hold, and this one batch is left out; give the "
                "loader a __len__, or let its batches be of tensors, to continue exactly"
            )
        self._restore_random_state(trainer)

    def _restore_loaders(self, trainer: Any) -> None:
        for loader, state in zip(_loaders(trainer), self._loaders, strict=False):
            loader.load_state_dict(copy.deepcopy(state))
        self._restore_data_state(trainer)

    def _restore_data_state(self, trainer: Any) -> None:
        if self._data_state:  # its hooks and loaders saw the batches that were fetched
            trainer.datamodule.load_state_dict(copy.deepcopy(self._data_state))

    def _restore_random_state(self, trainer: Any) -> None:
        if self._random is not None:
            set_random_state(self._random)
            for generator, state in zip(_generators(trainer), self._generators, strict=False):
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


class _Place(NamedTuple):
    """The place of a run in its epochs, and what is pending there.

    Attributes:
        epoch: the number of epochs before this place.
        is_inside: whether a step of the epoch has been done, and its end has not been left behind.
        is_over: whether a limit or a stop ends the run here.
        validates: whether the validation after the last step is pending.
        ends_epoch: whether the end of the epoch is pending, and no validation before it.
    """

    epoch: int
    is_inside: bool
    is_over: bool
    validates: bool
    ends_epoch: bool

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.is_over and not (self.validates or self.ends_epoch)

    @classmethod
    def of(cls, found: Counters, trainer: Any, step: int, *, stopped: bool) -> "_Place":
        """Find it from the counters of a checkpoint.

        Args:
            found: the counters.
            trainer: the trainer of the run.
            step: the number of optimizer steps.
            stopped: whether the run was stopped early.
        """
        is_inside = found.batch > 0 and (found.in_epoch or not found.is_last)  # also if the run ended within it
        epoch = found.epochs - (is_inside and not found.in_epoch)
        stops = stopped and found.epochs >= (trainer.min_epochs or 0) and step >= (trainer.min_steps or 0)
        is_over = stops or 0 <= trainer.max_steps <= step or 0 <= trainer.max_epochs <= epoch
        owes_end = is_inside and found.in_epoch
        due = _validation_is_due(trainer, epoch, found.total, found.batch, is_last=found.is_last)
        validates = owes_end and not found.step_is_over and (due or (stops and trainer.enable_validation))
        return cls(epoch, is_inside, is_over, validates, owes_end and not validates and (found.is_last or is_over))


def _loaders(trainer: Any) -> list[Any]:
    """The loaders of the run that have a position."""
    return _stateful(CombinedLoader(trainer.train_dataloader))


def _all_loaders(trainer: Any) -> list[Any]:
    return CombinedLoader(trainer.train_dataloader).flattened


def _loadable(fetched: dict[str, Any]) -> dict[str, Any] | None:
    """A copy as `torch.load` reads it with weights_only=True; None if it cannot, as for objects of a user."""
    own = tree_map(lambda x: x.detach().cpu().clone() if isinstance(x, Tensor) else x, fetched)  # not the whole storage
    file = io.BytesIO()
    try:
        torch.save(own, file)
        file.seek(0)
        return torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError):
        return None


def _generators(trainer: Any) -> list[torch.Generator]:
    """The generators of the run's loaders and of their samplers."""
    found: dict[int, torch.Generator] = {}
    for loader in _all_loaders(trainer):
        batches = getattr(loader, "batch_sampler", None)
        for part in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def _has_ended(trainer: Any, loader: Any) -> bool:
    """Whether the pass of a loader ends with the epoch."""
    length, batches = sized_len(loader), trainer.num_training_batches
    if length is None:
        return math.isinf(batches)
    return batches % length == 0 if restarts_short_loaders(trainer) else batches >= length


def _goes_on(loader: Any, state: Any) -> bool:
    """Whether a new iterator of a loader goes on in the middle of a pass, as it does after a load.

    At the end of a pass all loaders may do so, hence two places.
    """
    loader.load_state_dict(copy.deepcopy(state))
    for _ in range(2):
        next(iter(loader), None)
        place = copy.deepcopy(loader.state_dict())
        next(iter(loader), None)
        follows = copy.deepcopy(loader.state_dict())
        loader.load_state_dict(place)
        next(iter(loader), None)
        if not _is_same(loader.state_dict(), follows):
            return False
    return True


def _is_same(a: Any, b: Any) -> bool:
    """Whether two states, of nested containers and tensors, are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def _stateful(loaders: CombinedLoader) -> list[Any]:
    return [x for x in loaders.flattened if hasattr(x, "state_dict") and hasattr(x, "load_state_dict")]


def _has_random_workers(trainer: Any) -> bool:
    """Whether a loader keeps workers, with their generators, from one epoch to the next and cannot restore them."""
    loaders = CombinedLoader(trainer.train_dataloader)
    kept = [x for x in loaders.flattened if getattr(x, "persistent_workers", False)]
    return any(x not in _stateful(loaders) for x in kept)


def _validation_is_due(trainer: Any, epoch: int, total: int, batch: int, *, is_last: bool) -> bool:
    """Whether a validation is due after the last step so far.

    Args:
        trainer: the trainer of the run.
        epoch: the epoch of that step.
        total: batches of the run so far.
        batch: batches of the epoch so far.
        is_last: whether the epoch has no more batches.
    """
    interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every is not None and (epoch + 1) % every):
        return False
    if isinstance(interval, float):
        batches = batches_per_epoch(trainer)
        if math.isinf(batches):
            return is_last
        interval = max(1, int(batches * interval))
    return isinstance(interval, int) and (total if every is None else batch) % interval == 0

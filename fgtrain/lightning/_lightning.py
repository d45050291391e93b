"""The undocumented parts of Lightning and of its torchmetrics that fgtrain uses, in one place.

tests/test_private_api.py shows which of them a new release breaks.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.trainer.states import TrainerStatus
from torchmetrics import Metric

SET_FIRST = ("_computed", "_update_count")
"""Attributes of a metric: every update, computation and reset of it begins by setting one of them."""

configure_optimizers = _configure_optimizers
"""(optimizers, scheduler configurations, monitor) from any return value of a module's configure_optimizers."""


def compiler_of(module: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """What `torch.compile(module)` compiles functions with; None if Lightning got the module uncompiled."""
    return None if module._compiler_ctx is None else module._compiler_ctx["dynamo_ctx"]


def current_hook(module: Any) -> str | None:
    """The name of the hook or step of `module` that the Trainer is calling, or of a callback; None outside."""
    trainer = module._trainer
    is_running = trainer is not None and trainer.state.status == TrainerStatus.RUNNING
    return module._current_fx_name if is_running else None  # the name of a hook stays after an error


def last_result(metric: Metric) -> Any:
    """What the last call of a metric returned. Lightning logs it; None after a reset."""
    return metric._forward_cache


def set_last_result(metric: Metric, value: Any) -> None:
    """Set what `last_result` returns."""
    metric._forward_cache = value


def raise_limits(trainer: Any, steps: int, epochs: int) -> None:
    """Add to the limits of a run; `trainer.max_steps` and `max_epochs` are read-only.

    The loops do not enter a run that has reached its limits, even if a validation or the end of an epoch is pending.
    """
    trainer.fit_loop.epoch_loop.max_steps += steps
    trainer.fit_loop.max_epochs += epochs


def restart_loaders(trainer: Any, ahead: Mapping[str, Any] | None = None) -> None:
    """Make the iterator of the training loaders again; Lightning makes the first one before any hook of training.

    Args:
        trainer: the trainer.
        ahead: what `fetched_ahead` returned. Nothing else is fetched ahead then.
    """
    fetcher = trainer.fit_loop._data_fetcher
    if ahead is None:
        iter(fetcher)
        return
    num, fetcher.prefetch_batches = fetcher.prefetch_batches, 0
    iter(fetcher)
    fetcher.prefetch_batches, fetcher.batches = num, list(ahead["batches"])
    if ahead["consumed"] is not None:
        trainer.fit_loop._combined_loader._iterator._consumed = list(ahead["consumed"])


def keep_reloads(trainer: Any) -> None:
    """Make the loaders anew at the epochs of an undisturbed run; Lightning counts from the epoch of its start."""
    if every := trainer.reload_dataloaders_every_n_epochs:
        trainer.fit_loop._last_train_dl_reload_epoch = trainer.current_epoch - trainer.current_epoch % every


def fetched_ahead(trainer: Any) -> dict[str, Any]:
    """What Lightning has fetched from loaders without a length, to know which batch is the last of an epoch.

    Returns:
        {"batches": the batches, "consumed": of several loaders, those whose pass has ended, or None}.
    """
    iterator = getattr(trainer.fit_loop._combined_loader, "_iterator", None)
    batches = getattr(trainer.fit_loop._data_fetcher, "batches", [])
    return {"batches": list(batches), "consumed": getattr(iterator, "_consumed", None)}


def restarts_short_loaders(trainer: Any) -> bool:
    """Whether an epoch lasts until the longest of its loaders ends, and the others begin again until then."""
    return trainer.fit_loop._combined_loader._mode == "max_size_cycle"


class Counters(NamedTuple):
    """The position of a run, as the counters in a checkpoint record it.

    Attributes:
        epochs: finished epochs.
        in_epoch: whether an epoch has begun and not finished.
        batch: batches trained on in the current epoch, or else in the last one.
        total: batches trained on in the run.
        is_last: whether the epoch has no more batches.
        step_is_over: whether the validation after the last step, if any, has been done.
    """

    epochs: int
    in_epoch: bool
    batch: int
    total: int
    is_last: bool
    step_is_over: bool = True

    @classmethod
    def of(cls, fit: dict[str, Any]) -> "Counters":
        """Read them from `checkpoint["loops"]["fit_loop"]`, written in any hook."""
        epochs, batches = fit["epoch_progress"]["current"], fit["epoch_loop.batch_progress"]
        current = batches["current"]
        return cls(
            epochs["processed"],
            epochs["processed"] < epochs["started"],
            current["processed"],
            batches["total"]["processed"],
            batches["is_last_batch"],
            current["completed"] == current["processed"],
        )

    def write(self, fit: dict[str, Any], logged: int) -> None:
        """Set `fit` to one of the states from which the loops continue correctly.

        Lightning calls these states RESTARTED_ON_EPOCH_START before an epoch, RESTARTED_MID_EPOCH within one,
        RESTARTED_ON_LAST after the last batch and its validation, and RESTARTED_MID_EVALUATION before that validation.

        Args:
            fit: the state to change.
            logged: steps on the x axis of the logs.
        """
        for counter in fit["epoch_progress"].values():
            counter |= _same(self.epochs) | {"ready": self.epochs + 1, "started": self.epochs + self.in_epoch}
        batches, validation = fit["epoch_loop.batch_progress"], fit["epoch_loop.val_loop.batch_progress"]
        batches["current"] |= _same(self.batch)
        batches["total"] |= _same(self.total)
        batches["is_last_batch"] = self.is_last
        validation["current"] |= _same(0)
        validation["total"] |= _same(0) if self.step_is_over else _same(0) | {"ready": 1, "started": 1}
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] = logged


def _same(count: int) -> dict[str, int]:
    return dict.fromkeys(("ready", "started", "processed", "completed"), count)

"""The length of a run, computed before the run makes its own loader."""

import copy
import math
from itertools import count
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, DistributedSampler

from fgtrain.random import preserved_random_state


def train_loaders(trainer: Any) -> CombinedLoader | None:
    """New training loaders equal to those of the run; None if the loaders were passed to `fit` directly.

    A resumed run must read its state before it makes its own loader; asking Lightning for a length would make it.
    """
    for source in (trainer.datamodule, trainer.lightning_module):
        if is_overridden("train_dataloader", source):
            with preserved_random_state():
                found = source.train_dataloader()
            return found if isinstance(found, CombinedLoader) else CombinedLoader(found, "max_size_cycle")
    return None


def first_batch(trainer: Any) -> Any:
    """The first batch as the run will see it, from loaders of its own; None if there is none."""
    loaders = train_loaders(trainer)
    if loaders is None:
        loaders = CombinedLoader(copy.copy(trainer.train_dataloader))
    with preserved_random_state():
        return next(iter(loaders), (None,))[0]


def batches_per_epoch(trainer: Any) -> int | float:
    """Training batches of an epoch; infinite if the loader does not know its length."""
    if trainer.train_dataloader is None and (loaders := train_loaders(trainer)) is not None:
        lengths = [_length(loader, trainer) for loader in loaders.flattened]
        stand_in = copy.copy(loaders)  # combined in the same way, but without drawing data
        stand_in.flattened = [count() if math.isinf(length) else range(int(length)) for length in lengths]
        length = sized_len(iter(stand_in))
        return math.inf if length is None else length
    if trainer.train_dataloader is None:
        _ = trainer.estimated_stepping_batches  # makes the loader
    return trainer.num_training_batches


def total_steps(trainer: Any, accumulate_grad_batches: int = 1) -> int | None:
    """Optimizer steps of the whole run, None if endless; Lightning's estimate ignores manual accumulation."""
    position = getattr(trainer.lightning_module, "position", None)
    max_steps, max_epochs = (trainer.max_steps, trainer.max_epochs) if position is None else position.limits(trainer)
    limits: list[int] = [max_steps] if max_steps >= 0 else []
    if max_epochs >= 0 and math.isfinite(batches := batches_per_epoch(trainer)):
        limits.append(max_epochs * math.ceil(batches / accumulate_grad_batches))
    return min(limits, default=None)


def _length(loader: Any, trainer: Any) -> int | float:
    """Batches per process of a loader, split as Lightning splits them and limited by `limit_train_batches`."""
    length, limit, shares = sized_len(loader), trainer.limit_train_batches, trainer.distributed_sampler_kwargs
    if length is None:
        return limit if isinstance(limit, int) else math.inf
    shared = isinstance(loader, DataLoader) and loader.batch_size is not None
    if shared and shares and not isinstance(loader.sampler, DistributedSampler):
        examples = math.ceil(len(loader.sampler) / shares["num_replicas"])
        length = examples // loader.batch_size if loader.drop_last else math.ceil(examples / loader.batch_size)
    return min(length, limit) if isinstance(limit, int) else int(length * limit)

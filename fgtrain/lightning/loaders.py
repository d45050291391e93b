"""The training loaders of a run: their positions, their generators, and how their passes end."""

import copy
import io
import math
import pickle
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from fgtrain._torch import tree_map
from fgtrain.lightning._lightning import restarts_short_loaders


def loaders_with_position(trainer: Any) -> list[Any]:
    """The loaders of the run that have a position."""
    return with_position(CombinedLoader(trainer.train_dataloader))


def all_loaders(trainer: Any) -> list[Any]:
    """The loaders of the run."""
    return CombinedLoader(trainer.train_dataloader).flattened


def loadable(fetched: dict[str, Any]) -> dict[str, Any] | None:
    """A copy as `torch.load` reads it with weights_only=True; None if it cannot, as for objects of a user."""
    own = tree_map(lambda x: x.detach().cpu().clone() if isinstance(x, Tensor) else x, fetched)  # not the whole storage
    file = io.BytesIO()
    try:
        torch.save(own, file)
        file.seek(0)
        return torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError):
        return None


def generators(trainer: Any) -> list[torch.Generator]:
    """The generators of the run's loaders and of their samplers."""
    found: dict[int, torch.Generator] = {}
    for loader in all_loaders(trainer):
        batches = getattr(loader, "batch_sampler", None)
        for part in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def has_ended(trainer: Any, loader: Any) -> bool:
    """Whether the pass of a loader ends with the epoch."""
    length, batches = sized_len(loader), trainer.num_training_batches
    if length is None:
        return math.isinf(batches)
    return batches % length == 0 if restarts_short_loaders(trainer) else batches >= length


def goes_on(loader: Any, state: Any) -> bool:
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
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)


def with_position(loaders: CombinedLoader) -> list[Any]:
    """Those loaders that have a position."""
    return [x for x in loaders.flattened if hasattr(x, "state_dict") and hasattr(x, "load_state_dict")]


def has_random_workers(trainer: Any) -> bool:
    """Whether a loader keeps workers, with their generators, from one epoch to the next and cannot restore them."""
    loaders = CombinedLoader(trainer.train_dataloader)
    kept = [x for x in loaders.flattened if getattr(x, "persistent_workers", False)]
    return any(x not in with_position(loaders) for x in kept)

"""The mean over ranks that estimators are handed: they themselves know nothing of process groups."""

import lightning as L
from torch import Tensor

from fgtrain.estimators.base import Reduce


def mean_over_ranks(trainer: L.Trainer) -> Reduce | None:
    """The `reduce` argument of an estimator: None in a single process."""
    if trainer.world_size == 1:
        return None

    def reduce(tensor: Tensor) -> Tensor:
        mean = trainer.strategy.reduce(tensor, reduce_op="mean")
        assert isinstance(mean, Tensor)
        return mean

    return reduce

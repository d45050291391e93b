"""A task turns a model and a batch into losses and metrics."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Task(ABC):
    """A loss and the metrics reported for a model.

    Attributes:
        advice: what to do, besides lowering the learning rate, if numbers are not finite.
    """

    advice: str = ""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Per-example losses (B,), or a scalar ()."""

    @abstractmethod
    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """{name: value for every example (B,)}; the caller averages them over a data set."""

    def results(self, model: nn.Module) -> dict[str, Any] | None:
        """The results of a trained model, if they do not come from the splits of a data set: {"metrics": .., ..}."""
        return None

"""Tangents of weights that act at the outputs of their layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

LocalGrads = Callable[[Tensor], tuple[Tensor, Tensor]]


class OutputTangent(ABC):
    """The tangent of a weight that acts at its layer's output: the layer's rule passes the output to `perturb`."""

    @property
    @abstractmethod
    def num(self) -> int:
        """K, the number of directions."""

    @abstractmethod
    def perturb(self, inputs: Tensor, output: Tensor, local_grads: LocalGrads, channels: int) -> Tensor:
        """The replacement of the layer's output.

        Args:
            inputs: the value of the layer's input.
            output: the layer's output with the unperturbed weight.
            local_grads: maps the gradient of the output to those of weight and bias.
            channels: dimension of the output's channels.
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """Raises, because something other than its layer uses the weight."""

"""The second pass of activity perturbation without stored inputs: it redraws the noise layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fgtrain.layer_noise.layer_call import LayerCall, as_input, passing
from fgtrain.layer_noise.noise import LocalGrads, PerturbedPass


@dataclass(eq=False)
class ReplayedPass:
    """A second pass without tangents that redraws the noise and computes every layer's gradient immediately.

    Args:
        first: the pass with noise; its calls record which layers a ReLU follows.
        collect: called at every layer with its call and local gradients.
    """

    first: PerturbedPass
    collect: Callable[[LayerCall, LocalGrads], None]

    def __post_init__(self) -> None:
        first = self.first
        self._again = PerturbedPass(first.num_tangents, first.seed, first.noise, first.shared_positions, first.head)
        self._remaining = iter(first.calls)

    @property
    def num_tangents(self) -> int:
        """K, the number of directions."""
        return self.first.num_tangents

    def perturb(self, name: str, inputs: Tensor, output: Tensor, local_grads: LocalGrads, channels: int) -> Tensor:
        """Collect the layer's gradient; the output is unchanged."""
        call = next(self._remaining)
        call.inputs = as_input(inputs)
        if name != self.first.head:
            call.noise, _ = self._again.draw(output, channels)
            call.active = passing(output) if call.is_rectified else None
        self.collect(call, local_grads)
        call.forget()
        return output

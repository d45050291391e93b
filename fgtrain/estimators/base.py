"""The base of all methods: an estimator, called with a model and a loss, returns gradients."""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fgtrain._torch import reentrant_checkpoints_replaced
from fgtrain.errors import UnsupportedOperation
from fgtrain.forward_ad.passes import LossFn
from fgtrain.network.parameters import one_at_a_time, require_estimable, slots_of

Reduce = Callable[[Tensor], Tensor]
Claim = Literal["exact", "unbiased", "descent"]
BackwardPass = Literal["none", "within a block", "whole"]


class Estimate(NamedTuple):
    """The result of an estimator at the current parameters.

    Args:
        loss: mean loss, ().
        grads: {parameter name: tensor like the parameter}, without parameters on which the loss does not depend.
            Methods with random directions of parameters cannot tell which these are, and give them noise of mean 0.
        directional_derivatives: grad f . v_k for each direction, (K,); None for methods without directions.
        weights: weights of the directions in the gradients, (K,); None if they follow from the derivatives.
    """

    loss: Tensor
    grads: dict[str, Tensor]
    directional_derivatives: Tensor | None = None
    weights: Tensor | None = None

    @property
    def replayed(self) -> Tensor | None:
        """What `GradientEstimator.replay` takes: the weights, or else the derivatives."""
        return self.directional_derivatives if self.weights is None else self.weights


class GradientEstimator(nn.Module, ABC):
    """Estimates the gradient of a loss. Subclasses implement `forward`; call the estimator itself.

    The call changes no parameter and no `.grad`; `write_grads` stores the gradients. It leaves the random state and the
    buffers (BatchNorm statistics) in the state that one plain forward pass leaves.

    Attributes:
        scalar_reducible: with the same directions on every rank, the mean over ranks of a few numbers (one for each
            direction, or for each pair) gives the estimate of the whole batch, and `replay` rebuilds the gradients from
            K numbers. Otherwise the gradients themselves must be averaged.
        claims: properties of every estimate g_hat, tested on every problem. "exact": it is the gradient up to rounding,
            which implies the others. "unbiased": E[g_hat] = grad f. "descent": g_hat . grad f >= 0 in every draw.
        backpropagates: whether gradients pass backwards through the activations, so that in float16 the loss must be
            scaled before it is differentiated.
        backward_pass: whether a vector-Jacobian product is taken: "none"; "within a block", if none crosses from one
            block into the next; or "whole", through the network.
        loss_at_parameters: whether the loss of an estimate, and what the model holds after it, are those of a plain
            pass.
        shardable: whether it can train parameters whose rows are distributed over ranks.
        directions_at_a_time: number of directions that one pass carries.
        gives_derivatives: whether estimates hold derivatives along directions.
        lacks_shrinkage: whether the method has an option `shrinkage` that would shorten the estimates but is off.
        state_of_model: what the method keeps from call to call for the one model that it serves; "" if nothing.
    """

    scalar_reducible: bool
    claims: frozenset[Claim] = frozenset()
    backpropagates: bool = False
    backward_pass: BackwardPass = "none"
    loss_at_parameters: bool = True
    shardable: bool = False
    directions_at_a_time: int = 0
    gives_derivatives: bool = True
    lacks_shrinkage: bool = False
    state_of_model: str = ""

    def __init__(self) -> None:  # nn.Module's accepts any argument; this signature checks configurations
        super().__init__()
        self._generator: torch.Generator | None = None
        self._served: list[weakref.ref[Any]] = []  # the model and its parameters
        self.register_load_state_dict_pre_hook(_make_room)

    def __call__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        generator: torch.Generator | None = None,
        reduce: Reduce | None = None,
    ) -> Estimate:
        """Estimate the gradient of loss_fn(model).

        Args:
            model: module whose parameters with requires_grad=True are differentiated.
            loss_fn: maps the model to per-example losses (B,), whose mean is taken, or to a scalar ().
            generator: source of the directions. None draws from the estimator's own generator, which is seeded from
                torch.initial_seed() at its first use.
            reduce: mean over ranks of a tensor; None on one device.

        Raises:
            LossError: the losses are not of shape (B,) or (), or depend on no trained parameter.
            ModelError: a parameter has a hook that only `.backward()` calls; or the method takes no whole backward
                pass, but a parameter is complex or has a hook on its gradient, or a module has a backward hook.
            UnsupportedOperation: the method cannot differentiate an operation of the model, or keeps the state of
                another one.
        """
        require_estimable(model, by_backward_pass=self.backward_pass == "whole")
        outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.enable_grad()
        with one_at_a_time, outside, reentrant_checkpoints_replaced():
            self._refuse_other_model(model)
            try:
                estimate = super().__call__(model, loss_fn, generator=generator or self.own_generator(), reduce=reduce)
            except RuntimeError as error:
                _name_inference_tensors(error)
                raise
            if self.state_of_model and not self._served:
                self._served = [weakref.ref(x) for x in (model, *model.parameters())]
            return estimate

    def _refuse_other_model(self, model: nn.Module) -> None:
        """Refuse a model if the one whose state is kept still exists and shares no parameter with it."""
        if not self._served:
            return
        served = [x for x in (ref() for ref in self._served) if x is not None]
        now = {id(x) for x in (model, *slots_of(model).params.values())} if served else set()
        if not served:
            self._served = []
        elif not any(id(x) in now for x in served):
            raise UnsupportedOperation(
                f"{type(self).__name__} keeps {self.state_of_model} of the model that it was called with before, and "
                "this is another one; make an estimator for each model"
            )

    def __getstate__(self) -> dict[str, Any]:  # the next model of a copy is the one whose state it keeps
        return self.__dict__ | {"_served": []}

    def own_generator(self) -> torch.Generator:
        """The source of directions if the caller passes no generator."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(torch.initial_seed())
        return self._generator

    @abstractmethod
    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        """The method, called by `__call__` with its arguments, outside inference mode and no_grad."""

    def make_room(self, state: Mapping[str, Tensor]) -> None:
        """Create the tensors of a saved state that otherwise the first call creates; few methods have any."""

    def without_layers(self) -> "GradientEstimator":
        """The estimator for a model without layers: this one, unless it is only for layers."""
        return self

    def direction_bytes(self, params: Mapping[str, Tensor]) -> int:
        """Bytes of one direction over `params`, without those of its derivatives in the pass."""
        return 0

    def relative_squared_error(self, grads: Mapping[str, Tensor]) -> float | None:
        """E ||g_hat - g||^2 / ||g||^2 for the gradient g, `grads`; None if there is no closed form."""
        return None

    def mean_length(self, grads: Mapping[str, Tensor]) -> float:
        """The factor a in E[g_hat] = a g for the gradient g, `grads`: 1, unless the estimates are shrunk."""
        return 1.0

    def mean_length_of(self, estimates: int, grads: Mapping[str, Tensor]) -> float:
        """The factor a for the average of `estimates` estimates: the more there are, the less they are shrunk."""
        return self.mean_length(grads)

    def expected_cosine(self, grads: Mapping[str, Tensor]) -> float | None:
        """An approximation of the root mean square cosine between g_hat and g, `grads`; None as for the squared error.

        It is a / sqrt(e + 2 a - 1), where e is the relative squared error and e + 2 a - 1 = E ||g_hat||^2 / ||g||^2.
        Unlike e, it does not depend on the length of the estimate.
        """
        error, a = self.relative_squared_error(grads), self.mean_length(grads)
        return None if error is None else a / math.sqrt(error + 2 * a - 1)

    def replay(self, model: nn.Module, derivatives: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Rebuild the gradients of an estimate from its K numbers and its generator, without data.

        Methods with `scalar_reducible` implement it.

        Args:
            model: the model of the estimate.
            derivatives: `Estimate.replayed`: its `directional_derivatives`, or its `weights` if it has any.
            generator: the generator, in its state before the estimate.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be rebuilt from seeds and derivatives")


def _make_room(estimator: GradientEstimator, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    estimator._served = []
    estimator.make_room({name.removeprefix(prefix): saved for name, saved in state.items() if name.startswith(prefix)})


def _name_inference_tensors(error: RuntimeError) -> None:
    """Raise an error that says what to do if `error` is PyTorch's about tensors of inference mode."""
    if "Inference tensors" in str(error):
        raise UnsupportedOperation(
            "the model or its loss uses tensors that were made in torch.inference_mode(), of which backpropagation "
            "stores nothing; make them under torch.no_grad(), or clone them first"
        ) from error


def require_positive_int(name: str, value: object) -> None:
    """Raise ValueError unless `value`, the argument `name`, is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def buffers_in(state: Mapping[str, Tensor], prefix: str) -> nn.Module:
    """A module with a buffer of zeros for every tensor of a saved state below `prefix`."""
    module = nn.Module()
    for name, saved in state.items():
        if name.startswith(f"{prefix}."):
            module.register_buffer(name.removeprefix(f"{prefix}."), torch.zeros_like(saved))
    return module

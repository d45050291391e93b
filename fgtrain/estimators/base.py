"""The one noun and one verb of fgtrain: an estimator, called with a model and a loss, returns gradients."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fgtrain._torch import foreach_norm
from fgtrain.errors import DivergenceError
from fgtrain.network.parameters import one_at_a_time, slots_of

Reduce = Callable[[Tensor], Tensor]
Claim = Literal["exact", "unbiased", "descent"]


class Estimate(NamedTuple):
    """What an estimator found out about the loss at the current parameters.

    Args:
        loss: mean loss, ().
        grads: {parameter name: tensor like the parameter}; a parameter the loss does not reach is left out.
        directional_derivatives: grad f . v_k of each direction, (K,); None for methods that take none.
        weights: of the directions in the gradients, (K,); None where they follow from the derivatives alone.
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

    The call changes no parameter and no `.grad`, leaves the random state and the buffers (BatchNorm statistics) as one
    plain forward pass would, and puts the model's gradient nowhere: `write_grads` does that.

    Attributes:
        scalar_reducible: with the same directions on every rank, the mean over ranks of numbers, as many as the
            directions or their pairs, makes the estimate that of the whole batch, and `replay` rebuilds the gradients
            from K of them; otherwise the gradients themselves must be averaged.
        claims: what holds of every estimate g_hat, and is tested on every problem: "exact", it is the gradient to
            rounding, which implies the others; "unbiased", E[g_hat] = grad f; "descent", g_hat . grad f >= 0 in
            every draw.
        backpropagates: gradients travel backwards through the activations, so that in float16 the loss must be scaled
            before it is differentiated.
        loss_at_parameters: the loss of an estimate is that of the parameters as they are, not of perturbed ones.
        shardable: trains parameters whose rows are spread over ranks.
        directions_at_a_time: how many directions over all parameters are in memory at once.
    """

    scalar_reducible: bool
    claims: frozenset[Claim] = frozenset()
    backpropagates: bool = False
    loss_at_parameters: bool = True
    shardable: bool = False
    directions_at_a_time: int = 0

    def __init__(self) -> None:  # nn.Module's takes any argument; a configuration is checked against this one
        super().__init__()
        self._generator: torch.Generator | None = None
        self.register_load_state_dict_pre_hook(_make_room)

    def __call__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any], Tensor],
        *,
        generator: torch.Generator | None = None,
        reduce: Reduce | None = None,
    ) -> Estimate:
        """Estimate the gradient of loss_fn(model).

        Args:
            model: module whose parameters with requires_grad=True are differentiated.
            loss_fn: maps the model to per-example losses (B,), whose mean is taken, or to a scalar ().
            generator: source of the directions. None draws from a generator of the estimator's own, seeded from
                torch.initial_seed() at its first use.
            reduce: mean over ranks of a tensor; None on one device.
        """
        with one_at_a_time, torch.inference_mode(False):
            return super().__call__(model, loss_fn, generator=generator or self.own_generator(), reduce=reduce)

    def own_generator(self) -> torch.Generator:
        """Where directions come from when the caller names no generator."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(torch.initial_seed())
        return self._generator

    @abstractmethod
    def forward(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any], Tensor],
        *,
        generator: torch.Generator,
        reduce: Reduce | None,
    ) -> Estimate:
        """The method itself, with the arguments of the call; it runs outside inference mode."""

    def make_room(self, state: Mapping[str, Tensor]) -> None:
        """Have the tensors that a saved state has, where the first call creates some; few methods have any."""

    def direction_bytes(self, params: Mapping[str, Tensor]) -> int:
        """Memory of one direction over `params`."""
        return 0

    def relative_squared_error(self, grads: Mapping[str, Tensor]) -> float | None:
        """E ||g_hat - g||^2 / ||g||^2 in closed form, where g is the gradient `grads`; None where there is none."""
        return None

    def mean_length(self, grads: Mapping[str, Tensor]) -> float:
        """a, where the estimates of the gradient `grads` have the mean a g: 1, unless they are shrunk."""
        return 1.0

    def mean_length_of(self, estimates: int, grads: Mapping[str, Tensor]) -> float:
        """a for the mean of so many independent estimates, lengthened to be of least error again if they are shrunk."""
        return self.mean_length(grads)

    def expected_cosine(self, grads: Mapping[str, Tensor]) -> float | None:
        """About the root mean square of the cosine between g_hat and g, `grads`; None as for the squared error.

        It is a / sqrt(e + 2 a - 1), e being the relative squared error: e + 2 a - 1 = E ||g_hat||^2 / ||g||^2. Unlike e
        it does not change with the length of the estimate.
        """
        error, a = self.relative_squared_error(grads), self.mean_length(grads)
        return None if error is None else a / math.sqrt(error + 2 * a - 1)

    def replay(self, model: nn.Module, derivatives: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The gradients of an estimate from its K numbers and its generator, without data.

        Methods that are `scalar_reducible` have it.

        Args:
            model: as in the estimate.
            derivatives: the estimate's `replayed`: its `directional_derivatives`, or its `weights` if it has any.
            generator: in the state in which the estimate was given it.
        """
        raise NotImplementedError(f"{type(self).__name__} is not a function of seeds and derivatives alone")


def _make_room(estimator: GradientEstimator, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    estimator.make_room({name.removeprefix(prefix): saved for name, saved in state.items() if name.startswith(prefix)})


def require_positive_int(name: str, value: object) -> None:
    """Raise ValueError unless `value`, the argument `name`, is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def average_grads(grads: dict[str, Tensor], reduce: Reduce | None) -> dict[str, Tensor]:
    """The mean over ranks of all gradients, sent as one flat bucket."""
    if reduce is None or not grads:
        return grads
    flat = reduce(torch.cat([g.flatten() for g in grads.values()]))
    pieces = flat.split([g.numel() for g in grads.values()])
    return {name: piece.view_as(g).to(g.dtype) for (name, g), piece in zip(grads.items(), pieces, strict=True)}


def write_grads(
    model: nn.Module, grads: Mapping[str, Tensor], *, accumulate: bool = False, check_finite: bool = True
) -> None:
    """Put gradients into `.grad`: the only function of fgtrain that does.

    Gradients that hold a nan or inf are refused, and `.grad` stays as it was: to skip such a batch, catch the error and
    go on with the next one.

    Args:
        model: owner of the parameters.
        grads: {parameter name: tensor like the parameter}.
        accumulate: add to what `.grad` holds, as backward() does, instead of replacing it (by None where `grads`
            has no entry).
        check_finite: look for nan and inf, by the norm of each gradient; on a GPU that waits for the gradients.

    Raises:
        DivergenceError: a gradient is not finite.
    """
    if check_finite:
        _refuse_non_finite(grads)
    for name, p in slots_of(model).params.items():
        if name in grads:
            p.grad = grads[name] if p.grad is None or not accumulate else p.grad.add_(grads[name])
        elif not accumulate:
            p.grad = None


def _refuse_non_finite(grads: Mapping[str, Tensor]) -> None:
    tensors = list(grads.values())
    if tensors and not torch.stack(norms(tensors)).isfinite().all():
        name = next(name for name, g in grads.items() if not norms([g])[0].isfinite())
        raise DivergenceError(
            f"the gradient of {name!r} is not finite (so the loss or a derivative was not): nothing was written; skip "
            "this batch, look for nan in it, lower lr, or cap the derivative (clip_derivative=...)"
        )


def norms(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Not finite where an entry is not; in half precision the squares need the range of single."""
    return foreach_norm(tensors, 2, dtype=torch.float32 if tensors[0].dtype.itemsize < 4 else None)

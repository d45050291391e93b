"""The exact gradient by forward mode: the derivative along every unit direction."""

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgtrain._torch import eager_functions
from fgtrain.errors import NoTangent
from fgtrain.estimators.base import Claim, Estimate, GradientEstimator, Reduce, require_positive_int
from fgtrain.estimators.gradients import unused_by_all_ranks, without_numbers
from fgtrain.forward_ad import jvp
from fgtrain.forward_ad.passes import NO_TANGENT, LossFn, require_repetition
from fgtrain.network.parameters import trainable_params
from fgtrain.network.sharding import like_parameter
from fgtrain.network.snapshot import Snapshot
from fgtrain.tangents.directions import LowRankTangent, Tangent, num_of

_log = logging.getLogger(__name__)
MANY = 10_000


class ForwardExact(GradientEstimator):
    """The exact gradient without a backward pass, for few parameters or long chains of operations.

    Formula: g_i = grad f . e_i for each of the n trainable numbers, with the unit vectors e_i.

    Bias: exact, with no bias, no variance and no random number.

    Cost: n / c passes in the memory of c directions, so the arithmetic of n forward passes. Ranks exchange n floats. A
    unit matrix is kept as the product of two unit vectors. A pass carries derivatives from the first layer that it
    moves. A parameter whose derivatives are all 0 takes one pass more, which tells whether the loss depends on it. A
    warning says so if the model has more than 10,000 parameters.

    `replay` takes the n derivatives. If the loss does not depend on some parameters, it takes the estimate's `weights`,
    which are nan for these.

    Args:
        chunk_size: c, the largest number of directions in one pass; None for all n.

    Raises:
        ValueError: `chunk_size` is below 1.

    Source: Wengert 1964, "A simple automatic derivative evaluation program", Communications of the ACM 7(8).

    The gradient of x^2 + 3 y at (1, 2) is (2, 3):

    >>> model = nn.ParameterDict({"x": torch.tensor(1.0), "y": torch.tensor(2.0)})
    >>> estimate = ForwardExact()(model, lambda m: m["x"] ** 2 + 3 * m["y"])
    >>> estimate.grads
    {'x': tensor(2.), 'y': tensor(3.)}
    """

    scalar_reducible = True
    shardable = True
    claims: frozenset[Claim] = frozenset({"exact"})

    def __init__(self, chunk_size: int | None = 64) -> None:
        super().__init__()
        if chunk_size is not None:
            require_positive_int("chunk_size", chunk_size)
        self.chunk_size = chunk_size
        self.directions_at_a_time = chunk_size or 0
        self._warned = False

    @torch.no_grad()
    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        params = trainable_params(model)
        self._warn(sum(p.numel() for p in params.values()))
        snapshot = Snapshot(model)
        losses, reason, found = None, NoTangent(NO_TANGENT), []
        for units in self._chunks(params):
            snapshot.restore()
            try:
                now, derivatives = jvp(model, loss_fn, units)
                require_repetition(losses, now)
                losses = now
            except NoTangent as error:  # the loss does not depend on these parameters
                reason, derivatives = error, torch.zeros(num_of(units), device=params[next(iter(units))].device)
            found.append(derivatives.mean(1) if derivatives.dim() == 2 else derivatives)
        if losses is None:
            raise reason
        derivatives = torch.cat(found)
        if reduce is not None:
            derivatives = reduce(derivatives)
        parts = _parts(derivatives, params)
        uses = {name: self._is_used(model, loss_fn, params[name], name, snapshot) for name in without_numbers(parts)}
        unused = unused_by_all_ranks(uses, derivatives, reduce)
        parts |= {name: torch.full_like(parts[name], torch.nan) for name in unused}
        weights = torch.cat(list(parts.values())) if unused else None
        return Estimate(losses.mean(), _grads(derivatives, params, unused), derivatives, weights)

    def replay(self, model: nn.Module, derivatives: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        params = trainable_params(model)
        unused = [name for name, part in _parts(derivatives, params).items() if part.isnan().all()]
        return _grads(derivatives, params, unused)

    def direction_bytes(self, params: Mapping[str, Tensor]) -> int:
        return sum(sum(_factor_sizes(p)) * p.element_size() for p in params.values())

    def _chunks(self, params: Mapping[str, Tensor]) -> Iterator[dict[str, Tangent]]:
        """The unit directions of all numbers, a chunk at a time, for the parameters that the chunk moves."""
        ends = list(accumulate(p.numel() for p in params.values()))
        size = self.chunk_size or ends[-1]
        for first in range(0, ends[-1], size):
            last = min(first + size, ends[-1])
            yield {
                name: _units(p, torch.arange(first, last, device=p.device) - (end - p.numel()))
                for (name, p), end in zip(params.items(), ends, strict=True)
                if p.numel() and end - p.numel() < last and first < end
            }

    def _is_used(self, model: nn.Module, loss_fn: LossFn, p: Tensor, name: str, snapshot: Snapshot) -> bool:
        """Whether the loss depends on a parameter along which all its derivatives are 0."""
        first = torch.zeros(1, dtype=torch.long, device=p.device)
        direction = _units(p, first) if p.numel() else torch.zeros(1, *p.shape, dtype=p.dtype, device=p.device)
        snapshot.restore()
        try:
            with eager_functions():  # compiling takes longer
                jvp(model, loss_fn, {name: direction})
        except NoTangent:
            return False
        return True

    def _warn(self, num_params: int) -> None:
        if num_params > MANY and not self._warned:
            self._warned = True
            _log.warning("ForwardExact takes %d derivatives a step, one for every parameter", num_params)

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"


def _factor_sizes(p: Tensor) -> tuple[int, ...]:
    """The rows and columns of a parameter read as a matrix; the size of a vector or a scalar."""
    return (p.shape[0], math.prod(p.shape[1:])) if p.dim() > 1 else (p.numel(),)


def _units(p: Tensor, places: Tensor) -> Tangent:
    """The unit directions of the numbers of p at these places, (K,), in the order of memory; 0 for other places."""
    inside = ((places >= 0) & (places < p.numel())).unsqueeze(1)
    places = places.clamp(0, p.numel() - 1)
    if p.dim() < 2:
        return (F.one_hot(places, p.numel()) * inside).to(p.dtype).view(-1, *p.shape)
    rows, columns = _factor_sizes(p)
    left, right = F.one_hot(places // columns, rows) * inside, F.one_hot(places % columns, columns)
    return LowRankTangent(left.to(p.dtype), right.to(p.dtype), 1, p.shape)


def _parts(numbers: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which of the numbers are of which parameter."""
    return dict(zip(params, numbers.split([p.numel() for p in params.values()]), strict=True))


def _grads(numbers: Tensor, params: Mapping[str, Tensor], unused: Collection[str]) -> dict[str, Tensor]:
    return {
        name: like_parameter(part.view(params[name].shape).to(params[name].dtype, copy=True), params[name])
        for name, part in _parts(numbers, params).items()
        if name not in unused
    }

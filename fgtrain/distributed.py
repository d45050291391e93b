"""Several processes, one update: forward gradients need to send only K numbers a step, whatever the model's size.

The update depends only on a seed and K directional derivatives, and every rank can draw the directions from the seed.
So ranks exchange derivatives instead of gradients, in one of two ways (`distributed.tangents=...`):

- shared: all ranks use the same K directions on their own shard of the batch. The mean of each derivative over ranks is
  the derivative of the loss of the whole batch, so R processes are equivalent to one process with an R times larger
  batch. If R does not divide the last batch, it is filled up with its first examples.
- per_rank: R ranks use R K different directions, exchange the R K derivatives and rebuild the update from all of them.
  The part of the variance that comes from the directions is R times smaller. Each rank draws (R - 1) K more directions
  for that. Shrinkage takes all R K into account.

Some methods need more than seeds and derivatives (`scalar_reducible` is False, as for backpropagation and activity
perturbation). They average their gradients, in one flat bucket.

Lightning itself sends 8 bytes a batch so that ranks agree on signals; `comm/bytes_per_step` excludes them.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgtrain._torch import set_group_timeout
from fgtrain.errors import ConfigError, RankFailed
from fgtrain.estimators.base import Estimate, GradientEstimator
from fgtrain.estimators.gradients import add_grad
from fgtrain.forward_ad.passes import LossFn
from fgtrain.random import keyed_generator

TangentsOver = Literal["shared", "per_rank"]
TANGENTS_OVER = get_args(TangentsOver)


class Ranks:
    """The processes of a training run, their communication and its size in bytes.

    A single process, or no process group, needs no communication. Create it on every rank at the same time.

    Args:
        timeout_seconds: how long a rank waits for the others before it ends with an error.

    Attributes:
        rank: the index of this process.
        size: R, the number of processes.
        group: PyTorch's process group with the deadline of a step; None for a single process.
        bytes_sent: bytes sent by this process so far, assuming ring algorithms: all-reduce of m bytes sends
            2 m (R - 1) / R, all-gather of m bytes from each rank sends m (R - 1).

    >>> ranks = Ranks()
    >>> ranks.size, ranks.mean(torch.ones(2)), ranks.bytes_sent
    (1, tensor([1., 1.]), 0.0)
    """

    def __init__(self, timeout_seconds: float = 60.0) -> None:
        in_group = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if in_group else 0
        self.size = dist.get_world_size() if in_group else 1
        self.bytes_sent = 0.0
        self._timeout = timedelta(seconds=timeout_seconds)
        self.group: Any = None
        if self.size > 1:  # a separate group, whose deadline is not that of loading data
            self.group = dist.new_group(timeout=self._timeout)

    def end_startup(self) -> None:
        """Apply the deadline of a step to other communication (of Lightning, between steps) from now on."""
        if self.size > 1:
            set_group_timeout(self._timeout)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks, equal bit for bit on all of them; used as an estimator's `reduce`."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._together(dist.all_reduce, total)
        self.count_all_reduce(total.nbytes)
        return total / self.size

    def count_all_reduce(self, size: int) -> None:
        """Add an all-reduce of `size` bytes to `bytes_sent`."""
        self.bytes_sent += 2 * size * (self.size - 1) / self.size

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which must have the same shape, in the order of the ranks."""
        if self.size == 1:
            return [tensor]
        tensor = tensor.detach().contiguous()
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        self._together(dist.all_gather, found, tensor)
        self.bytes_sent += tensor.nbytes * (self.size - 1)
        return found

    def _together(self, collective: Callable[..., Any], *tensors: Any) -> None:
        with lost_ranks_named(self.rank):
            collective(*tensors, group=self.group)

    def estimate(
        self,
        estimator: GradientEstimator,
        model: nn.Module,
        loss_fn: LossFn,
        key: tuple[int, ...],
        tangents: TangentsOver = "shared",
        exchange: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> Estimate:
        """The joint estimate of all ranks, with the same gradients on each; the loss is that of the rank's own shard.

        If the estimator is unbiased, so is this, for the mean of the losses over ranks.

        Args:
            estimator: any method.
            model: the same on all ranks.
            loss_fn: the loss on this rank's shard of the batch.
            key: integers that determine the directions, such as (seed, step).
            tangents: "shared" or "per_rank".
            exchange: replaces the mean of exact gradients; see `fgtrain.lightning.exchange`.

        Raises:
            ConfigError: `tangents` is neither.
        """
        if tangents not in TANGENTS_OVER:
            raise ConfigError(f"distributed.tangents must be 'shared' or 'per_rank', got {tangents!r}")
        if self.size == 1:
            return estimator(model, loss_fn, generator=keyed_generator(*key))
        if exchange is not None:
            own = estimator(model, loss_fn, generator=keyed_generator(*key, self.rank))
            return own._replace(grads=exchange(dict(own.grads)))
        if not estimator.scalar_reducible:
            return estimator(model, loss_fn, generator=keyed_generator(*key, self.rank), reduce=self.mean)
        if tangents == "shared":
            return estimator(model, loss_fn, generator=keyed_generator(*key), reduce=self.mean)
        own = estimator(model, loss_fn, generator=keyed_generator(*key, self.rank))
        assert own.replayed is not None
        derivatives = self.gather(own.replayed)
        parts = (
            own.grads if rank == self.rank else estimator.replay(model, found, keyed_generator(*key, rank))
            for rank, found in enumerate(derivatives)
        )
        gain = estimator.mean_length_of(self.size, own.grads) / estimator.mean_length(own.grads)
        grads = _sum_of(parts, self.size / gain)
        found = {"directional_derivatives" if own.weights is None else "weights": torch.cat(derivatives)}
        return own._replace(grads=grads, **found)


def of_all_ranks(value: Any) -> list[Any]:
    """The `value` of every process, in the order of the ranks; all of them must call this together."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@contextmanager
def lost_ranks_named(rank: int) -> Generator[None]:
    """Raise RankFailed if torch.distributed reports a closed connection or an expired deadline."""
    try:
        yield
    except RuntimeError as error:
        of_connection = isinstance(error, dist.DistError) or "gloo" in str(error)
        if isinstance(error, RankFailed) or not of_connection:
            raise
        raise RankFailed(
            f"rank {rank} lost another rank in the middle of the run ({str(error).splitlines()[0]}); "
            "ckpt_path=.../checkpoints/last.ckpt continues the run"
        ) from error


def _sum_of(parts: Any, divisor: float) -> dict[str, Tensor]:
    """The sum of gradients over `divisor`, added in order so that every rank gets the same bits."""
    total: dict[str, Tensor] = {}
    for grads in parts:
        for name, g in grads.items():
            add_grad(total, name, g)
    return {name: g / divisor for name, g in total.items()}

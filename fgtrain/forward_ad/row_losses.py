"""The losses of the rows of a model's output, where a loss function returns their mean."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgtrain.agreement import agree
from fgtrain.forward_ad.known_losses import RecordedLosses
from fgtrain.forward_ad.passes import LossFn, check_losses


class Evaluated(NamedTuple):
    """Losses and their derivatives.

    Args:
        losses: (B,) or ().
        derivatives: (K, B) or (K,).
    """

    losses: Tensor
    derivatives: Tensor

    def has_mean_of(self, other: "Evaluated") -> bool:
        """Whether the mean loss and its derivatives, where finite, equal those of other losses up to rounding."""
        num = len(self.derivatives)
        return _same_means(self.losses.view(1, -1), other.losses.view(1, -1)) and _same_means(
            self.derivatives.view(num, -1), other.derivatives.view(num, -1)
        )


def _same_means(terms: Tensor, others: Tensor) -> bool:
    """Whether the means of the rows, where finite, agree; their terms may cancel."""
    found, expected, size = (x.mean(1).nan_to_num(0, 0, 0) for x in (terms, others, terms.abs()))
    return agree(found, expected, size)


class WithRows:
    """A loss function that returns its losses, and after them the loss of every row that the model's last layer gives.

    The rows of a language model are tokens. Their losses are known if the loss is the mean of one `F.cross_entropy` or
    `F.mse_loss`.

    Args:
        loss_fn: maps the model to losses (B,) or ().
    """

    def __init__(self, loss_fn: LossFn) -> None:
        self._loss_fn = loss_fn
        self._shape = torch.Size()

    def __call__(self, model: Any) -> Tensor:
        with RecordedLosses() as recorded:
            losses = self._loss_fn(model)
        self._shape, found = check_losses(losses).shape, recorded.only()
        if found is None or (found[2] is losses and self._shape):  # they are the losses of the rows
            return losses
        known, z, result = found
        rows = known.rows(z, result)
        return losses if rows.numel() == losses.numel() else torch.cat([losses.flatten(), rows.flatten()])

    def split(self, values: Tensor, derivatives: Tensor) -> tuple[Evaluated, Evaluated | None]:
        """The losses of a pass, and those of its rows, (R,) and (K, R); None if they are the losses, or unknown.

        Args:
            values: what the call returned.
            derivatives: its derivatives, (K, *values.shape).
        """
        count = self._shape.numel()
        losses, rows = values.flatten().split([count, values.numel() - count])
        moved, of_rows = derivatives.view(len(derivatives), -1).split([count, len(rows)], 1)
        whole = Evaluated(losses.view(self._shape), moved.view(-1, *self._shape))
        return whole, Evaluated(rows, of_rows) if len(rows) else None


def num_marks(num: int) -> int:
    """The number of directions of `marks`: the least M such that enough sets of half of M directions exist.

    >>> num_marks(64), num_marks(1000)
    (8, 13)
    """
    return next(m for m in itertools.count(1) if math.comb(m, (m + 1) // 2) >= num)


def marks(num: int, like: Tensor) -> Tensor:
    """Directions of `num` rows, (M, num), that tell by nan which rows a loss depends on, whatever the rounding.

    In half of the M directions a row has nan, in the others 0. Each row has its own half, so no row has nan in all
    directions of another one (Sperner 1928). If a loss depends on a row, even by a factor of 0, its derivatives are nan
    along all directions of the row. So a loss that depends on another row than its own always shows it.

    Args:
        num: the number of rows.
        like: a tensor with the dtype and device of the directions.
    """
    return like.new_zeros(num_marks(num), num).masked_fill_(_is_marked(num, like.device), torch.nan)


@functools.lru_cache(maxsize=16)
def _is_marked(num: int, device: torch.device) -> Tensor:
    return _halves(num_marks(num))[:, :num].to(device)


@functools.cache
def _halves(size: int) -> Tensor:
    """All halves of `size` directions as columns."""
    places = torch.tensor(list(itertools.combinations(range(size), (size + 1) // 2)), device="cpu").T
    return torch.zeros(size, places.shape[1], dtype=torch.bool, device="cpu").scatter_(0, places, value=True)


def reached(derivatives: Tensor) -> Tensor:
    """Whether every loss depends on its own row, and whether it depends on another row, (2, num).

    Args:
        derivatives: of the losses along `marks`, (M, num).
    """
    found, own = derivatives.isnan(), _is_marked(derivatives.shape[1], derivatives.device)
    return torch.stack([(found | ~own).all(0), (found & ~own).any(0)])

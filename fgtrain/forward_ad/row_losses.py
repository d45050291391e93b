"""The losses of the rows of a model's output, where a loss function returns their mean."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgtrain.agreement import agree
from fgtrain.forward_ad.dual import primal_of
from fgtrain.forward_ad.known_losses import Noticed
from fgtrain.forward_ad.passes import check_losses


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

    def __init__(self, loss_fn: Callable[[Any], Tensor]) -> None:
        self._loss_fn = loss_fn
        self._shape = torch.Size()

    def __call__(self, model: Any) -> Tensor:
        with Noticed() as noticed:
            losses = self._loss_fn(model)
        self._shape, found = check_losses(primal_of(losses)).shape, noticed.only()
        if found is None or (found[2] is losses and self._shape):  # they are the losses of the rows
            return losses
        known, taken, result = found
        rows = known.rows(taken, result)
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


NUM_MARKS = 4
"""The number of directions of `marks`."""


def marks(num: int, like: Tensor) -> Tensor:
    """Directions of `num` rows, (NUM_MARKS, num), that tell by nan which rows a loss depends on, whatever the rounding.

    Every row belongs to one of six classes, drawn in the same way at every call, and up to six rows to classes of their
    own. Two of the four directions mark the rows of a class with nan; the other entries are 0. No class has the two
    directions of another. So the derivatives of a loss that depends on a row, even by a factor of 0, show its class.

    Args:
        num: the number of rows.
        like: a tensor with the dtype and device of the directions.
    """
    return like.new_zeros(NUM_MARKS, num).masked_fill_(_is_marked(num, like.device), torch.nan)


@functools.lru_cache(maxsize=16)
def _is_marked(num: int, device: torch.device) -> Tensor:
    order = torch.randperm(num, generator=torch.Generator().manual_seed(0), device="cpu")
    pairs = torch.tensor(list(itertools.combinations(range(NUM_MARKS), 2)), device="cpu")[order % 6]
    return torch.zeros(NUM_MARKS, num, dtype=torch.bool, device="cpu").scatter_(0, pairs.T, value=True).to(device)


def reached(derivatives: Tensor) -> Tensor:
    """Whether every loss depends on its own class of rows, and whether it depends on another class, (2, num).

    Args:
        derivatives: of the losses along `marks`, (NUM_MARKS, num).
    """
    found, own = derivatives.isnan(), _is_marked(derivatives.shape[1], derivatives.device)
    return torch.stack([(found | ~own).all(0), (found & ~own).any(0)])

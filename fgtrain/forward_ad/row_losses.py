"""The losses of the rows of a model's output, where a loss function returns their mean."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgtrain.forward_ad.agreement import agree
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

    The rows of language models are tokens. They are known if the losses are the mean of one `F.cross_entropy` or
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


class Scaled(NamedTuple):
    """A direction of a tensor (R, C): every row moves along the same vector, by a factor of its own.

    Args:
        of_rows: the factors, (R,).
        of_channels: the vector, (C,).
    """

    of_rows: Tensor
    of_channels: Tensor

    @classmethod
    def sample(cls, num_rows: int, num_channels: int, like: Tensor) -> "Scaled":
        """One of normal numbers, the same at every call, with the dtype and device of `like`."""
        generator = torch.Generator(like.device).manual_seed(0)
        numbers = torch.empty(num_rows + num_channels, dtype=like.dtype, device=like.device).normal_(
            generator=generator
        )
        return cls(numbers[:num_rows], numbers[num_rows:])

    @property
    def direction(self) -> Tensor:
        """The direction, (R, C)."""
        return self.of_rows.unsqueeze(1) * self.of_channels

    def fits(self, units: Tensor, found: Tensor) -> bool:
        """Whether every loss depends on the row in its place, and on no other.

        Args:
            units: derivatives of the losses (R,) along the unit directions of all rows, (C, R).
            found: their derivatives along this direction, (R,).
        """
        return agree(found, self.of_rows * (self.of_channels @ units))

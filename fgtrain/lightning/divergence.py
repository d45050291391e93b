"""Non-finite numbers never reach the weights, and a run that has diverged ends with advice."""

import math
import sys
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fgtrain._torch import foreach_copy
from fgtrain.errors import DivergenceError
from fgtrain.estimators import Estimate, GradientEstimator
from fgtrain.estimators.gradients import norms
from fgtrain.network.sharding import is_sharded

DATA = "look for non-finite values in the data"
SHRINK = (
    "set shrinkage=True, without which the estimate is far longer than the gradient and a learning rate for "
    "backpropagation is far too large"
)


class Divergence(L.Callback):
    """Checks every estimate before a step uses it.

    A step with a non-finite loss, derivative or gradient is skipped and counted, and buffers (BatchNorm statistics) are
    restored. The first such step and the final count are printed on stderr. With several processes only values that all
    of them share are checked, so that they agree.

    Args:
        max_skipped_steps: end the run after this many skipped steps in a row.
        detect_divergence: end the run if the loss is above this multiple of its lowest smoothed value so far (or of a
            thousandth of the first loss, if that is more) for max_skipped_steps steps in a row; None for no limit. A
            loss whose smoothed value falls to 0 is not judged.
        max_skipped_share: end the run if a larger share of its batches was skipped, counting at least a hundred batches
            before training is over; None for no limit.
        advice: what the task offers against divergence.

    Attributes:
        skipped_steps: the number of skipped steps so far.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        max_skipped_steps: int = 10,
        detect_divergence: float | None = None,
        max_skipped_share: float | None = None,
        advice: str = "",
    ) -> None:
        if max_skipped_steps < 1:
            raise ValueError(f"max_skipped_steps must be at least 1, got {max_skipped_steps}")
        if detect_divergence is not None and not detect_divergence > 1:
            raise ValueError(f"detect_divergence must be a factor above 1, got {detect_divergence}")
        if max_skipped_share is not None and not 0 <= max_skipped_share <= 1:
            raise ValueError(f"max_skipped_share must be between 0 and 1, got {max_skipped_share}")
        self.max_skipped_steps = max_skipped_steps
        self.max_skipped_share = max_skipped_share
        self.detect_divergence = detect_divergence
        self.advice = advice
        self._estimator: GradientEstimator | None = None
        self.skipped_steps = 0
        self._in_a_row = 0
        self._batches = 0
        self._is_finite = True
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._forget_losses()

    def _forget_losses(self) -> None:
        self._above_in_a_row = 0
        self._first_loss: float | None = None
        self._smoothed = self._lowest = math.inf

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped_steps": self.skipped_steps,
            "in_a_row": self._in_a_row,
            "above_in_a_row": self._above_in_a_row,
            "first_loss": self._first_loss,
            "sound": self._is_finite,
            "batches": self._batches,
            "smoothed_loss": self._smoothed,
            "lowest_loss": self._lowest,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped_steps = state_dict["skipped_steps"]
        self._in_a_row, self._above_in_a_row = state_dict["in_a_row"], state_dict["above_in_a_row"]
        self._first_loss, self._is_finite = state_dict["first_loss"], state_dict["sound"]
        self._batches = state_dict.get("batches", 0)
        self._smoothed = state_dict.get("smoothed_loss", math.inf)
        self._lowest = state_dict.get("lowest_loss", math.inf)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._forget_losses()  # another run may have another loss; a resumed one gets its losses back after this

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module: Any = pl_module
        if not hasattr(module, "fgtrain_estimates"):
            return  # the Trainer has kept this callback of a module that it trained before
        self._estimator = module.fgtrain_estimates().estimator
        self._buffers = list(pl_module.buffers())
        self._copies = [b.clone() for b in self._buffers]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._buffers:
            foreach_copy(self._copies, self._buffers)

    def inspect(self, estimate: Estimate, trainer: L.Trainer) -> bool:
        """Whether an estimate is finite. An optimizer step with an estimate that is not will be skipped.

        Raises:
            DivergenceError: too many estimates were not finite.
        """
        self._batches += 1
        loss, is_finite = _examined(estimate, trainer)
        if is_finite:
            self._in_a_row = 0
            self._watch(loss, trainer)
            return True
        self._is_finite = False
        self._in_a_row += 1
        self.skipped_steps += 1
        if self._buffers:
            foreach_copy(self._buffers, self._copies)
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_steps": self.skipped_steps}, step=trainer.global_step)
        what = f"the loss is {loss}" if not math.isfinite(loss) else "a derivative or the gradient is not finite"
        if self.skipped_steps == 1 and trainer.is_global_zero:
            print(f"fgtrain: step {trainer.global_step}: {what}; this batch is skipped", file=sys.stderr)
        self._refuse_too_many(100)
        if self._in_a_row == self.max_skipped_steps:
            data = f"{DATA}, or " * (self.skipped_steps == self._batches)
            raise DivergenceError(
                f"step {trainer.global_step}: {what}, for {self._in_a_row} batches in a row (skipped, the weights are "
                f"those of the last good step); {data}{self._remedies()}; lr is {_lr(trainer):.3g}"
            )
        return False

    def inspect_again(self, estimate: Estimate, trainer: L.Trainer) -> bool:
        """As `inspect`, for a later estimate of a batch; it does not skip the optimizer step, which is under way."""
        _, is_finite = _examined(estimate, trainer)
        if not is_finite:
            self.inspect(estimate, trainer)
            self._is_finite = True
        return is_finite

    def step_is_finite(self) -> bool:
        """Whether all estimates since the last call were finite, so that the optimizer step can be done."""
        is_finite, self._is_finite = self._is_finite, True
        return is_finite

    def _watch(self, loss: float, trainer: L.Trainer) -> None:
        if self.detect_divergence is None:
            return
        if self._first_loss is None:
            self._first_loss = self._smoothed = loss
        self._smoothed += 0.1 * (loss - self._smoothed)
        self._lowest = min(self._lowest, self._smoothed)
        reference = max(self._lowest, 1e-3 * self._first_loss)
        above = self._lowest > 0 and self.detect_divergence * reference < loss
        self._above_in_a_row = self._above_in_a_row + 1 if above else 0
        if self._above_in_a_row == self.max_skipped_steps:
            raise DivergenceError(
                f"step {trainer.global_step}: the loss is {loss:.4g}; its lowest value was {reference:.4g}, and it has "
                f"been above detect_divergence={self.detect_divergence:g} times that for {self._above_in_a_row} steps; "
                f"{self._remedies()}; lr is {_lr(trainer):.3g}"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._refuse_too_many(1)
        if self.skipped_steps and trainer.is_global_zero:
            print(f"fgtrain: {self._share()} were skipped, since their numbers were not finite", file=sys.stderr)

    def _refuse_too_many(self, at_least: int) -> None:
        share = self.max_skipped_share
        if share is not None and self.skipped_steps > share * max(self._batches, at_least):
            raise DivergenceError(
                f"{self._share()} were skipped, more than max_skipped_share={share:g}: their loss, a derivative or the "
                f"gradient was not finite; {DATA}, or {self._remedies()}"
            )

    def _remedies(self) -> str:
        """What the run, its method and its task offer against divergence."""
        capped = ["the gradient (clip_grad_norm=...)"]
        if hasattr(self._estimator, "clip_derivative"):
            capped.insert(0, "the derivative (clip_derivative=...)")
        remedies = ["lower lr", f"cap {' or '.join(capped)}"]
        if self._estimator is not None and self._estimator.lacks_shrinkage:
            remedies.insert(0, SHRINK)
        if hasattr(self._estimator, "num_tangents"):
            remedies.append("take more directions (num_tangents=...)")
        if self.advice:
            remedies.append(self.advice)
        return ", or ".join([", ".join(remedies[:-1]), remedies[-1]])

    def _share(self) -> str:
        return f"{self.skipped_steps} of {self._batches} batches"


def _examined(estimate: Estimate, trainer: L.Trainer) -> tuple[float, bool]:
    """The loss, and whether the estimate is finite, on which all ranks agree."""
    alone = trainer.world_size == 1
    loss, *sizes = _sizes(estimate, alone)
    shared = [loss, *sizes] if alone else sizes  # ranks have different losses
    return loss, all(map(math.isfinite, shared))


def _sizes(estimate: Estimate, alone: bool) -> list[float]:
    """The loss and the norms of gradients and derivatives, in one transfer from the device.

    Args:
        estimate: the estimate of a step.
        alone: whether there is one process. Of several, all have the same gradients, but with some estimators each has
            its own derivatives. If the gradients are sharded, all have the same derivatives.
    """
    grads, derivatives = list(estimate.grads.values()), estimate.directional_derivatives
    tensors = [] if any(map(is_sharded, grads)) else grads
    if derivatives is not None and (alone or not tensors):
        tensors = [*tensors, derivatives]
    return torch.stack([estimate.loss.detach(), *norms(tensors)]).tolist()


def _lr(trainer: L.Trainer) -> float:
    return float(trainer.optimizers[0].param_groups[0]["lr"])

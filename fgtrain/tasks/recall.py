"""Predicting a token at some steps of a sequence."""

import torch.nn.functional as F
from torch import Tensor, nn

from fgtrain.tasks.base import Task


class Recall(Task):
    """Cross-entropy on batches (tokens, targets), both (B, T), at the steps whose target is not negative.

    The mean of the losses is the mean over the targets of the batch, in nats; without a target it is 0. The metrics
    have one value for each target.
    """

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        asked = targets >= 0
        losses = F.cross_entropy(model(tokens).flatten(0, 1), targets.clamp_min(0).flatten(), reduction="none")
        share = asked.sum().clamp_min(1) / len(targets)
        return (losses.view(targets.shape) * asked).sum(1) / share

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        tokens, targets = batch
        asked = targets >= 0
        logits, targets = model(tokens)[asked], targets[asked]
        losses = F.cross_entropy(logits, targets, reduction="none")
        return {"loss": losses, "acc": (logits.argmax(-1) == targets).float()}

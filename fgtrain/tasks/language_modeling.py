"""Predicting the next token."""

import torch.nn.functional as F
from torch import Tensor, nn

from fgtrain.tasks.base import Task


class LanguageModeling(Task):
    """Cross-entropy of the next token on batches (tokens, next tokens), both (B, T).

    The loss of a sequence is the mean over its T tokens, in nats.
    """

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, following = batch
        return _losses(model(tokens), following)

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        tokens, following = batch
        logits = model(tokens)
        return {"loss": _losses(logits, following), "acc": (logits.argmax(-1) == following).float().mean(1)}


def _losses(logits: Tensor, following: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
    return losses.view(following.shape).mean(1)

"""Classification by softmax cross-entropy."""

import torch.nn.functional as F
from torch import Tensor, nn

from fgtrain.tasks.base import Task


class Classification(Task):
    """Softmax cross-entropy on batches (inputs, labels).

    Args:
        label_smoothing: weight in [0, 1] of the uniform distribution in the targets.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels, reduction="none", label_smoothing=self.label_smoothing)

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs, labels = batch
        logits = model(inputs)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return {"loss": losses, "acc": (logits.argmax(1) == labels).float()}

"""LightningModules of a user, converted."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fgtrain.lightning import convert


class Plain(L.LightningModule):
    """A typical user's module, written without fgtrain."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(8, 3)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Full(Plain):
    """Everything a module may do around its training step."""

    def __init__(self):
        super().__init__()
        self.acc = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.mean = torchmetrics.MeanMetric()
        self.events = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx == 2:
            return None
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.acc(logits, y)
        self.mean.update(loss)
        self.log("acc", self.acc, on_epoch=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log_dict({"loss": loss, "twice": 2 * loss}, on_step=True, on_epoch=True)
        return {"loss": loss, "logits": logits}

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch == 1 and batch_idx == 4 else None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        logits = outputs.get("logits")
        assert type(logits) in (torch.Tensor, type(None))
        self.events.append(("end", None if logits is None else outputs["loss"].item()))

    def on_before_zero_grad(self, optimizer):
        self.events.append("zero_grad")

    def on_after_backward(self):
        self.events.append("backward")

    def on_before_optimizer_step(self, optimizer):
        self.events.append(("step", sum(p.grad.sum().item() for p in self.parameters() if p.grad is not None)))

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.events.append("clip")
        self.clip_gradients(optimizer, gradient_clip_val or 0.5, gradient_clip_algorithm or "norm")


class NoDropout(Plain):
    """A module without random numbers except for directions, since Lightning's loaders use the global generator."""

    def __init__(self):
        super().__init__()
        self.net.pop(3)


def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(44, 4, generator=generator), torch.randint(3, (44,), generator=generator)
    return DataLoader(TensorDataset(x, y), 8)


def fit(module, tmp_path, ckpt_path=None, **options):
    loader = data()
    defaults: dict[str, Any] = {
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    defaults |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    trainer = L.Trainer(**(defaults | options))
    torch.manual_seed(1)
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return trainer


def made(user_class, estimator=None):
    torch.manual_seed(0)
    module = user_class()
    return module if estimator is None else convert(module, estimator)

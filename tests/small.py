"""A small module and data set that train in a moment."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from fgtrain.data import InMemoryDataModule
from fgtrain.lightning import EstimatorModule
from fgtrain.models import MLP
from fgtrain.tasks import Classification


class Small(InMemoryDataModule):
    """Forty random examples: five batches of eight."""

    input_shape = (1, 2, 2)
    num_classes = 3

    def __init__(self, batch_size=8):
        super().__init__(batch_size)

    def load(self):
        generator = torch.Generator().manual_seed(0)
        splits = {
            name: (torch.randn(n, 1, 2, 2, generator=generator), torch.randint(3, (n,), generator=generator))
            for name, n in (("train", 40), ("val", 16), ("test", 16))
        }
        return splits, torch.Tensor.float


def make(estimator, model=None, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), **options):
    torch.manual_seed(0)
    return EstimatorModule(model or MLP((1, 2, 2), 3, [5]), Classification(), estimator, optimizer, **options)


def trainer(tmp_path, *callbacks, **options):
    defaults: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
    }
    defaults |= {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    defaults |= {"use_distributed_sampler": False, "log_every_n_steps": 1, "max_epochs": -1}
    return L.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **(defaults | options))


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name

"""The summary that a run prints before training."""

import copy
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from fgtrain.distributed import Ranks
from fgtrain.lightning.length import first_batch
from fgtrain.lightning.module import EstimatorModule
from fgtrain.lightning.step import estimate_for_step
from fgtrain.memory import peak_mib
from fgtrain.network.snapshot import Snapshot


class Summary(L.Callback):
    """Prints the parameters, the directions, the expected error of one estimate and the size of a step's tensors.

    The error is the estimator's closed form for a gradient with equal entries. The size is measured with one estimate,
    which is not used, on the first batch of a separate loader.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, markup=False, emoji=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, EstimatorModule)
        before = Snapshot(pl_module.model)
        lines = describe(pl_module, _first_batch(trainer))
        before.restore()
        table = Table.grid(padding=(0, 2))
        for name, value in lines.items():
            table.add_row(name, value)
        self.console.print(table, highlight=False)


def describe(module: EstimatorModule, batch: Any) -> dict[str, str]:
    """The summary, line by line."""
    model, estimator = module.model, module.estimator
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in params.values())
    lines = {"parameters": f"{count:,} in {len(params)} tensors"}
    if (num_tangents := getattr(estimator, "num_tangents", None)) is not None:
        law = getattr(estimator, "tangents", None)
        lines["tangents"] = f"{num_tangents} a step" + (f", {law}" if law is not None else "")
    equal = {name: p.detach().new_ones(p.shape) for name, p in params.items()}
    if (error := estimator.relative_squared_error(equal)) is not None:
        quality = f"{error**0.5:.3g} times the gradient's length, cosine {estimator.expected_cosine(equal):.2g}"
        lines["expected error"] = quality if error else "none: the exact gradient of each batch"
    if batch is not None:
        watched = copy.deepcopy(estimator)  # the summary must not change its state

        def step() -> None:
            plugin = module.trainer.precision_plugin
            task = module.task
            estimate_for_step(plugin, Ranks(), watched, model, lambda net: task.losses(net, batch), key=(module.seed,))

        peak = peak_mib(step, next(iter(params.values())).device)
        lines["memory per step"] = f"{peak:.3g} MiB for tensors at the peak, besides parameters and data"
    return lines


def _first_batch(trainer: Any) -> Any:
    """A batch of a separate loader, on the device; None if ranks would have to draw it together."""
    if trainer.datamodule is None or trainer.world_size > 1:
        return None
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(first_batch(trainer)))

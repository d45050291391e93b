"""Paths of the points of a test function, saved and drawn over its contours."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from fgtrain.lightning.module import EstimatorModule
from fgtrain.tasks import Function


class Trajectory(L.Callback):
    """Records the points after every step; writes trajectory.npz and, in two dimensions, trajectory.png.

    trajectory.npz holds `points` (steps + 1, starts, dim), which begin with the starting points, and `values` (steps +
    1, starts).

    Args:
        run_dir: folder for both files.
        max_paths: the largest number of paths drawn.
    """

    def __init__(self, run_dir: str, max_paths: int = 20) -> None:
        self.run_dir = Path(run_dir)
        self.max_paths = max_paths
        self._points: list[torch.Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"points": torch.stack(self._points)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._points = list(state_dict["points"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._points:
            self._record(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._record(pl_module)

    def _record(self, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EstimatorModule)
        self._points.append(pl_module.model().detach().cpu().clone())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, EstimatorModule)
        task = pl_module.task
        assert isinstance(task, Function)
        points = torch.stack(self._points)
        np.savez_compressed(self.run_dir / "trajectory.npz", points=points.numpy(), values=task.value(points).numpy())
        if task.dim != 2:
            return
        figure = draw_trajectories(task, points[:, : self.max_paths])
        figure.savefig(self.run_dir / "trajectory.png", dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("trajectory", figure, trainer.global_step)


def draw_trajectories(function: Function, points: torch.Tensor) -> Figure:
    """Paths (steps, starts, 2) over the contours of a function of two variables, with its minima as stars."""
    minima = function.minima()
    finite = points[points.isfinite().all(-1)]
    low, high = _frame(torch.cat([finite, minima.to(finite.dtype)]))
    x, y = (torch.linspace(a, b, 240) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    height = (function.value(grid) - function.minimum).clamp_min(0)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    contours = axes.contourf(
        x.numpy(), y.numpy(), torch.log10(height + 1e-4).numpy(), levels=24, cmap="Greys", alpha=0.8
    )
    figure.colorbar(contours, label="log10(f - minimum + 1e-4)")
    for path in points.transpose(0, 1).numpy():
        axes.plot(*path.T, linewidth=1.2)
        axes.plot(*path[0], "o", color="black", markersize=4)
    axes.plot(*minima.T.numpy(), "*", color="gold", markeredgecolor="black", markersize=14, linestyle="none")
    axes.set(
        xlim=(x[0].item(), x[-1].item()),
        ylim=(y[0].item(), y[-1].item()),
        xlabel="x",
        ylabel="y",
        title=function.name,
    )
    return figure


def _frame(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A box around the points with a small margin."""
    low, high = points.amin(0), points.amax(0)
    margin = 0.1 * (high - low) + 0.25
    return low - margin, high + margin

"""Paths of the points of a test function, saved and drawn over its contours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fgtrain.figures import house_style, looks, save
from fgtrain.lightning.module import EstimatorModule
from fgtrain.tasks import Function


class Trajectory(L.Callback):
    """Records the points after every step; writes trajectory.npz and, in two dimensions, trajectory.png and .svg.

    trajectory.npz holds `points` (steps + 1, starts, dim), which begin with the starting points, and `values` (steps +
    1, starts). Does nothing if the task is not a test function.

    Args:
        run_dir: folder for the files.
        max_paths: the largest number of paths drawn.

    Attributes:
        method: the method's name for the title and the colour; empty for the estimator's class.
    """

    def __init__(self, run_dir: str, max_paths: int = 100) -> None:
        self.run_dir = Path(run_dir)
        self.max_paths = max_paths
        self.method = ""
        self._points: list[torch.Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"points": torch.stack(self._points)} if self._points else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._points = list(state_dict.get("points", []))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._points:
            self._record(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._record(pl_module)

    def _record(self, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EstimatorModule)
        if isinstance(pl_module.task, Function):
            self._points.append(pl_module.model().detach().cpu().clone())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EstimatorModule)
        task = pl_module.task
        if not trainer.is_global_zero or not isinstance(task, Function):
            return
        points = torch.stack(self._points)
        np.savez_compressed(self.run_dir / "trajectory.npz", points=points.numpy(), values=task.value(points).numpy())
        if task.dim != 2:
            return
        group = trainer.optimizers[0].param_groups[0]
        conditions = f"lr {group.get('initial_lr', group['lr']):g}, seed {pl_module.seed}"
        figure = draw_trajectories(
            task, {self.method or type(pl_module.estimator).__name__: points}, conditions, self.max_paths
        )
        save(figure, self.run_dir / "trajectory")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("trajectory", figure, trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_image("trajectory", [str(self.run_dir / "trajectory.png")], trainer.global_step)


@house_style
def draw_trajectories(
    function: Function, paths: Mapping[str, torch.Tensor], conditions: str = "", max_paths: int = 100
) -> Figure:
    """A figure of paths over the contours of a function of two variables.

    Args:
        function: the function.
        paths: {method: points (steps, starts, 2)}.
        conditions: those of the runs, for the title.
        max_paths: the largest number of paths drawn of a method; the title says how many were left out.
    """
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    plot_trajectories(axes, function, {method: points[:, :max_paths] for method, points in paths.items()})
    title = ", ".join([function.name, *(paths if len(paths) == 1 else ()), *([conditions] if conditions else ())])
    starts = next(iter(paths.values())).shape[1]
    if starts > 1:
        lost = {method: int((~function.converging(points[-1])).sum()) for method, points in paths.items()}
        title += f"\n{starts} starts" if starts <= max_paths else f"\n{max_paths} of {starts} starts"
        title += "".join(f", {n} diverged" + f" with {method}" * (len(paths) > 1) for method, n in lost.items() if n)
    axes.set_title(title)
    if len(paths) > 1:
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def plot_trajectories(axes: Axes, function: Function, paths: Mapping[str, torch.Tensor]) -> None:
    """Draw the paths {method: points (steps, starts, 2)} over the contours; dots are starts, stars are minima."""
    minima = function.minima()
    shown = torch.cat([_near(function, points) for points in paths.values()] + [minima.float()])
    low, high = _frame(shown)
    x, y = (torch.linspace(a, b, 240) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    height = torch.log10((function.value(grid) - function.minimum).clamp_min(0) + 1e-4)
    palest, darkest = height.min().item(), 2 * height.max().item() - height.min().item()  # so that paths stand out
    contours = axes.contourf(x.numpy(), y.numpy(), height.numpy(), levels=24, cmap="Greys", vmin=palest, vmax=darkest)
    contours.set_rasterized(True)
    axes.figure.colorbar(contours, ax=axes, label="log10(f - minimum + 1e-4)")
    for method, (colour, dashes) in looks(paths).items():
        points = paths[method]
        many = points.shape[1] > 1
        for i, path in enumerate(points.transpose(0, 1).numpy()):
            label = method if i == 0 else None
            width, alpha = (0.7, 0.6) if many else (1.4, 0.9)
            axes.plot(*path.T, color=colour, linestyle=dashes, linewidth=width, alpha=alpha, label=label)
        axes.plot(*points[0].T.numpy(), "o", color="black", markersize=2 if many else 4)
    axes.plot(*minima.T.numpy(), "*", color="gold", markeredgecolor="black", markersize=13, zorder=3)
    limits = torch.stack([low, high]).tolist()
    axes.set(xlim=(limits[0][0], limits[1][0]), ylim=(limits[0][1], limits[1][1]), xlabel="x", ylabel="y")


def _near(function: Function, points: torch.Tensor) -> torch.Tensor:
    """The starts, and those of the points (steps, starts, 2) that are not far outside the function's domain."""
    low, high = function.domain
    everywhere = points.flatten(0, 1)
    return torch.cat([points[0], everywhere[(everywhere - (low + high) / 2).abs().amax(1) <= 0.75 * (high - low)]])


def _frame(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A box around the points with a small margin."""
    low, high = points.amin(0), points.amax(0)
    margin = 0.1 * (high - low) + 0.25
    return low - margin, high + margin
